"""What many clients at once get from one model in memory, and what a shared beginning saves.

python benchmarks/batching.py [MODEL | --shape olmoe-1b-7b] --streams 32

Throughput is tokens generated a second by --streams clients at once against one client, by turns, best of --rounds; each has a
prompt of its own. The second figure is the time to the first token of a prompt of --prefix tokens and --prompt more, for the first
that comes and for later ones that begin alike (median). Replies at once are compared with those alone.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np

import edgert
from edgert.backends.native import NativeModel
from edgert.cli.terminal import markdown_table
from edgert.engine import Engine
from edgert.errors import InvalidArgumentError
from edgert.generation import Piece
from edgert.model import Model
from edgert.sampling import Sampling
from edgert.shapes import shape_bundle


class Asked:
    """A request; `tokens` and times once it has ended."""

    def __init__(self, engine: Engine, prompt: list[int], tokens: int) -> None:
        self.tokens: list[int] = []
        self.job = engine.submit(prompt, Sampling(max_tokens=tokens, ignore_eos=True), self._take)

    def _take(self, piece: Piece) -> None:
        if piece.token is not None:
            self.tokens.append(piece.token)

    def wait(self) -> "Asked":
        self.job.done.wait()
        if self.job.error is not None:
            raise self.job.error
        return self

    def first_s(self) -> float:
        return float(self.wait().job.statistics()["time_to_first_token_s"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", nargs="?")
    parser.add_argument("--shape")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prefix", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--memory", default="auto")
    args = parser.parse_args(arguments)
    one = args.prompt + args.tokens
    context = max(512, args.prefix + one + 16)
    parallel = -(-args.streams * (one + 16) // context) + 1
    path = shape_bundle(args.shape) if args.shape else args.model
    with edgert.load(
        path, memory=args.memory, threads=args.threads or "auto", context=context, parallel=parallel
    ) as model:
        fill(model)
        engine = Engine(model, queue=args.streams)
        try:
            rows = batching(model, engine, args.streams, args.prompt, args.tokens, args.rounds)
            rows += prefixes(model, engine, args.prefix, args.prompt)
        finally:
            engine.close()
    print(markdown_table([("", ""), *rows], right=(1,)))


def fill(model: Model) -> None:
    if not (isinstance(model, NativeModel) and model.resident):
        raise InvalidArgumentError("memory: every expert is to fit, for what is measured here is no storage")
    model.generate([1, 2, 3], max_tokens=2, ignore_eos=True)
    while (stats := model.stats())["experts_resident"] < stats["experts_total"]:
        time.sleep(0.05)


def prompts(model: Model, count: int, tokens: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[int(t) for t in rng.integers(0, model.vocab_size, tokens)] for _ in range(count)]


def batching(
    model: Model, engine: Engine, streams: int, prompt: int, tokens: int, rounds: int
) -> list[tuple[str, str]]:
    alone, together, same = 0.0, 0.0, True
    for turn in range(rounds):
        asked = prompts(model, streams, prompt, turn)
        start = time.perf_counter()
        first = Asked(engine, asked[0], tokens).wait().tokens
        alone = max(alone, tokens / (time.perf_counter() - start))
        model.native.forget_prefixes()
        start = time.perf_counter()
        all_of_them = [one.wait() for one in [Asked(engine, p, tokens) for p in asked]]
        together = max(together, streams * tokens / (time.perf_counter() - start))
        same = same and all_of_them[0].tokens == first
    return [
        ("one client", f"{alone:.1f} tokens/s"),
        (f"{streams} clients", f"{together:.1f} tokens/s ({together / alone:.2f} x)"),
        ("the reply among others is the one alone", "yes" if same else "NO"),
    ]


def prefixes(model: Model, engine: Engine, prefix: int, prompt: int) -> list[tuple[str, str]]:
    model.native.forget_prefixes()
    (shared,) = prompts(model, 1, prefix, 1000)
    endings = prompts(model, 4, prompt, 1001)
    first, *later = [Asked(engine, shared + ending, 2).first_s() for ending in endings]
    second = statistics.median(later)
    return [
        (f"first token after {prefix} + {prompt} tokens", f"{first * 1e3:.0f} ms"),
        ("where the beginning is remembered", f"{second * 1e3:.0f} ms ({second / first:.3f} x)"),
    ]


if __name__ == "__main__":
    main()
