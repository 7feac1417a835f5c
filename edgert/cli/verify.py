"""edgert verify: read a whole bundle and check every checksum."""

import argparse

from edgert.cli.options import Subparsers, add_json, add_model, find_model
from edgert.cli.terminal import print_json, progress, say
from edgert.units import format_bytes


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify",
        help="check every checksum of a bundle",
        description="Read a whole bundle and check every checksum.",
    )
    add_model(parser)
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from edgert import _native, component
    from edgert.bundle import locate

    path = locate(find_model(args.model))
    with progress("verify") as update:
        if component.is_one(path):
            checked = component.verify(path, update)
        else:
            checked = _native.verify_bundle(str(path), update)
    if args.json:
        print_json({"path": str(path), "bytes": checked, "ok": True})
    else:
        say(f"{path}: sound, {format_bytes(checked)} checked")
    return 0
