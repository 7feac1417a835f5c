"""edgert bench: prefill and decode speed."""

import argparse

from edgert.cli.options import Subparsers, add_json, add_knobs, add_model, knob_flags
from edgert.cli.run import describe
from edgert.cli.terminal import note, print_json, progress, say, table
from edgert.settings import Setting
from edgert.units import format_bytes

_OPTIONS = (
    Setting("prompt_tokens", "int", "tokens of the prefill (128)", None, 1, 2**31 - 1),
    Setting("decode_tokens", "int", "tokens of the decode (64)", None, 1, 2**31 - 1),
    Setting("repetitions", "int", "times that each is measured, after one that is not (3)", None, 1, 1000),
)


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure speed",
        description="Measure prefill and decode. Speeds are medians; the spread is (largest - smallest) / median.",
    )
    add_model(parser)
    for option in _OPTIONS:
        parser.add_argument(option.flag, metavar="N", help=option.help)
    parser.add_argument(
        "--drop-caches",
        action="store_true",
        help="before each repetition, drop the bundle from the page cache",
    )
    add_json(parser)
    add_knobs(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    import edgert
    from edgert.benchmark import benchmark

    given = {option: getattr(args, option.name) for option in _OPTIONS}
    options = {
        option.name: option.check(value, option.flag) for option, value in given.items() if value is not None
    }
    with edgert.load(args.model, **knob_flags(args)) as model:
        note(describe(model))
        with progress("bench", "runs") as update:
            report = benchmark(model, **options, drop_caches=args.drop_caches, progress=update)
    if args.json:
        print_json(report)
        return 0
    rows = [("PHASE", "TOKENS", "TOK/S", "SPREAD", "HITS", "READ A TOKEN", "WAITED A TOKEN")]
    rows += [
        (
            row["phase"],
            str(row["tokens"]),
            f"{row['tokens_per_s']:.1f}",
            f"{row['spread']:.1%}",
            f"{row['hit_rate']:.1%}",
            format_bytes(row["bytes_read_per_token"]),
            f"{row['stall_s_per_token'] * 1000:.2f} ms",
        )
        for row in report["results"]
    ]
    say(table(rows, right=(1, 2, 3, 4, 5, 6)))
    say(
        f"peak {format_bytes(report['peak_bytes'])} of {format_bytes(report['budget_bytes'])}, "
        f"median of {report['results'][0]['repetitions']}"
    )
    return 0
