"""The command line: parses, dispatches, and turns errors into one line and an exit status.

Status: 0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C: edgert.__main__), 141 the reader of the output went away.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from edgert import __version__
from edgert.cli import (
    adapter,
    bench,
    calibrate,
    chat,
    completion,
    control,
    convert,
    demo,
    devices,
    doctor,
    embed,
    events,
    monitor,
    plan,
    ps,
    pull,
    report,
    rm,
    run,
    serve,
    service,
    show,
    terminal,
    verify,
)
from edgert.cli import eval as eval_
from edgert.cli import list as list_
from edgert.errors import EdgertError

COMMANDS = (
    demo,
    plan,
    pull,
    convert,
    adapter,
    run,
    chat,
    serve,
    service,
    embed,
    show,
    verify,
    list_,
    ps,
    rm,
    devices,
    calibrate,
    eval_,
    bench,
    control,
    monitor,
    report,
    doctor,
    events,
    completion,
)

# Packages by the extra that brings them, where that is not "convert".
_EXTRAS = {"ray": "ray", "starlette": "serve", "uvicorn": "serve", "onnxruntime": "onnx", "llama_cpp": "gguf"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status. Raises KeyboardInterrupt."""
    _open_closed_streams()
    terminal.show_what_can_be_shown()
    args = make_parser().parse_args(arguments)
    terminal.show_warnings()
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit succeeds
        return 141
    except (EdgertError, OSError) as error:
        terminal.fail(error)
        _trace(args.verbose)
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("edgert"):
            raise
        extra = "events" if args.run is events.run else _EXTRAS.get(error.name, "convert")
        terminal.note(f"edgert: error: this needs the package {error.name}: pip install 'edgert[{extra}]'")
        return 1
    except Exception as error:  # noqa: BLE001 - a fault of ours, which also deserves one line
        terminal.note(
            f"edgert: error: internal: {type(error).__name__}: {terminal.one_line(error)} (--verbose shows where)"
        )
        _trace(args.verbose)
        return 1


def _open_closed_streams() -> None:
    """What the caller closed, which Python shows as None, reads and writes nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open to the end


def make_parser() -> argparse.ArgumentParser:
    """The one declaration of the command line."""
    parser = argparse.ArgumentParser(
        prog="edgert",
        description="Run mixture-of-experts language models that are larger than the memory they are given.",
        epilog="Every engine and sampling flag is also a variable EDGERT_<NAME> and a key of "
        "~/.config/edgert/config.toml; the flag goes first.",
    )
    parser.add_argument(
        "--version", action="version", version=f"edgert {__version__}", help="print the version"
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = command.register(subparsers)
        subparser.set_defaults(run=command.run)
        subparser.set_defaults(verbose=False)
        _add_verbose(subparser)
    return parser


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    """To it and to the commands below it."""
    parser.add_argument(
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,
        help="with an error, show where it arose",
    )
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _add_verbose(below)


def _trace(wanted: bool) -> None:
    if wanted:
        traceback.print_exc()
