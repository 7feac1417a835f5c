"""edgert bench: prefill and decode speed."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.controlled import add_control, control_bounds, controlled
from edgert.cli.options import Subparsers, add_json, add_knobs, add_model, find_model, knob_flags
from edgert.cli.run import describe, note_lossy
from edgert.cli.terminal import markdown_table, note, print_json, progress, say, table
from edgert.errors import InvalidArgumentError
from edgert.settings import Setting
from edgert.shapes import SHAPES
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.model import Model
    from edgert.roof import Bandwidths

_OPTIONS = (
    Setting("prompt_tokens", "int", "tokens of the prefill (128; cold 16)", None, 1, 2**31 - 1),
    Setting("decode_tokens", "int", "tokens of the decode (64)", None, 1, 2**31 - 1),
    Setting("repetitions", "int", "times that each is measured, after one that is not (5)", None, 1, 1000),
)
_FORMATS = ("dense_format", "expert_format", "embedding_format", "output_format")


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure speed",
        description="Measure prefill and decode of a bundle, or of a known model's shape in random weights. Speeds are "
        "medians; the spread is (largest - smallest) / median.",
    )
    add_model(parser)
    shape = parser.add_argument_group("shape", "random weights, written once to ~/.cache/edgert/shapes")
    shape.add_argument("--shape", metavar="NAME", help=", ".join(SHAPES))
    for name in _FORMATS:
        flag = "--" + name.replace("_", "-")
        shape.add_argument(flag, metavar="FORMAT", help=f"of the shape's {name.split('_')[0]} weights (int4)")
    for option in _OPTIONS:
        parser.add_argument(option.flag, metavar="N", help=option.help)
    parser.add_argument(
        "--routing",
        metavar="ROUTING",
        help="impose the experts of each position instead of asking the routers: uniform, or trace:FILE, JSON lines "
        '{"tok": n, "layers": [[expert ids], …]}',
    )
    parser.add_argument(
        "--drop-caches",
        action="store_true",
        help="before each repetition, drop the bundle from the page cache",
    )
    parser.add_argument(
        "--prefetch-gain",
        action="store_true",
        help="decode as often with and without reading ahead too, by turns",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="measure the time to the first token instead, loading included, each time with the bundle dropped from the page "
        "cache",
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    add_json(parser)
    add_knobs(parser)
    add_control(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    given = {option: getattr(args, option.name) for option in _OPTIONS}
    options = {
        option.name: option.check(value, option.flag) for option, value in given.items() if value is not None
    }
    report = {**(_cold if args.cold else _warm)(args, options, knob_flags(args)), "shape": args.shape}
    if args.json:
        print_json(report)
    else:
        rows = (_cold_rows if args.cold else _rows)(report)
        say((markdown_table if args.markdown else table)(rows, right=range(1, len(rows[0]))))
        say(("\n" if args.markdown else "") + _summary(report))
    return 0


def _warm(args: argparse.Namespace, options: dict[str, Any], knobs: dict[str, Any]) -> dict[str, Any]:
    import edgert
    from edgert.benchmark import DECODE_TOKENS, PROMPT_TOKENS, benchmark

    control_bounds(args)  # refused before anything is written or loaded
    path = _bundle(args, options, knobs, (PROMPT_TOKENS, DECODE_TOKENS))
    with edgert.load(path, **knobs) as model, controlled(model, args):
        note(describe(model))
        note_lossy(model)
        with progress("bench", "runs") as update:
            return benchmark(
                model,
                **options,
                routing=args.routing,
                bandwidths=_bandwidths(model),
                drop_caches=args.drop_caches,
                prefetch_gain=args.prefetch_gain,
                progress=update,
            )


def _cold(args: argparse.Namespace, options: dict[str, Any], knobs: dict[str, Any]) -> dict[str, Any]:
    from edgert.cold_start import PROMPT_TOKENS, cold_start

    if args.routing is not None or args.prefetch_gain or "decode_tokens" in options:
        raise InvalidArgumentError(
            "--cold: ends with the first token, of the routers' choice; --routing, --prefetch-gain and --decode-tokens "
            "do not go with it"
        )
    if control_bounds(args) is not None:
        raise InvalidArgumentError(
            "--cold: what begins is not controlled; --control auto does not go with it"
        )
    path = _bundle(args, options, knobs, (PROMPT_TOKENS, 0))
    with progress("bench", "starts") as update:
        return cold_start(path, knobs, **options, bandwidths=_bandwidths, progress=update)


def _bundle(
    args: argparse.Namespace, options: dict[str, Any], knobs: dict[str, Any], defaults: tuple[int, int]
) -> str | Path | None:
    """What is measured; `knobs` get the context that a shape needs. `defaults`: tokens of prompt and decode."""
    if args.shape is not None:
        return _shape(args, options, knobs, defaults)
    if any(getattr(args, name) is not None for name in _FORMATS):
        raise InvalidArgumentError("--shape: formats are those of a shape, and no shape was named")
    return find_model(args.model)


def _bandwidths(model: "Model") -> "Bandwidths | None":
    """Of this machine, if it has been measured with the storage that the bundle lies on."""
    from edgert.bundle import Bundle
    from edgert.machine import measured
    from edgert.plan import measured_speeds
    from edgert.roof import Footprint

    profile = measured()
    if profile is None or not profile.covers(model.path):
        return None
    speeds = measured_speeds(profile, threads=model.stats()["threads"])
    return speeds.limits(
        Footprint.of(Bundle.open(model.path).manifest).mean_expert_bytes, speeds.reads_in_flight
    )


def _shape(
    args: argparse.Namespace, options: dict[str, Any], knobs: dict[str, Any], defaults: tuple[int, int]
) -> Path:
    """What can be refused is, before gigabytes are written."""
    from edgert import routing
    from edgert.benchmark import lengths
    from edgert.loading import knob_values
    from edgert.shapes import shape_bundle, shape_recipe

    if args.model is not None:
        raise InvalidArgumentError(f"--shape: found the model {args.model} too; one of the two is measured")
    recipe = shape_recipe(args.shape)
    names = ("prompt_tokens", "decode_tokens")
    tokens = sum(options.get(name, default) for name, default in zip(names, defaults, strict=True))
    context = knob_values(knobs)["context"]
    if context is None:
        # Memory that the measurement does not need would be the experts' loss.
        context = knobs["context"] = tokens + 1
    if context != "auto":
        held = min(context, recipe["context_length"])
        # A cold start ends with the token that the prompt gives.
        lengths(held, *((tokens, 0) if args.cold else (options.get(name) for name in names)))
    if args.routing is not None:
        routing.imposed(args.routing, recipe, tokens)
    with progress(f"writing {args.shape}") as update:
        return shape_bundle(args.shape, **{name: getattr(args, name) for name in _FORMATS}, progress=update)


def _rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    head = (
        "PHASE",
        "TOKENS",
        "TOK/S",
        "SPREAD",
        "OF ROOF",
        "HITS",
        "READ A TOKEN",
        "SIMULATED",
        "WAITED A TOKEN",
    )
    compared = any(row.get("prefetch_gain") for row in report["results"])
    return [(*head, "P50", "P99/P50", *(("AHEAD OFF", "ON", "GAIN") if compared else ()))] + [
        (
            row["phase"],
            str(row["tokens"]),
            f"{row['tokens_per_s']:.1f}",
            f"{row['spread']:.1%}",
            f"{row['roof_fraction']:.1%}" if "roof_fraction" in row else "-",
            f"{row['hit_rate']:.1%}",
            format_bytes(row["bytes_read_per_token"]),
            format_bytes(row["simulated_bytes_per_token"]) if "simulated_bytes_per_token" in row else "-",
            f"{row['stall_s_per_token'] * 1000:.2f} ms",
            f"{row['token_ms_p50']:.1f} ms" if "token_ms_p50" in row else "-",
            f"{row['p99_over_p50']:.2f}" if "p99_over_p50" in row else "-",
            *(_gain(row.get("prefetch_gain")) if compared else ()),
        )
        for row in report["results"]
    ]


def _gain(found: dict[str, float] | None) -> tuple[str, str, str]:
    """Decode without and with reading ahead."""
    if found is None:
        return "-", "-", "-"
    return f"{found['off_tokens_per_s']:.1f}", f"{found['on_tokens_per_s']:.1f}", f"{found['gain']:+.1%}"


def _cold_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    head = (
        "PHASE",
        "TOKENS",
        "FIRST TOKEN",
        "SPREAD",
        "OF IT LOAD",
        "READ",
        "NEEDED",
        "IDEAL",
        "TIMES IDEAL",
    )
    return [head] + [
        (
            row["phase"],
            str(row["tokens"]),
            f"{row['first_token_s']:.3f} s",
            f"{row['spread']:.1%}",
            f"{row['load_s']:.3f} s",
            format_bytes(row["bytes_read"]),
            format_bytes(row["needed_bytes"]),
            f"{row['ideal_s']:.3f} s" if "ideal_s" in row else "-",
            f"{row['times_ideal']:.2f}" if "times_ideal" in row else "-",
        )
        for row in report["results"]
    ]


def _summary(report: dict[str, Any]) -> str:
    """What the figures are of."""
    lines = [
        f"{report['cpu']}, {report['threads']} threads ({report['isa']}), median of {report['results'][0]['repetitions']}",
        f"{report['model']}: {format_bytes(report['model_bytes'])}, {report['bits_per_weight']:.2f} bits a weight read",
        f"peak {format_bytes(report['peak_bytes'])} of {format_bytes(report['budget_bytes'])}",
    ]
    if report.get("expert_overlap") is not None:
        lines.append(
            f"routing: {report['routing']}; {report['expert_overlap']:.1%} of a token's experts were the last one's too, "
            f"{report['uniform_overlap']:.1%} if all were alike"
        )
    if simulated := report.get("eviction_simulated"):
        rates = ", ".join(f"{name} {row['hit_rate']:.1%}" for name, row in simulated.items())
        lines.append(f"eviction: {report['eviction']}; hits of the decode, simulated: {rates}")
    decode = report["results"][-1]
    if decode.get("prefetch_recall") is not None:
        precision = decode["prefetch_precision"]
        lines.append(
            f"prefetch: {report['prefetch']}; recall {decode['prefetch_recall']:.1%}, "
            f"precision {'-' if precision is None else f'{precision:.1%}'}, "
            f"{format_bytes(decode['prefetch_wasted_bytes_per_token'])} a token wasted, "
            f"on in {decode['prefetch_steps_on']:.0%} of the steps"
        )
    if modes := report["lossy"]:
        shown = ", ".join(f"{name} {share:g}" for name, share in modes.items())
        counts = (
            (
                f"; of a token's uses of experts {decode['experts_replaced_per_token']:.2f} replaced, "
                f"{decode['experts_skipped_per_token']:.2f} left out, "
                f"{decode['experts_low_precision_per_token']:.2f} in low precision"
            )
            if "experts_replaced_per_token" in decode
            else ""
        )
        lines.append(f"lossy: {shown}{counts}")
    return "\n".join(lines)
