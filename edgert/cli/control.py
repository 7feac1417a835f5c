"""edgert control: records of the control loop."""

import argparse
from pathlib import Path

from edgert.cli.options import Subparsers
from edgert.cli.terminal import say


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "control",
        help="replay the record of a control loop",
        description="Make every decision of a record (--control-log) again from its signals, and compare them bit for bit.",
    )
    parser.add_argument("action", choices=("replay",))
    parser.add_argument("file", metavar="FILE", type=Path)
    return parser


def run(args: argparse.Namespace) -> int:
    from edgert.controlling import replay

    say(f"{args.file}: {replay(args.file)} decisions made again, all the same")
    return 0
