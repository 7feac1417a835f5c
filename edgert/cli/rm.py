"""edgert rm: remove bundles."""

import argparse
import sys
from pathlib import Path

from edgert.cli.options import Subparsers, add_json
from edgert.cli.terminal import note, print_json, say
from edgert.errors import InvalidArgumentError
from edgert.units import format_bytes


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "rm",
        help="remove bundles",
        description="Remove bundles, and say what that frees. Of a GGUF file the bundle that was made of it and kept goes; the file "
        "stays. What is no bundle, holds other files too, or is in use is left alone.",
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a bundle's path or its name as `edgert list` says, or a GGUF file",
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from edgert.removal import removable

    found = [removable(model) for model in args.models]  # all of them before the first goes
    if not args.yes and not _agreed(
        dict.fromkeys(one.path for one in found), sum(one.bytes for one in found)
    ):
        note("edgert: nothing was removed")
        return 1
    for one in found:
        one.remove()
        if not args.json:
            say(f"removed {one.path}, {format_bytes(one.bytes)}")
    if args.json:
        print_json({"removed": [{"path": str(one.path), "bytes": one.bytes} for one in found]})
    return 0


def _agreed(paths: dict[Path, None], size: int) -> bool:
    names = ", ".join(map(str, paths))
    if not sys.stdin.isatty():
        raise InvalidArgumentError(f"{names}: nobody can be asked whether to remove this; say --yes")
    say(f"remove {names} ({format_bytes(size)})? [y/N] ", end="", file=sys.stderr)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
