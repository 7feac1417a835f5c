"""Switching adapters in edgert, PEFT and llama.cpp, one after the other in one run, on the same processor, threads and shapes.

    pip install peft torch                   # and for llama.cpp, in --llama-python: llama-cpp-python gguf
    python benchmarks/peft_switch.py olmoe-1b-7b --llama-python python

Adapters are random, and take turns. Sparse ones (SHiRA) change 1% of attention and experts; the LoRA that PEFT fuses has as many values.
edgert puts sparse values into the packed codes of an int4 bundle; experts follow when they are used. PEFT holds --layers of the shape's
layers as one nn.Linear a matrix, for it has no sparse adapters of experts in one tensor; its times are scaled to all layers, without the
head. LoRA beside the weights (rank 16, attention) is that of edgert and llama.cpp. Times are medians of --rounds,
speeds those of the median token.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
from random_adapters import random_lora, sparse_files, sparse_part
from timing import against, ms, switch_seconds, token_seconds

import edgert
from edgert import settings
from edgert.bundle import Bundle
from edgert.cli.terminal import markdown_table
from edgert.converters.adapter_file import write_adapter
from edgert.shapes import SHAPES, shape_bundle

SHARE, RANK = 0.01, 16


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=[name for name in SHAPES if name.startswith("olmoe")])
    parser.add_argument("--layers", type=int, default=2, help="that PEFT holds; its times are scaled to all")
    parser.add_argument("--dtype", default="float32", help="of PEFT's weights")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", default="8GiB")
    parser.add_argument("--adapters", metavar="DIRECTORY", type=Path, help="where edgert's are kept, or made")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter with llama_cpp and gguf")
    args = parser.parse_args(words)
    config = SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as directory:
        mine = of_edgert(args, shape_bundle(args.shape), args.adapters or Path(directory))
    peft = of_peft(args, config)
    llama = of_llama(args)
    print(markdown_table(switch_rows(mine, peft, args.tokens), right=(1, 2, 3)))
    print()
    print(markdown_table(lora_rows(mine, llama), right=(1, 2, 3)))


def of_edgert(args: argparse.Namespace, path: Path, directory: Path) -> dict[str, float]:
    """Seconds by name, and tokens a second with LoRA and without."""
    bundle = Bundle.open(path)
    files = sparse_adapters(bundle, directory)
    lora = directory / "lora.adapter"
    write_adapter(lora, "LORA", random_lora(bundle, RANK), bundle.manifest)
    with edgert.load(path, memory=args.memory, threads=args.threads) as model:
        for file in (*files, lora):
            model.load_adapter(file)
        found = switches(model, args)
        found["lora_switch"] = statistics.median(switch_seconds(model, name) for name in ["lora", None] * 50)
        model.disable_adapters()
        for name in ("one", "two", "matrix"):
            model.unload_adapter(name)
        speeds: dict[str, list[float]] = {"without": [], "with": []}
        for _ in range(args.rounds + 1):
            for which, of_which in speeds.items():
                model.set_adapter("lora" if which == "with" else None)
                of_which.append(1 / statistics.median(token_seconds(model, args.tokens)[1:]))
    return found | {which: statistics.median(one[1:]) for which, one in speeds.items()}


def sparse_adapters(bundle: Bundle, directory: Path) -> list[Path]:
    """Two of all matrices, and one of one."""
    both = sparse_files(bundle, SHARE, directory)
    one = directory / "matrix.adapter"
    hidden = bundle.recipe["hidden_size"]
    rng = np.random.default_rng(3)
    part = sparse_part(rng, "layers.0.attention.q", hidden, hidden, SHARE)
    write_adapter(one, "SHIRA", [part], bundle.manifest)
    return [*both, one]


def switches(model: edgert.Model, args: argparse.Namespace) -> dict[str, float]:
    for _ in range(2):  # every expert is read
        token_seconds(model, 3 * args.tokens)
    found: list[tuple[float, float, float, float]] = []
    for turn in range(2 * (args.rounds + 1)):
        name = ("one", "two")[turn % 2]
        switch = switch_seconds(model, name, "patch")
        times = token_seconds(model, args.tokens + 1)
        after = statistics.median(token_seconds(model, args.tokens)[1:])
        found.append((switch, times[0], after, switch + sum(times) - after * len(times)))
    switch, first, after, whole = (statistics.median(column) for column in zip(*found[2:], strict=True))
    model.set_adapter(None)
    times = []
    for _ in range(10 * args.rounds):
        times.append(switch_seconds(model, "matrix", "patch"))
        model.set_adapter(None)
    matrix = statistics.median(times[1:])
    return {"switch": switch, "first": first, "token": after, "whole": whole, "matrix": matrix}


def of_peft(args: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of all layers, but for those of one matrix."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    rank = round(SHARE * hidden * width / (hidden + width))
    options = {"layers": args.layers, "dtype": args.dtype, "rank": rank}
    found = run("peft_run.py", sys.executable, args, config=config, **options)
    for kind in ("shira", "lora"):
        for name in ("switch_s", "first_s", "token_s", "unfused_token_s"):
            found[kind][name] *= config["num_hidden_layers"] / args.layers
    return found


def of_llama(args: argparse.Namespace) -> dict[str, Any]:
    gguf = settings.cache() / "gguf" / f"{args.shape}-q4_0.gguf"
    return run(
        "llama_lora.py", args.llama_python, args, model=str(gguf), rank=RANK, decode_tokens=args.tokens
    )


def run(script: str, python: str, args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    options |= {"threads": args.threads, "rounds": args.rounds}
    return peers.report([python, str(peers.HERE / script), json.dumps(options)])


def switch_rows(mine: Mapping[str, float], peft: Mapping[str, Any], tokens: int) -> list[tuple[str, ...]]:
    shira, lora = peft["shira"], peft["lora"]

    def row(label: str, seconds: float, name: str) -> tuple[str, ...]:
        return (label, ms(seconds), *(against(one[name], seconds) for one in (shira, lora)))

    return [
        ("", "edgert, patches", "PEFT, SHiRA merged", "PEFT, LoRA merged"),
        row("switch", mine["switch"], "switch_s"),
        row(f"switch, and what it adds to the next {tokens + 1} tokens", mine["whole"], "switch_s"),
        row("the first token after", mine["first"], "first_s"),
        row("a token once all is in place", mine["token"], "token_s"),
        ("a token where PEFT does not merge", "", ms(shira["unfused_token_s"]), ms(lora["unfused_token_s"])),
        row("one matrix, put on", mine["matrix"], "matrix_s"),
        ("one matrix, torch's scatter_ alone", "", ms(peft["scatter_s"]), ""),
    ]


def lora_rows(mine: Mapping[str, float], llama: Mapping[str, float]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "switch", "decode without", f"with LoRA of rank {RANK}")]
    for name, found, switch in (
        ("edgert, int4", mine, mine["lora_switch"]),
        ("llama.cpp, q4_0", llama, llama["switch_s"]),
    ):
        change = found["with"] / found["without"] - 1
        speeds = f"{found['without']:.1f} tokens/s", f"{found['with']:.1f} ({change:+.1%})"
        rows.append((name, f"{switch * 1e3:.3f} ms", *speeds))
    return rows


if __name__ == "__main__":
    main()
