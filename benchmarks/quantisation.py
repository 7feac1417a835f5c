"""The curve of bytes and KL divergence: error-aware bundles beside llama.cpp's types with an importance matrix.

    python benchmarks/quantisation.py CHECKPOINT --calibration-text A --text B [--gguf F32.gguf --peer PYTHON] [--plot OUT.svg]

One calibration serves both sides: whole moments for ours, their diagonals as llama.cpp's importance matrix. Both engines
then run text B in windows of the model's context, and every position is compared with the f32 bundle's logits. Bytes are
those of all files of a bundle, tokenizer included, and of the GGUF; with --experts-only everything else stays f32 on both
sides, and counted are the experts. PYTHON is an interpreter with llama-cpp-python.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from llama_quantise import compare

import edgert
from edgert.calibrating import calibrate
from edgert.calibration import Calibration
from edgert.converters.convert import convert
from edgert.converters.formats import ExpertFormat

Options = dict[str, Any]
Row = dict[str, Any]


def _dense(matrices: str, embedding: str) -> Options:
    return {"dense_format": matrices, "embedding_format": embedding}


# What convert() is told of experts, and of all else.
OURS: Mapping[str, tuple[ExpertFormat, Options]] = {
    "nl2, embedding nl2_16": ("nl2", _dense("nl3_16", "nl2_16")),
    "nl2, embedding nl3_16": ("nl2", _dense("nl4_16", "nl3_16")),
    "nl2": ("nl2", _dense("nl4_16", "nl4_16")),
    "nl2_16": ("nl2_16", _dense("nl4_16", "nl4_16")),
    "int2": ("int2", _dense("nl4_16", "nl4_16")),
    "nl2_16, down nl3_16": (("nl2_16", "nl2_16", "nl3_16"), _dense("nl4_16", "nl4_16")),
    "nl3": ("nl3", _dense("nl4_16", "nl4_16")),
    "int3": ("int3", _dense("nl4_16", "nl4_16")),
    "nl3_16": ("nl3_16", _dense("nl4_16", "q5_0")),
    "nl3_16, down nl4_16": (("nl3_16", "nl3_16", "nl4_16"), _dense("nl4_16", "q5_0")),
    "nl4": ("nl4", _dense("nl4_16", "q5_0")),
    "nl4_16": ("nl4_16", _dense("nl4_16", "q5_0")),
    "int4": ("int4", _dense("int8", "q5_0")),
    "nl4_16, dense int8": ("nl4_16", _dense("int8", "int8")),
}
PEERS = ("F32", "Q4_K_M", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS")  # fmt: skip


def sizes(bundle: Path) -> dict[str, int]:
    """Bytes of all files; of packed tensors, without alignment and tokenizer; of the experts among them."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    experts = sum(extent[2] for layer in manifest["experts"] for extent in layer["extents"])
    return {
        "bytes": sum(file.stat().st_size for file in bundle.iterdir()),
        "tensor_bytes": experts + sum(tensor["bytes"] for tensor in manifest["tensors"]),
        "expert_bytes": experts,
    }


def run(bundle: Path, windows: list[list[int]], reference: Any) -> dict[str, float]:
    with edgert.load(bundle, kv_format="f32") as model:
        return compare((model.logits(window) for window in windows), reference, windows)


def importance(calibration: Calibration) -> dict[str, Any]:
    """Mean squares of inputs by llama.cpp's names of tensors."""

    def squares(moments: Any) -> Any:
        return moments if moments.ndim == 1 else np.diagonal(moments)

    rows: dict[str, Any] = {"token_embd.weight": squares(calibration.dense_moments("output"))}
    for layer in range(calibration.model.num_layers):
        for name, theirs in {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}.items():
            moments = calibration.dense_moments(f"layers.{layer}.attention.{name}")
            rows[f"blk.{layer}.{theirs}.weight"] = squares(moments)
    for m, moe in enumerate(calibration.model.moe):
        inputs = np.stack([squares(calibration.input_moments(m, e)) for e in range(moe.num_experts)])
        inner = np.stack([squares(calibration.inner_moments(m, e)) for e in range(moe.num_experts)])
        for name, values in {"gate": inputs, "up": inputs, "down": inner}.items():
            rows[f"blk.{moe.layer}.ffn_{name}_exps.weight"] = values
    return rows


def measure(args: argparse.Namespace, directory: Path) -> list[Row]:
    exact = directory / "exact.edgert"
    convert(args.checkpoint, exact, dense_format="f32", expert_format="f32")
    calibration = calibrate(exact, args.calibration_text.read_text(), moments="full")
    with edgert.load(exact, kv_format="f32") as model:
        ids = [int(token) for token in model.tokenizer.encode(args.text.read_text())]
        size = model.context
        windows = [ids[first : first + size] for first in range(0, len(ids) - 1, size)]
        windows = [window for window in windows if len(window) > 1]
        reference_file = directory / "reference.npy"
        np.save(reference_file, np.concatenate([model.logits(window) for window in windows]))
    reference = np.load(reference_file, mmap_mode="r")
    expert_weights = sizes(exact)["expert_bytes"] // 4
    rows: list[Row] = []
    for name, (experts, dense) in OURS.items():
        if args.experts_only and ("embedding" in name or "dense" in name):
            continue  # what differs in these is not shown
        bundle = directory / "ours.edgert"
        options = {"dense_format": "f32"} if args.experts_only else dense
        convert(
            args.checkpoint, bundle, calibration=calibration, alignment=4096, expert_format=experts, **options
        )
        rows.append({"engine": "edgert", "name": name, **sizes(bundle), **run(bundle, windows, reference)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if args.gguf is not None:
        rows += peers(args, directory, importance(calibration), reference_file, windows)
        plain = next(row["bytes"] for row in rows if row["name"] == "F32") - 4 * expert_weights
        if args.experts_only:
            for row in rows:
                row.setdefault("expert_bytes", row["bytes"] - plain)
    for row in rows:
        if args.experts_only:
            row["bytes"] = row["expert_bytes"]
        if "expert_bytes" in row:
            row["expert_bits"] = 8 * row["expert_bytes"] / expert_weights
    return rows


def peers(
    args: argparse.Namespace,
    directory: Path,
    rows: dict[str, Any],
    reference: Path,
    windows: list[list[int]],
) -> list[Row]:
    np.savez(directory / "imatrix.npz", **rows)
    job = {
        "gguf": str(args.gguf), "imatrix": str(directory / "imatrix.npz"), "reference": str(reference),
        "windows": windows, "types": PEERS, "directory": str(directory),
        "experts_only": args.experts_only,
    }  # fmt: skip
    (directory / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("llama_quantise.py")
    done = subprocess.run(
        [args.peer, script, directory / "job.json"], check=True, stdout=subprocess.PIPE, text=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def markdown(rows: list[Row]) -> str:
    """Smallest first, so that the two lines can be read side by side."""
    lines = [
        "| | formats | bits of experts | MB | KL | perplexity | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["bytes"]):
        bits = f"{row['expert_bits']:.3f}" if "expert_bits" in row else ""
        lines.append(
            f"| {row['engine']} | {row['name']} | {bits} | {row['bytes'] / 1e6:.2f} | {row['kl']:.5f} "
            f"| {row['perplexity']:.3f} | {row['top1']:.1%} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    ink = "#7d8590"  # of middling brightness: the background is the page's
    style: dict[str, Any] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink
    )
    style |= {"svg.fonttype": "none", "svg.hashsalt": "edgert", "font.family": "sans-serif"}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(7.2, 4.4))
        for engine, colour in {"edgert": "#2f81f7", "llama.cpp": "#d9730d"}.items():
            points = sorted(
                (row["bytes"] / 1e6, row["kl"], row["name"])
                for row in rows
                if row["engine"] == engine and row["kl"] > 1e-4
            )
            axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], color=colour, label=engine)
            for x, y, name in points:
                axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6, color=ink)
        axes.set_yscale("log")
        axes.set_xlabel("MB")
        axes.set_ylabel("KL divergence to the f32 model, nats a token")
        axes.legend(frameon=False)
        axes.grid(alpha=0.2)
        figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="the checkpoint as an f32 GGUF, for llama.cpp")
    parser.add_argument("--peer", default=sys.executable, help="an interpreter with llama-cpp-python")
    parser.add_argument("--experts-only", action="store_true")
    parser.add_argument("--plot", type=Path, help="an SVG (needs matplotlib)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(args, Path(directory))
    if args.plot is not None:
        draw(rows, args.plot)
    print(json.dumps(rows, indent=1) if args.json else markdown(rows))


if __name__ == "__main__":
    main()
