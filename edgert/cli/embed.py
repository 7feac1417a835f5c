"""edgert embed: texts to vectors."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from edgert.cli.options import Subparsers, add_knobs, knob_flags
from edgert.cli.terminal import print_json, say
from edgert.errors import InvalidArgumentError

_MAX_INPUT_BYTES = 64 << 20


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "embed",
        help="turn texts into vectors",
        description="Print the embedding of each text, one line of numbers a text; without TEXT, of each line of stdin.",
    )
    parser.add_argument("model", metavar="MODEL", help="an encoder's bundle, by path or name")
    parser.add_argument("texts", metavar="TEXT", nargs="*")
    parser.add_argument("--dimensions", metavar="N", type=int, help="keep the first N and normalise again")
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="to length 1 (default: as the model states)",
    )
    parser.add_argument(
        "--prompt-name", metavar="NAME", help="put this prompt of the model in front of each text"
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=32, help="texts in one run (32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_knobs(parser)
    _let_flags_stand_between(parser)
    return parser


def _let_flags_stand_between(parser: argparse.ArgumentParser) -> None:
    """MODEL --json TEXT: argparse by itself takes the texts to end where the first flag begins."""
    plain = parser.parse_known_args

    def parse(arguments: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        setattr(parser, "parse_known_args", plain)  # noqa: B010 - which the next line calls
        return parser.parse_known_intermixed_args(arguments, namespace)

    setattr(parser, "parse_known_args", parse)  # noqa: B010 - a method to mypy


def run(args: argparse.Namespace) -> int:
    import edgert

    texts = args.texts or _lines()
    with edgert.load(args.model, **knob_flags(args)) as model:
        vectors = model.embed(
            texts,
            dimensions=args.dimensions,
            normalize=args.normalize,
            batch_size=args.batch_size,
            prompt=args.prompt_name,
        )
        if args.json:
            value = {"model": model.name, "dimensions": int(vectors.shape[1]), "embeddings": vectors.tolist()}
            print_json({**value, "statistics": model.stats()})
        else:
            for vector in vectors.tolist():
                say(" ".join(f"{number:.7g}" for number in vector))
    return 0


def _lines() -> list[str]:
    from edgert.cli.run import decode

    lines = decode(sys.stdin.buffer.read(_MAX_INPUT_BYTES + 1), "stdin", _MAX_INPUT_BYTES).splitlines()
    if not lines:
        raise InvalidArgumentError("stdin: no text; give TEXT or lines on stdin")
    return lines
