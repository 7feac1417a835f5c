"""What switching sparse adapters costs where they are patches of packed codes: the switch, the first token, the next ones.

python benchmarks/patches.py [MODEL] --share 0.01

MODEL is a bundle (the embedded one). Two adapters have random values at a random --share of the elements of every matrix of attention,
of every expert and of the head, and take turns. A sequence of one token begins after every switch; times are medians over --rounds.
"cold" is the first switch to an adapter ever, which compiles its patches; its numbers have been read. Factors are over the tokens of
the same round whose experts are patched already, since machines drift; plain tokens, without any adapter, come before and after all of it.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from random_adapters import sparse_files
from timing import against, ms, switch_seconds, timed, token_seconds

import edgert
from edgert.adapters import AdapterInfo
from edgert.bundle import Bundle, locate
from edgert.cli.terminal import markdown_table
from edgert.units import format_bytes

Times = tuple[
    float, float, float, float
]  # of the switch, the first token, the mean of the next, and after them


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
    parser.add_argument("--overlay", action="store_true", help="also time the overlay")
    args = parser.parse_args(arguments)
    bundle = Bundle.open(locate(args.model))
    rows = [("", "")]
    with tempfile.TemporaryDirectory() as directory:
        paths = sparse_files(bundle, args.share, args.adapters or Path(directory))
        if args.make:
            return
        with edgert.load(args.model, memory=args.memory, threads=args.threads or "auto") as model:
            for path in paths:
                seconds, info = timed(partial(read, model, path))
                rows.append(
                    (f"read {info.name}, {info.matrices} matrices, {format_bytes(info.bytes)}", ms(seconds))
                )
            rows += switches(model, args)
    print(markdown_table(rows, right=(1,)))


def read(model: edgert.Model, path: Path) -> AdapterInfo:
    name = model.load_adapter(path).name
    model.session(adapter=name).close()  # reads its numbers
    return next(one for one in model.adapters() if one.name == name)


def switches(model: edgert.Model, args: argparse.Namespace) -> list[tuple[str, str]]:
    for _ in range(2):  # every expert is read, or as many as fit
        plain = token_seconds(model, 3 * args.tokens)
    token = statistics.median(plain[1:])
    rows = [("a plain token, first", ms(token))]
    cold: list[Times] = []
    warm: list[Times] = []
    for turn in range(2 * (args.rounds + 1)):
        name = ("one", "two")[turn % 2]
        switch = switch_seconds(model, name, "patch")
        times = token_seconds(model, args.tokens + 1)
        after = token_seconds(model, args.tokens)
        (cold if turn < 2 else warm).append(
            (switch, times[0], statistics.mean(times[1:]), statistics.median(after[1:]))
        )
    for label, found in (("cold: ", cold), ("", warm)):
        switch, first, following, after_it = (
            statistics.median(column) for column in zip(*found, strict=True)
        )
        rows += [
            (f"{label}set_adapter", ms(switch)),
            (f"{label}the first token", against(first, after_it)),
            (f"{label}the mean of the next {args.tokens}", against(following, after_it)),
            (f"{label}the median of {args.tokens} after them", ms(after_it)),
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


if __name__ == "__main__":
    main()
