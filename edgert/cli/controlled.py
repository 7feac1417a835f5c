"""The flags of the control loop, and a model under it; shared by commands that run models."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import add_settings
from edgert.errors import InvalidArgumentError
from edgert.settings import Layers

if TYPE_CHECKING:
    from edgert.controlling import Bounds, Control
    from edgert.model import Model


def add_control(parser: argparse.ArgumentParser) -> None:
    from edgert.controlling.bounds import CONTROL

    group = parser.add_argument_group(
        "control", "bounds that are not given come from the device profile that this machine resembles"
    )
    add_settings(group, CONTROL)
    group.add_argument(
        "--control-device", metavar="NAME", help="the device profile to take bounds from, or a file of one"
    )
    group.add_argument(
        "--control-log",
        metavar="FILE",
        type=Path,
        help="record every decision, for monitor, report and replay; older parts are FILE.1 to FILE.3",
    )
    group.add_argument(
        "--allow-lossy",
        action="store_true",
        help="let the control loop give up quality where nothing else keeps the bound on a token's time",
    )


def control_bounds(args: argparse.Namespace) -> "Bounds | None":
    """As flags, variables, files and the device profile say; None where the control is off."""
    from edgert.controlling.bounds import BOUNDS, CONTROL, bounds_from
    from edgert.devices import load_device, resemble

    layers = Layers.read()
    if layers.value(CONTROL[0], args.control) != "auto":
        for flag, given in (("--control-log", args.control_log), ("--allow-lossy", args.allow_lossy)):
            if given:
                raise InvalidArgumentError(f"{flag}: needs --control auto")
        return None
    if args.allow_lossy and args.exact:
        raise InvalidArgumentError("--allow-lossy: does not go with --exact")
    stated: dict[str, Any] = {row.name: layers.value(row, getattr(args, row.name)) for row in BOUNDS}
    device = load_device(args.control_device) if args.control_device else resemble()
    return bounds_from(device, stated, allow_lossy=args.allow_lossy)


def log_bytes(args: argparse.Namespace) -> int:
    """The bound of the record with its older parts."""
    from edgert.controlling.bounds import LOG_SIZE

    found = Layers.read().value(LOG_SIZE, args.control_log_size)
    return int(LOG_SIZE.default if found is None else found)


@contextmanager
def controlled(model: "Model", args: argparse.Namespace) -> "Iterator[Control | None]":
    """Within it the model is controlled, if that is wanted."""
    bounds = control_bounds(args)
    if bounds is None:
        yield None
        return
    from edgert.controlling import Control

    with Control.start(model, bounds, log=args.control_log, log_bytes=log_bytes(args)) as control:
        yield control
