"""edgert plan: what a model would need and how fast it would be, before anything is downloaded or converted."""

import argparse
import dataclasses
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import Subparsers, add_json
from edgert.cli.terminal import note, print_json, say, table
from edgert.settings import Layers, cache, knobs
from edgert.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from edgert.footprint import Subject

FORMATS = ("dense_format", "expert_format", "embedding_format", "output_format")


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="what to expect of a model here, before converting it",
        description="Show what a model needs and how fast it would be on this machine at several memory budgets, for a prompt "
        "of 128 tokens and an answer of 64. Measure the machine first with `edgert devices probe`.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a bundle, a checkpoint's directory or just its config.json, a GGUF file, or a shape that `edgert bench --shape` knows",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", action="append", help="plan for this budget; may be repeated"
    )
    parser.add_argument(
        "--threads", metavar="N", help="threads that compute (the usable cores) [EDGERT_THREADS]"
    )
    parser.add_argument("--context", metavar="N", help="longest sequence, in tokens [EDGERT_CONTEXT]")
    parser.add_argument(
        "--device", metavar="NAME", help="plan for this device profile instead of this machine"
    )
    for name in FORMATS:
        kind = name.split("_")[0]
        parser.add_argument(
            "--" + name.replace("_", "-"), metavar="FORMAT", help=f"of the {kind} weights, as in convert"
        )
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from edgert.footprint import find

    subject = find(args.model, device=args.device, **{name: getattr(args, name) for name in FORMATS})
    value = _plan(args, subject)
    if args.json:
        print_json(value)
        return 0
    machine = value["machine"]
    if not machine["measured"] and args.device is None:
        note(
            f"edgert: note: this machine has not been measured, speeds are {machine['source']}; run `edgert devices probe`"
        )
    say(_text(subject, value))
    say("\n" + table(_rows(value["budgets"], machine["available_bytes"]), right=range(6)))
    say("\n" + (f"next: {value['next']}" if value["next"] else _too_large(value)))
    return 0


def _plan(args: argparse.Namespace, subject: "Subject") -> dict[str, Any]:
    """What --json prints."""
    from edgert import _native
    from edgert.devices import load_device
    from edgert.plan import CONTEXT, assumed_speeds, budget_ladder, expect_all, speeds_here

    layers, settings = Layers.read(), {setting.name: setting for setting in knobs()}
    threads = layers.value(settings["threads"], args.threads) or 0
    context = layers.value(settings["context"], args.context) or 0
    if subject.kind == "shape":
        context = context or CONTEXT  # as bench has it
    if args.device is None:
        speeds, available = (
            speeds_here(threads=threads),
            _native.Runtime(threads=1, io_threads=1).budget_bytes,
        )
    else:
        device = load_device(args.device)
        speeds = assumed_speeds(device, threads=threads)
        available = (device.memory.total_mib << 20) * 7 // 8  # the rest is for the rest of the machine
    sizes, needs = subject.sizes, subject.sizes.needs(threads=speeds.threads, context=context)
    smallest, resident = needs["minimum_bytes"], needs["resident_bytes"]
    asked = [parse_bytes(size, "--memory") for size in args.memory or ()]
    budgets = asked or budget_ladder(smallest, resident)
    expected = expect_all(sizes, speeds, budgets, context)
    memory = _budget_flag(args.memory or (), smallest, available)
    return {
        "model": sizes.name,
        "kind": subject.kind,
        "machine": {
            "source": speeds.source,
            "measured": speeds.measured,
            "threads": speeds.threads,
            "available_bytes": available,
        },
        "disk_bytes": sizes.disk_bytes,
        "checkpoint_bytes": sizes.checkpoint_bytes,
        "minimum_bytes": smallest,
        "resident_bytes": resident,
        "bits_per_weight": sizes.weights.bits_per_weight,
        "budgets": [
            {"memory_bytes": budget, "fits": row is not None}
            | ({} if row is None else dataclasses.asdict(row))
            for budget, row in zip(budgets, expected, strict=True)
        ],
        "next": None if memory is None else _next_command(args, subject, memory),
    }


def _budget_flag(given: Sequence[str], smallest: int, available: int) -> list[str] | None:
    """The largest budget that was asked for and works here; none, for all that is free; None where nothing works."""
    if not given:
        return [] if smallest <= available else None
    working = [size for size in given if smallest <= parse_bytes(size) <= available]
    return ["--memory", max(working, key=parse_bytes)] if working else None


def _next_command(args: argparse.Namespace, subject: "Subject", memory: list[str]) -> str:
    formats = [
        word
        for name in FORMATS
        if getattr(args, name) is not None
        for word in ("--" + name.replace("_", "-"), getattr(args, name))
    ]
    if subject.kind == "bundle":
        words = ["edgert", "run", args.model, *memory]
    elif subject.kind == "shape":
        words = ["edgert", "bench", "--shape", args.model, *formats, *memory]
    else:
        device = [] if args.device is None else ["--device", args.device]
        words = ["edgert", "convert", str(subject.path), f"{subject.sizes.name}.edgert", *formats, *device]
    return shlex.join(words)


def _text(subject: "Subject", value: dict[str, Any]) -> str:
    disk, machine = format_bytes(value["disk_bytes"]), value["machine"]
    if subject.kind != "bundle":
        # Where the next command writes.
        place = cache() if subject.kind == "shape" else Path.cwd()
        there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        disk += f" for the bundle, {format_bytes(free)} free"
    if subject.kind in ("checkpoint", "config"):
        state = "which is there" if subject.kind == "checkpoint" else "to be downloaded"
        disk += f"; the checkpoint {format_bytes(value['checkpoint_bytes'])}, {state}"
    rows = [
        ("model", f"{value['model']} ({subject.kind}), {value['bits_per_weight']:.2f} bits a weight read"),
        (
            "machine",
            f"{machine['source']}; {machine['threads']} threads, "
            f"{format_bytes(machine['available_bytes'])} of memory to spare",
        ),
        ("disk", disk),
        ("smallest budget", format_bytes(value["minimum_bytes"])),
        ("all in memory", format_bytes(value["resident_bytes"])),
    ]
    return table(rows)


def _rows(budgets: Sequence[dict[str, Any]], available: int) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("MEMORY", "PREFILL TOK/S", "DECODE TOK/S", "GAIN", "HITS", "READ A TOKEN", "LIMIT")
    ]
    before = None
    for row in budgets:
        memory = format_bytes(row["memory_bytes"])
        if not row["fits"]:
            rows.append((memory, "-", "-", "-", "-", "-", "too small"))
            continue
        decode = row["decode_tokens_per_s"]
        rows.append(
            (
                memory,
                _speed(row["prefill_tokens_per_s"]),
                _speed(decode),
                "" if before is None else f"x{decode / before:.2f}",
                f"{row['hit_rate']:.0%}",
                format_bytes(row["bytes_read_per_token"]),
                row["limit"] + ("" if row["memory_bytes"] <= available else "; more than there is"),
            )
        )
        before = decode
    return rows


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.{0 if tokens_per_s >= 100 else 1 if tokens_per_s >= 1 else 2}f}"


def _too_large(value: dict[str, Any]) -> str:
    smallest, available = value["minimum_bytes"], value["machine"]["available_bytes"]
    advice = "a budget between the two works"
    if smallest > available:
        advice = "smaller formats or a smaller --context need less"
    return (
        f"nothing asked for fits: the smallest budget is {format_bytes(smallest)}, and {format_bytes(available)} are "
        f"there; {advice}"
    )
