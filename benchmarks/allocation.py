"""What sharing bits out among experts gains: perplexity, KL and top-1 agreement at equal bytes, by method.

    python benchmarks/allocation.py CHECKPOINT --calibration-text FILE --text FILE [--bits 4.5 3.5 3.0 2.5] [--json FILE]

Calibrates the unquantised model on one text and measures every allocation on the other. The importance of an expert to the
paper's allocation is measured on the first --importance-tokens of the calibration's text. Needs the extra `convert`.
"""

import argparse
import dataclasses
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from edgert.calibrating import calibrate
from edgert.converters.allocation import EdgeMoe, Knapsack, Ladder, Uniform, largest_within
from edgert.converters.assets import read_assets
from edgert.converters.checkpoint import open_checkpoint
from edgert.converters.convert import convert
from edgert.converters.expert_errors import measure
from edgert.converters.formats import Defaults, candidates, choose_formats
from edgert.converters.layout import DEFAULT_ALIGNMENT, plan_layout
from edgert.converters.registry import read_decoder
from edgert.converters.trials import Trials, tokens_of
from edgert.errors import InvalidArgumentError


def rows_of(arguments: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """One row a number of bits and method; those that cannot be had say so."""
    checkpoint = open_checkpoint(arguments.checkpoint)
    decoder = read_decoder(checkpoint)
    assets = read_assets(checkpoint, decoder.recipe["vocab_size"]).files
    tied = decoder.recipe["output"]["tied"]
    formats = choose_formats(arguments.dense_format, None, None, None, None, Defaults(), tied=tied)
    text, calibration_text = arguments.text.read_text(), arguments.calibration_text.read_text()

    def trials(name: str, tokens: Any) -> Trials:
        (directory / name).mkdir()
        return Trials(directory / name, decoder, assets, formats, tokens, planned, threads=2)

    exact = directory / "exact.edgert"
    convert(arguments.checkpoint, exact, dense_format="bf16", expert_format="bf16")
    calibration = calibrate(exact, calibration_text, context=arguments.context)
    planned = partial(
        plan_layout, decoder, alignment=DEFAULT_ALIGNMENT, remainders=False, calibration=calibration
    )
    importance_tokens = tokens_of(calibration_text, assets)[: arguments.importance_tokens]
    with (
        trials("text", tokens_of(text, assets)) as measured,
        trials("importance", importance_tokens) as importance,
    ):
        table = measure(decoder, calibration, candidates(), [range(len(decoder.experts))], threads=2)
        ladders: dict[str, Ladder] = {
            "uniform": Uniform(table),
            "edgemoe": EdgeMoe(table, importance.loss),
            "knapsack": Knapsack(table),
        }
        rows = []
        for bits in arguments.bits:
            for method, ladder in ladders.items():
                row: dict[str, Any] = {"asked_bits": bits, "method": method}
                rows.append(row)
                try:
                    chosen = largest_within(ladder, int(bits * table.weights.sum() / 8))
                except InvalidArgumentError:
                    continue
                loss = measured.compare(measured.bundle(chosen.chosen))
                row |= {
                    "bits": chosen.bits,
                    "bytes": chosen.bytes,
                    "predicted": chosen.error,
                    "bound": chosen.bound,
                }
                row |= {**dataclasses.asdict(loss), "loss": loss.loss}
                if method == "uniform":
                    row["format"] = next(iter(chosen.chosen.values()))[0]
                print(markdown([row]).splitlines()[-1], flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| bits | allocation | bits taken | MB of experts | perplexity | KL | same first token | predicted error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row['method']} ({row['format']})" if "format" in row else row["method"]
        if "bits" not in row:
            lines.append(f"| {row['asked_bits']} | {name} | cannot | | | | | |")
            continue
        lines.append(
            f"| {row['asked_bits']} | {name} | {row['bits']:.3f} | {row['bytes'] / 1e6:.2f} | {row['loss']:+.2%} "
            f"| {row['kl']:.5f} | {row['top1_agreement']:.1%} | {row['predicted']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 3.5, 3.0, 2.5])
    parser.add_argument("--dense-format", help="of everything else (int8)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window of the calibration")
    parser.add_argument("--importance-tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = rows_of(arguments, Path(directory))
    print(markdown(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
