"""What LoRA beside the weights costs: decoding with and without an adapter of all projections of attention, by turns; and,
with --parts many, --sequences together with as many adapters as --adapters or with one, of --registered.

python benchmarks/adapters.py [MODEL] --rank 16 [--parts one many]

MODEL is a bundle or the name of a shape (the embedded one). Adapters have random numbers, in f16. Speeds are medians of --rounds, each
over --tokens; a switch is what set_adapter takes, after which the next sequence has it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from random_adapters import random_lora
from timing import timed

import edgert
from edgert._native import Sampler, SamplerOptions
from edgert.bundle import Bundle, locate
from edgert.cli.terminal import markdown_table
from edgert.converters.adapter_file import write_adapter
from edgert.shapes import SHAPES, shape_bundle
from edgert.units import format_bytes

PROMPT = list(range(3, 11))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", nargs="?")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--adapter-memory", default="256MiB")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["one"])
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=32)
    args = parser.parse_args(arguments)
    path = shape_bundle(args.model) if args.model in SHAPES else locate(args.model)
    knobs: dict[str, Any] = {"memory": args.memory, "threads": args.threads or "auto", "context": 512}
    if "many" in args.parts:
        knobs |= {"parallel": args.sequences, "adapter_memory": args.adapter_memory}
    with tempfile.TemporaryDirectory() as directory, edgert.load(path, **knobs) as model:
        file = Path(directory) / "random-0.adapter"
        bundle = Bundle.open(path)
        write_adapter(file, "LORA", random_lora(bundle, args.rank), bundle.manifest)
        for part in args.parts:
            print(markdown_table([("", ""), *PARTS[part](model, file, args)], right=(1,)))


def one(model: edgert.Model, file: Path, args: argparse.Namespace) -> list[tuple[str, str]]:
    load_s, info = timed(lambda: (model.load_adapter(file, "lora"), model.sequence("lora"))[0])
    switch_s = statistics.median(timed(lambda: model.set_adapter({"lora": 1.0}))[0] for _ in range(100))
    speeds: dict[str, list[float]] = {"": [], "lora": []}
    for _ in range(args.rounds + 1):
        for name, of_name in speeds.items():
            of_name.append(decode_speed(model, name, args.tokens))
    plain, with_lora = (statistics.median(speed[1:]) for speed in speeds.values())  # the first round warms up
    return [
        (f"LoRA of rank {args.rank}, {info.matrices} matrices", format_bytes(model.adapters()[0].bytes)),
        ("load, and read", f"{load_s * 1e3:.1f} ms"),
        ("switch", f"{switch_s * 1e3:.3f} ms"),
        ("decode without", f"{plain:.1f} tokens/s"),
        ("decode with", f"{with_lora:.1f} tokens/s ({with_lora / plain - 1:+.1%})"),
    ]


def many(model: edgert.Model, file: Path, args: argparse.Namespace) -> list[tuple[str, str]]:
    """The adapters are all alike, but the model does not know."""
    files = [file.with_name(f"many-{number}.adapter") for number in range(args.registered)]
    for link in files:
        link.hardlink_to(file)
    before = model.stats()["used_bytes"]
    register_s, _ = timed(lambda: [model.load_adapter(link) for link in files])
    registered = model.stats()["used_bytes"] - before
    names = [link.stem for link in files[: args.adapters]]
    choices: dict[str, list[Any]] = {
        "none": [[]] * args.sequences,
        "one": [names[0]] * args.sequences,
        "many": [names[number % len(names)] for number in range(args.sequences)],
    }
    speeds: dict[str, list[float]] = {name: [] for name in choices}
    for _ in range(args.rounds + 1):
        for name, of_name in speeds.items():
            of_name.append(batch_speed(model, choices[name], args.tokens))
    none, same, mixed = (statistics.median(speed[1:]) for speed in speeds.values())
    for link in files:  # each in turn, as a server's users might have them
        model.sequence(link.stem)
    stats = model.stats()
    return [
        (f"{args.registered} registered", f"{register_s * 1e3 / args.registered:.2f} ms each"),
        ("memory that takes", format_bytes(registered)),
        (f"{args.sequences} sequences without", f"{none:.0f} tokens/s"),
        ("with one adapter", f"{same:.0f} tokens/s ({same / none - 1:+.1%})"),
        (f"with {args.adapters} adapters", f"{mixed:.0f} tokens/s ({mixed / same:.2f} of one's)"),
        (
            f"then every one of {args.registered} in turn",
            f"{stats['adapters_resident']} resident, {format_bytes(stats['adapter_bytes'])}, "
            f"{stats['adapter_evictions']} evictions",
        ),
        (
            "peak, of the budget",
            f"{format_bytes(stats['peak_bytes'])} of {format_bytes(stats['budget_bytes'])}",
        ),
    ]


PARTS = {"one": one, "many": many}


def decode_speed(model: edgert.Model, name: str, tokens: int) -> float:
    done = model.generate(PROMPT, adapter=name or [], max_tokens=tokens, ignore_eos=True, temperature=0)
    return float(done.statistics["decode_tokens_per_s"])


def batch_speed(model: edgert.Model, choices: Sequence[Any], tokens: int) -> float:
    """Tokens a second of sequences that decode together, each with its adapters."""
    sequences = [model.sequence(choice) for choice in choices]
    samplers = [Sampler(SamplerOptions()) for _ in choices]
    native = model.native
    rows: list[Any] = [
        (sequence, PROMPT, sampler) for sequence, sampler in zip(sequences, samplers, strict=True)
    ]
    drawn = native.step(rows)
    start = time.perf_counter()
    for _ in range(tokens):
        rows = [(row[0], [sample.token], row[2]) for row, sample in zip(rows, drawn, strict=True) if sample]
        drawn = native.step(rows)
    speed = tokens * len(choices) / (time.perf_counter() - start)
    for sequence in sequences:
        sequence.close()
    return speed


if __name__ == "__main__":
    main()
