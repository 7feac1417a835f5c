"""edgert serve: the daemon."""

import argparse
from typing import TYPE_CHECKING, Any

from edgert.cli.controlled import add_control, control_bounds, log_bytes
from edgert.cli.options import Subparsers, add_knobs, add_settings, knob_flags
from edgert.cli.terminal import note
from edgert.errors import InvalidArgumentError
from edgert.server.configuration import SERVER

if TYPE_CHECKING:
    from edgert.server.configuration import Configuration


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve",
        help="answer OpenAI's API over HTTP",
        description="Serve models over HTTP in the manner of OpenAI's API, with a dashboard at /. On this machine alone "
        "unless --host says otherwise.",
    )
    parser.add_argument(
        "models",
        metavar="MODEL[,OPTION...]",
        nargs="*",
        help="a bundle's path or name, or a GGUF file, with options: name=NAME, memory=SIZE of the budget, pin (never "
        "unload), adapter=[NAME=]PATH[:SCALE] (default: those that `edgert list` shows) [EDGERT_MODELS]",
    )
    add_settings(parser.add_argument_group("server"), SERVER)
    add_control(parser)
    add_knobs(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    configuration, knobs = configured(args)
    bounds = control_bounds(args)
    if args.control_log is not None and len(configuration.models) != 1:
        raise InvalidArgumentError("--control-log: is of one model: name it alone")
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        note(f"edgert: error: the server needs the package {error.name}: pip install 'edgert[serve]'")
        return 1
    from edgert.server import opening
    from edgert.server.run import run as serve

    opening.check_sources(configuration)
    return serve(configuration, knobs, bounds, args.control_log, log_bytes(args))


def configured(args: argparse.Namespace) -> "tuple[Configuration, dict[str, Any]]":
    """The configuration and the engine's knobs as flags, variables, files and the device profile say."""
    from edgert.server.configuration import SETTINGS, Configuration, device_of
    from edgert.server.knobs import knobs_of
    from edgert.settings import Layers

    given = {setting.name: getattr(args, setting.name) for setting in SETTINGS}
    layers = Layers.read()
    configuration = Configuration.of(given, layers)
    return configuration, knobs_of(knob_flags(args), device_of(given, layers))
