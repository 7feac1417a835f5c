"""edgert chat: talk with a model."""

import argparse

from edgert.cli.conversation import converse
from edgert.cli.options import Subparsers, add_model
from edgert.cli.run import add_generation


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model: every line is a message. /help names the commands that begin with a slash; Ctrl-C stops an "
        "answer, Ctrl-D leaves. Where stdin is no terminal its lines are the messages, and answers alone go to stdout.",
    )
    add_model(parser)
    add_generation(parser)
    parser.add_argument(
        "--no-history", action="store_true", help="keep nothing of what is typed for the arrow keys"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    return converse(args, keep_history=not args.no_history)
