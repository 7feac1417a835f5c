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
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import edgert
from edgert.bundle import Bundle, locate
from edgert.cli.terminal import markdown_table
from edgert.converters.adapter_file import write_adapter
from edgert.converters.adapter_part import Part
from edgert.units import format_bytes

TOKEN = 7
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
        paths = adapters(bundle, args.share, args.adapters or Path(directory))
        if args.make:
            return
        with edgert.load(args.model, memory=args.memory, threads=args.threads or "auto") as model:
            for path in paths:
                start = time.perf_counter()
                name = model.load_adapter(path).name
                model.session(adapter=name).close()  # reads its numbers
                info = next(one for one in model.adapters() if one.name == name)
                label = f"read {name}, {info.matrices} matrices, {format_bytes(info.bytes)}"
                rows.append((label, ms(time.perf_counter() - start)))
            rows += switches(model, args)
    print(markdown_table(rows, right=(1,)))


def adapters(bundle: Bundle, share: float, directory: Path) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.adapter" for name in ("one", "two")]
    for seed, path in enumerate(paths):
        if not path.exists():
            write_adapter(path, "SHIRA", list(random_sparse(bundle, share, seed)), bundle.manifest)
    return paths


def switches(model: edgert.Model, args: argparse.Namespace) -> list[tuple[str, str]]:
    for _ in range(2):  # every expert is read, or as many as fit
        plain = decode(model, 3 * args.tokens)
    token = statistics.median(plain[1:])
    rows = [("a plain token, first", ms(token))]
    cold: list[Times] = []
    warm: list[Times] = []
    for turn in range(2 * (args.rounds + 1)):
        name = ("one", "two")[turn % 2]
        start = time.perf_counter()
        model.set_adapter(name, mode="patch")
        switch = time.perf_counter() - start
        times = decode(model, args.tokens + 1)
        after = decode(model, args.tokens)
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
        times = decode(model, args.tokens)
        rows.append(("overlay: the median token", ms(statistics.median(times[1:]))))
    model.set_adapter(None)
    rows.append(("a plain token, last", ms(statistics.median(decode(model, args.tokens)[1:]))))
    return rows


def decode(model: edgert.Model, tokens: int) -> list[float]:
    """Seconds of each token of a new sequence that begins with one token."""
    times: list[float] = []
    last = time.perf_counter()
    for _ in model.stream([TOKEN], max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=len(times)):
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return times


def random_sparse(bundle: Bundle, share: float, seed: int) -> Iterator[Part]:
    rng = np.random.default_rng(seed)
    recipe = bundle.manifest["recipe"]
    for tensor in bundle.manifest["tensors"]:
        if (".attention." in tensor["name"] or tensor["name"] == "output") and len(tensor["shape"]) == 2:
            yield sparse_part(rng, tensor["name"], tensor["shape"][0], tensor["shape"][1], share)
    for layer in bundle.manifest["experts"]:
        ffn = recipe["blocks"][recipe["layers"][layer["layer"]]]["ffn"]
        hidden, width = recipe["hidden_size"], ffn["moe_intermediate_size"]
        for expert in range(len(layer["extents"])):
            prefix = f"layers.{layer['layer']}.experts.{expert}."
            yield sparse_part(rng, prefix + "gate", width, hidden, share)
            yield sparse_part(rng, prefix + "up", width, hidden, share)
            yield sparse_part(rng, prefix + "down", hidden, width, share)


def sparse_part(rng: np.random.Generator, name: str, rows: int, cols: int, share: float) -> Part:
    """In the order in which codes lie, of a whole number of tiles of 16 rows."""
    places = np.unique(rng.integers(0, rows // 16 * 16 * cols, int(rows * cols * share)))
    tile, inner = np.divmod(places, 16 * cols)
    return Part(
        name,
        rows=(16 * tile + inner % 16).astype(np.int32),
        cols=(inner // 16).astype(np.int32),
        values=rng.standard_normal(places.size, np.float32) * np.float32(0.02),
        remainders=rng.integers(-100, 101, places.size).astype(np.int8),
        patch_error=np.zeros(2, np.float32),
    )


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def against(seconds: float, plain: float) -> str:
    return f"{ms(seconds)} ({seconds / plain:.2f}x)"


if __name__ == "__main__":
    main()
