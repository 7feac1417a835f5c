"""edgert service: the daemon under systemd."""

import argparse
from pathlib import Path

from edgert.cli.options import Subparsers
from edgert.cli.serve import configured
from edgert.cli.serve import register as register_serve
from edgert.cli.terminal import note, say


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "service",
        help="install the server as a service of systemd",
        description="Install, remove or show the unit that runs `edgert serve` under systemd, in a sandbox and with a memory "
        "limit that fits its budget. Options of this command go before the action.",
    )
    parser.add_argument("action", choices=("install", "uninstall", "print"))
    parser.add_argument(
        "--socket", action="store_true", help="start it with the first connection (socket activation)"
    )
    parser.add_argument(
        "--root",
        metavar="DIR",
        type=Path,
        default=Path("/"),
        help="install into a system's directory, such as an image that is made; starts nothing (default: /)",
    )
    parser.add_argument(
        "arguments",
        metavar="...",
        nargs=argparse.REMAINDER,
        help="what `edgert serve` takes, for example: qwen3.edgert --memory 2GiB",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from edgert import service

    if args.action == "uninstall":
        gone = service.uninstall(args.root)
        note("removed " + ", ".join(map(str, gone)) if gone else "edgert: there is no service")
        return 0
    words = service.absolute(args.arguments)
    for hidden in service.unreachable(words):
        note(
            f"edgert: warning: the service cannot reach {hidden}: keep bundles in /var/lib/edgert/models and name them"
        )
    served = _serve_parser().parse_args(words)
    configuration, knobs = configured(served)
    memory = knobs["memory"] if isinstance(knobs["memory"], int) and knobs["memory"] > 0 else None
    units = {service.SERVICE: service.service_unit(words, memory)}
    if args.socket:
        units[service.SOCKET] = service.socket_unit(configuration.host, configuration.port)
    if args.action == "print":
        say("\n".join(units.values()), end="")
        return 0
    note("written " + ", ".join(map(str, service.install(units, args.root))))
    return 0


def _serve_parser() -> argparse.ArgumentParser:
    return register_serve(argparse.ArgumentParser(prog="edgert").add_subparsers())
