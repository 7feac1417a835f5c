"""What LoRA beside the weights costs: decoding with and without an adapter of all projections of attention, by turns.

python benchmarks/adapters.py [MODEL] --rank 16

MODEL is a bundle (the embedded one). The adapter has random numbers. Speeds are medians of --rounds, each over --tokens; a switch is
what set_adapter takes, after which the next sequence has it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import edgert
from edgert.bundle import Bundle, locate
from edgert.cli.terminal import markdown_table
from edgert.converters.adapter import Part
from edgert.converters.adapter_file import write_adapter
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
    args = parser.parse_args(arguments)
    bundle = Bundle.open(locate(args.model))
    with (
        tempfile.TemporaryDirectory() as directory,
        edgert.load(args.model, memory=args.memory, threads=args.threads or "auto") as model,
    ):
        path = Path(directory) / "random.adapter"
        write_adapter(path, "LORA", random_lora(bundle, args.rank), bundle.manifest)
        load_s, info = timed(lambda: model.load_adapter(path, "lora"))
        switch_s = statistics.median(timed(lambda: model.set_adapter({"lora": 1.0}))[0] for _ in range(100))
        speeds: dict[str, list[float]] = {"": [], "lora": []}
        for _ in range(args.rounds + 1):
            for name, of_name in speeds.items():
                of_name.append(decode_speed(model, name, args.tokens))
    plain, with_lora = (statistics.median(one[1:]) for one in speeds.values())  # the first round warms up
    rows = [
        ("", ""),
        (f"LoRA of rank {args.rank}, {info.matrices} matrices", format_bytes(info.bytes)),
        ("load", f"{load_s * 1e3:.1f} ms"),
        ("switch", f"{switch_s * 1e3:.3f} ms"),
        ("decode without", f"{plain:.1f} tokens/s"),
        ("decode with", f"{with_lora:.1f} tokens/s ({with_lora / plain - 1:+.1%})"),
    ]
    print(markdown_table(rows, right=(1,)))


def random_lora(bundle: Bundle, rank: int) -> list[Part]:
    rng = np.random.default_rng(0)
    parts = []
    for tensor in bundle.manifest["tensors"]:
        if ".attention." not in tensor["name"] or len(tensor["shape"]) != 2:
            continue
        rows, cols = tensor["shape"]
        a, b = (
            rng.standard_normal(shape, np.float32) * np.float32(0.01)
            for shape in ((rank, cols), (rows, rank))
        )
        parts.append(Part(tensor["name"], a, b))
    return parts


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def decode_speed(model: edgert.Model, name: str, tokens: int) -> float:
    done = model.generate(PROMPT, adapter=name or [], max_tokens=tokens, ignore_eos=True, temperature=0)
    return float(done.statistics["decode_tokens_per_s"])


if __name__ == "__main__":
    main()
