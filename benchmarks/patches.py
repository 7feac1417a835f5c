"""What switching sparse adapters costs where they are patches of packed codes: the switch, the first token, the next ones.

python benchmarks/patches.py [MODEL] --share 0.01

MODEL is a bundle (the embedded one). Two adapters have random values at a random --share of the elements of every matrix of attention,
of every expert and of the head, and take turns; their files have the patches, or, with --compile, the numbers alone. A sequence of
one token begins after every switch; times are medians over --rounds. "cold" is the first switch to an adapter ever, which reads its
patches, or compiles them of numbers that have been read. Factors are over the tokens of the same round whose experts are patched
already, since machines drift: of means over their mean, of the first over their median. Plain tokens, without any adapter, come
before and after all of it.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from random_adapters import sparse_files
from timing import against, ms, switch_seconds, timed, token_seconds

import edgert
from edgert.bundle import Bundle, locate
from edgert.cli.terminal import markdown_table
from edgert.units import format_bytes


class Round(NamedTuple):
    """Seconds of a switch, of the first token after it, and of the next ones; and of as many once all is in place."""

    switch: float
    first: float
    following: float
    after: float
    after_mean: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", nargs="?")
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--memory", default="auto")
    parser.add_argument(
        "--adapters", metavar="DIRECTORY", type=Path, help="where the adapters are kept, or made"
    )
    parser.add_argument("--make", action="store_true", help="make them and do no more")
    parser.add_argument("--compile", action="store_true", help="of files without patches")
    parser.add_argument("--overlay", action="store_true", help="also time the overlay")
    args = parser.parse_args(arguments)
    bundle = Bundle.open(locate(args.model))
    rows = [("", "")]
    with tempfile.TemporaryDirectory() as directory:
        paths = sparse_files(
            bundle, args.share, args.adapters or Path(directory), with_patches=not args.compile
        )
        if args.make:
            return
        with edgert.load(args.model, memory=args.memory, threads=args.threads or "auto") as model:
            for path in paths:
                seconds, info = timed(partial(model.load_adapter, path))
                rows.append((f"load {info.name}, {info.matrices} matrices", ms(seconds)))
                if args.compile:
                    seconds, _ = timed(partial(read, model, info.name))
                    rows.append((f"read {info.name}, {format_bytes(info.bytes)}", ms(seconds)))
            rows += switches(model, args)
    print(markdown_table(rows, right=(1,)))


def read(model: edgert.Model, name: str) -> None:
    model.session(adapter=name).close()


def switches(model: edgert.Model, args: argparse.Namespace) -> list[tuple[str, str]]:
    for _ in range(2):  # every expert is read, or as many as fit
        plain = token_seconds(model, 3 * args.tokens)
    rows = [("a plain token, first", ms(statistics.median(plain[1:])))]
    cold = [one_round(model, name, args.tokens) for name in ("one", "two")]
    by_turns: list[Round] = []
    from_base: list[Round] = []
    for _ in range(args.rounds):
        by_turns += [one_round(model, name, args.tokens) for name in ("one", "two")]
        model.set_adapter(None)
        token_seconds(model, args.tokens + 1)  # of as many experts the patches are off
        from_base.append(one_round(model, "two", args.tokens))
    for label, rounds in (("cold: ", cold), ("from the other: ", by_turns), ("from none: ", from_base)):
        found = Round(*(statistics.median(column) for column in zip(*rounds, strict=True)))
        rows += [
            (f"{label}set_adapter", ms(found.switch)),
            (f"{label}the first token", against(found.first, found.after)),
            (f"{label}the mean of the next {args.tokens}", against(found.following, found.after_mean)),
            (f"{label}{args.tokens} after them, the mean", ms(found.after_mean)),
        ]
    model.set_adapter(None)
    model.unload_adapter("one")
    if args.overlay:
        model.set_adapter("two", mode="overlay")
        times = token_seconds(model, args.tokens)
        rows.append(("overlay: the median token", ms(statistics.median(times[1:]))))
    model.set_adapter(None)
    rows.append(("a plain token, last", ms(statistics.median(token_seconds(model, args.tokens)[1:]))))
    return rows


def one_round(model: edgert.Model, name: str, tokens: int) -> Round:
    switch = switch_seconds(model, name, "patch")
    times, after = token_seconds(model, tokens + 1), token_seconds(model, tokens + 1)
    return Round(
        switch,
        times[0],
        statistics.mean(times[1:]),
        statistics.median(after[1:]),
        statistics.mean(after[1:]),
    )


if __name__ == "__main__":
    main()
