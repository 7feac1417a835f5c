"""What each weight format costs a model: perplexity, KL divergence and top-1 agreement against the f32 bundle.

    python benchmarks/quality.py CHECKPOINT --text FILE [--json]

Converts the checkpoint once a row, evaluates the text, and prints a Markdown table. Needs the extra `convert`.
"""

import argparse
import json
import tempfile
from pathlib import Path

import edgert
from edgert.converters.convert import convert
from edgert.evaluate import evaluate

ROWS = {  # name: (dense, experts); embeddings and output head follow the dense format
    "f32": ("f32", "f32"),
    "bf16": ("bf16", "bf16"),
    "int8": ("int8", "int8"),
    "int8, experts int4": ("int8", "int4"),
    "int8, experts int3": ("int8", "int3"),
    "int8, experts int2": ("int8", "int2"),
    "int4": ("int4", "int4"),
}


def measure(checkpoint: Path, text: str, directory: Path) -> list[dict[str, object]]:
    """One row a format combination, the f32 bundle first: it is the reference of the others."""
    rows: list[dict[str, object]] = []
    reference: edgert.Model | None = None
    for name, (dense, experts) in ROWS.items():
        bundle = directory / f"{len(rows)}.edgert"
        report = convert(checkpoint, bundle, dense_format=dense, expert_format=experts)
        model = edgert.load(bundle)
        if reference is None:
            reference = edgert.load(bundle)
        result = evaluate(model, model.tokenizer.encode(text), reference=reference)
        rows.append(
            {
                "formats": name,
                "mib": round(report.bytes / 2**20, 1),
                "perplexity": round(result.perplexity, 4),
                "kl_mean": result.kl_mean,
                "top1_agreement": result.top1_agreement,
                "tokens": result.tokens,
            }
        )
    return rows


def markdown(rows: list[dict[str, object]]) -> str:
    """The rows as a table; perplexity also relative to the first row."""
    first = rows[0]["perplexity"]
    lines = ["| formats | MiB | perplexity | change | KL | top-1 |", "|---|---|---|---|---|---|"]
    for row in rows:
        change = f"{row['perplexity'] / first - 1:+.2%}"  # type: ignore[operator]
        lines.append(
            f"| {row['formats']} | {row['mib']} | {row['perplexity']:.3f} | {change} "
            f"| {row['kl_mean']:.5f} | {row['top1_agreement']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(arguments.checkpoint, arguments.text.read_text(), Path(directory))
    print(json.dumps(rows, indent=1) if arguments.json else markdown(rows))


if __name__ == "__main__":
    main()
