"""edgert convert: a checkpoint into a device bundle."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import Subparsers, add_json, add_ray, cluster_of
from edgert.cli.run import read_text
from edgert.cli.terminal import note, print_json, progress, say, table
from edgert.conversion_report import check_report_names, write_report
from edgert.errors import InvalidArgumentError
from edgert.settings import Layers, knobs
from edgert.units import format_bytes, parse_bytes, parse_share

if TYPE_CHECKING:
    from edgert.converters.component import ComponentReport
    from edgert.converters.convert import ConversionReport
    from edgert.converters.expert_bits import ExpertBitsReport

_MAX_TEXT_BYTES = 256 << 20


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "convert",
        help="make a bundle of a checkpoint",
        description="Make a device bundle of a Hugging Face checkpoint or a GGUF file. An existing bundle is replaced when the new one is "
        "complete.",
    )
    parser.add_argument(
        "source",
        metavar="CHECKPOINT",
        type=Path,
        help="a directory with config.json and safetensors, or one with an ONNX encoder",
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the bundle to write, NAME.edgert")
    add_formats(parser)
    parser.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="write what was done and lost: a page with plots (.html) or all figures (.json); repeatable",
    )
    add_ray(parser, "pack")
    add_json(parser)
    return parser


def add_formats(parser: argparse.ArgumentParser) -> None:
    """What a conversion can be told."""
    parser.add_argument(
        "--device", metavar="NAME", help="profile that gives the defaults (see `edgert devices`)"
    )
    parser.add_argument(
        "--dense-format",
        metavar="FORMAT",
        help="of all weights but experts (as stored where that is quantised, else int8)",
    )
    parser.add_argument(
        "--expert-format",
        metavar="FORMAT",
        help="of the experts (as stored where that is quantised, else int4)",
    )
    parser.add_argument(
        "--expert-formats",
        metavar="FILE",
        type=Path,
        help='JSON: {"LAYER.EXPERT": FORMAT, …}, either may be *',
    )
    parser.add_argument("--embedding-format", metavar="FORMAT", help="of the input embeddings (as dense)")
    parser.add_argument("--output-format", metavar="FORMAT", help="of the output head (as dense)")
    parser.add_argument(
        "--alignment", metavar="SIZE", help="of extents: a power of two from 4KiB to 1MiB (16KiB)"
    )
    parser.add_argument(
        "--remainders", action="store_true", help="keep the rounding remainders, which adapters need"
    )
    parser.add_argument(
        "--split-experts",
        action="store_true",
        help="store each expert as a base and what makes it whole, for --low-precision-misses",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="of this model, by `edgert calibrate`: what matters in it",
    )
    parser.add_argument(
        "--expert-bits",
        metavar="BITS",
        help="choose a format for every expert: bits a weight on the mean, scales included",
    )
    parser.add_argument(
        "--max-loss",
        metavar="SHARE",
        help="the same, with the fewest bits that keep perplexity on --text within 2%%, say, of the unquantised model's",
    )
    parser.add_argument(
        "--allocation",
        metavar="METHOD",
        help="how they are chosen: knapsack (least predicted error), uniform or edgemoe (knapsack)",
    )
    parser.add_argument(
        "--expert-candidates",
        metavar="FORMATS",
        help="what they are chosen among: int2,int4 (all that there are)",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        help="measure on this UTF-8 text what the model loses; not the calibration's",
    )
    parser.add_argument(
        "--backend", metavar="NAME", help="llama.cpp: keep a GGUF file as it is, for that engine to run"
    )
    parser.add_argument("--threads", metavar="N", help="threads that pack [EDGERT_THREADS]")


def conversion_options(args: argparse.Namespace) -> dict[str, Any]:
    """What add_formats() has read, for convert()."""
    threads = next(setting for setting in knobs() if setting.name == "threads")
    return {
        "device": args.device,
        "dense_format": args.dense_format,
        "expert_format": args.expert_format,
        "expert_formats": None if args.expert_formats is None else _formats(args.expert_formats),
        "embedding_format": args.embedding_format,
        "output_format": args.output_format,
        "alignment": None if args.alignment is None else parse_bytes(args.alignment, "--alignment"),
        "remainders": args.remainders,
        "split_experts": args.split_experts,
        "calibration": args.calibration,
        "expert_bits": None if args.expert_bits is None else _bits(args.expert_bits),
        "max_loss": None if args.max_loss is None else parse_share(args.max_loss, "--max-loss"),
        "allocation": args.allocation,
        "expert_candidates": None if args.expert_candidates is None else args.expert_candidates.split(","),
        "text": None if args.text is None else read_text(args.text, _MAX_TEXT_BYTES),
        "backend": args.backend,
        "threads": Layers.read().value(threads, args.threads) or 0,
    }


def run(args: argparse.Namespace) -> int:
    from edgert.converters.source import convert_source

    check_report_names(args.report)
    with progress("convert") as update, cluster_of(args) as cluster:
        report = convert_source(
            args.source,
            args.output,
            progress=update,
            stage=_tell,
            cluster=cluster,
            **conversion_options(args),
        )
    for path in args.report:
        write_report(report, path)
    if args.json:
        print_json({**dataclasses.asdict(report), "path": str(report.path)})
        return 0
    for line in report.notes:
        note(f"edgert: note: {line}")
    say(describe(report))
    return 0


def describe(report: "ConversionReport | ComponentReport") -> str:
    """What was written, for people."""
    from edgert.converters.component import ComponentReport

    if isinstance(report, ComponentReport):
        return f"{report.path}: {report.kind}, {report.architecture}, {format_bytes(report.bytes)}"
    return _text(report)


def _tell(stage: str) -> None:
    note(f"edgert: {stage}")


def _bits(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidArgumentError(
            f"--expert-bits: found {text!r:.60}, allowed is a number such as 3.5"
        ) from None


def _formats(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{path}: found {type(value).__name__}, allowed is an object")
    return value


def _text(report: "ConversionReport") -> str:
    shown = report.weights // 1000  # norms and biases are not worth a line
    rows = [("TENSORS", "FORMAT", "WEIGHTS", "RELATIVE ERROR")]
    rows += [
        (row["kind"], row["format"], f"{row['weights']:,}", f"{row['relative_error']:.2%}")
        for row in report.quantization["tensors"]
        if row["weights"] > shown
    ]
    lines = [table(rows, right=(2, 3)), ""]
    if report.expert_bits is not None:
        lines += [_expert_text(report.expert_bits), ""]
    if report.loss is not None:
        lines += [
            f"against the unquantised model, {report.loss.tokens} tokens: perplexity {report.loss.perplexity:.4f} "
            f"({report.loss.loss:+.2%}), KL {report.loss.kl:.6f} nats a token, same first token "
            f"{report.loss.top1_agreement:.2%}"
        ]
    lines += [
        f"{report.path}: {report.architecture}, {format_bytes(report.bytes)} of {format_bytes(report.source_bytes)}, "
        f"{report.num_experts} experts in {format_bytes(report.expert_bytes)}"
    ]
    return "\n".join(lines)


def _expert_text(report: "ExpertBitsReport") -> str:
    """Bits by layer."""
    rows = [("LAYER", "EXPERTS", "BITS A WEIGHT", "LEAST", "MOST", "PREDICTED ERROR")]
    for layer, experts in report.by_layer().items():
        bits = [expert.bits for expert in experts]
        rows.append(
            (
                str(layer),
                str(len(experts)),
                f"{sum(bits) / len(bits):.2f}",
                f"{min(bits):.2f}",
                f"{max(bits):.2f}",
                f"{sum(expert.error for expert in experts):.4g}",
            )
        )
    unused = sum(expert.tokens == 0 for expert in report.experts)
    lines = [
        table(rows, right=range(6)),
        "",
        f"{report.method}: {report.bits:.3f} bits a weight of the experts, predicted error {report.error:.4g}",
    ]
    if report.bound:
        lines[-1] += (
            f" (the least possible: {'proven' if report.error <= report.bound * (1 + 1e-9) else f'above {report.bound:.4g}'})"
        )
    if unused:
        lines.append(f"{unused} experts were used by no token of the calibration: they count as rare")
    return "\n".join(lines)
