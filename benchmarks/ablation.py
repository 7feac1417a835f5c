"""The ladder of EdgeMoE's ablation: what each of its mechanisms adds, measured in turns in one run.

    python benchmarks/ablation.py docs-moe CHECKPOINT --calibration docs-moe.calibration --json result.json
    python benchmarks/ablation.py olmoe-1b-7b --trace run.jsonl --json result.json

The first converts the checkpoint into bundles of each expert format, with a routing profile from the calibration. The second
writes the shape in random weights, imposes the second half of the recorded run, and makes the profile's dictionary of the
first half; there a router's own foresight means nothing. Every rung has the memory in which --share of the int4 experts fit
beside everything else. `replay` is what a cache of whole experts by LRU, as peers have, would read on the same way, and
the roof that follows; docs/benchmarks.md explains the columns.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import limiter
import machine
import numpy as np
import peers

from edgert import _native, routing, settings
from edgert.bundle import Bundle
from edgert.calibration import Calibration
from edgert.converters.convert import convert
from edgert.converters.routing_profile import add_to_bundle, routing_profile
from edgert.shapes import SHAPES, shape_bundle
from edgert.tokenizer import tokenizer_of
from edgert.units import parse_bytes

QUANTISED = "int4"


@dataclass(frozen=True)
class Rung:
    name: str
    expert_format: str
    eviction: str
    prefetch: str


def ladder(base: str, prefetch: str) -> list[Rung]:
    return [
        Rung("on demand", base, "lru", "none"),
        Rung("quantised", QUANTISED, "lru", "none"),
        Rung("+ preload", QUANTISED, "lru", prefetch),
        Rung("+ eviction", QUANTISED, "forecast", "none"),
        Rung("all", QUANTISED, "forecast", prefetch),
        Rung("all, as EdgeMoE has it", QUANTISED, "edgemoe", "dictionary"),
    ]


@dataclass(frozen=True)
class Job:
    rungs: list[Rung]
    bundles: dict[str, Path]  # by expert format
    routing: list[str]  # arguments of edgert bench
    memory: int
    lengths: list[str]


def prepare(arguments: argparse.Namespace, directory: Path) -> Job:
    """All bundles, written where they are not there yet."""
    base = arguments.base_format or ("f16" if arguments.checkpoint else "int8")
    rungs = ladder(base, "auto" if arguments.checkpoint else "dictionary")
    directory.mkdir(parents=True, exist_ok=True)
    bundles = {}
    for name in dict.fromkeys(rung.expert_format for rung in rungs):
        bundles[name] = directory / f"{arguments.model}-{name}.edgert"
        if bundles[name].exists():
            continue
        if arguments.checkpoint:
            convert(
                arguments.checkpoint, bundles[name], expert_format=name, calibration=arguments.calibration
            )
        else:
            _linked(shape_bundle(arguments.model, expert_format=name), bundles[name])
    imposed = [] if arguments.checkpoint else _impose(arguments.trace, directory, list(bundles.values()))
    lengths = ["--prompt-tokens", arguments.prompt_tokens, "--decode-tokens", arguments.decode_tokens]
    context = arguments.prompt_tokens + arguments.decode_tokens + 1
    plan = _native.plan_memory(
        _native.Runtime(1 << 40, threads=arguments.threads), str(bundles[QUANTISED]), context=context
    )
    tokenizer = tokenizer_of(Bundle.open(bundles[QUANTISED]))
    memory = plan["resident_bytes"] - int((1 - arguments.share) * plan["expert_bytes"])
    memory += 0 if tokenizer is None else tokenizer.memory_bytes
    options = [*lengths, "--context", context, "--threads", arguments.threads]
    return Job(rungs, bundles, imposed, memory, [str(option) for option in options])


def _linked(source: Path, target: Path) -> None:
    """The same bundle under another name, which may be given a profile of its own."""
    target.mkdir()
    for file in source.iterdir():
        os.link(file, target / file.name)


def _impose(trace: Path, directory: Path, bundles: Sequence[Path]) -> list[str]:
    """Judged on the second half of a recorded run, by a dictionary of the first."""
    recipe = Bundle.open(bundles[0]).recipe
    layers = routing.moe_layers(recipe)
    table = routing.read_trace(trace, layers)
    half = len(table) // 2
    judged = directory / "judged.jsonl"
    routing.write_trace(judged, table[half:])
    profile = routing_profile(counted(table[:half], layers, recipe["hidden_size"]), [])
    for bundle in bundles:
        add_to_bundle(bundle, profile)
    return ["--routing", f"trace:{judged}"]


def counted(table: routing.Table, layers: Sequence[tuple[int, int]], hidden: int) -> Calibration:
    """What of a calibration a recorded routing tells."""
    used = [np.zeros((len(table), experts)) for experts, _ in layers]
    for token, rows in enumerate(table):
        for row, ids in enumerate(rows):
            used[row][token, ids] = 1

    def together(distance: int) -> list[Any]:
        return [None if m < distance else used[m - distance].T @ used[m] for m in range(len(used))]

    found = SimpleNamespace(
        model=SimpleNamespace(
            hidden_size=hidden, moe=[SimpleNamespace(num_experts=experts) for experts, _ in layers]
        ),
        tokens=len(table),
        expert_tokens=[counts.sum(0) for counts in used],
        co_activation=together(1),
        co_activation_2=together(2),
        router_moments=[np.ones(hidden, np.float32)] * len(used),
    )
    return cast(Calibration, found)


def measure(job: Job, rounds: int, disks: Sequence[int | None]) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, after each speed of the disk; rungs take turns."""
    rows: list[dict[str, Any]] = []
    for read in disks:
        found: dict[str, list[dict[str, Any]]] = {rung.name: [] for rung in job.rungs}
        files = [file for bundle in job.bundles.values() for file in bundle.glob("*.bin")]
        numbers = set() if read is None else {limiter.disk_number(file) for file in files}
        for index in range(rounds):
            for rung in job.rungs:
                command = [sys.executable, "-m", "edgert", "bench", str(job.bundles[rung.expert_format])]
                command += ["--json", "--repetitions", "1", "--memory", str(job.memory)]
                command += ["--eviction", rung.eviction, "--prefetch", rung.prefetch]
                report = peers.run(
                    [*command, *job.lengths, *job.routing],
                    limiter.Limits(None, read, frozenset(numbers)),
                    files,
                )
                found[rung.name].append(report)
                print(
                    f"round {index + 1}, {_disk(read)}, {rung.name}: {report['decode']['tokens_per_s']:.1f} tok/s",
                    file=sys.stderr,
                    flush=True,
                )
        rows += [row(rung, read, found[rung.name]) for rung in job.rungs]
        rows.append(replay(read, found["quantised"][0]))
        yield rows


def row(rung: Rung, read: int | None, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a rung's rounds."""
    decodes = [report["decode"] for report in reports]
    speeds = [decode["tokens_per_s"] for decode in decodes]
    speed = statistics.median(speeds)
    last = decodes[-1]
    return {
        "rung": rung.name,
        "expert_format": rung.expert_format,
        "eviction": rung.eviction,
        "prefetch": reports[-1]["prefetch"],
        "read_bytes_per_s": read,
        "tokens_per_s": speed,
        "spread": (max(speeds) - min(speeds)) / speed,
        "roof_tokens_per_s": _roof(
            last["simulated_bytes_per_token"], read, [decode.get("roof_tokens_per_s") for decode in decodes]
        ),
        **{
            name: last[name]
            for name in (
                "hit_rate",
                "prefetch_hit_rate",
                "prefetch_recall",
                "prefetch_precision",
                "prefetch_steps_on",
                "prefetch_wasted_bytes_per_token",
                "bytes_read_per_token",
                "stall_s_per_token",
            )
        },
    }


def replay(read: int | None, report: dict[str, Any]) -> dict[str, Any]:
    """A peer's LRU over the same experts, of the same bytes: what it reads, and how fast it could be at most."""
    lru = report["eviction_simulated"]["lru"]
    return {
        "rung": "replay of a peer's LRU",
        "read_bytes_per_s": read,
        "hit_rate": lru["hit_rate"],
        "bytes_read_per_token": lru["bytes_per_token"],
        "roof_tokens_per_s": _roof(lru["bytes_per_token"], read, [report["decode"].get("roof_tokens_per_s")]),
    }


def _roof(missed: float, read: int | None, measured: Sequence[float | None]) -> float | None:
    known = [roof for roof in measured if roof is not None]
    limits = [statistics.median(known)] if known else []
    if read is not None and missed:
        limits.append(read / missed)
    return min(limits) if limits else None


def markdown(report: dict[str, Any]) -> str:
    head = (
        "rung", "experts", "eviction", "prefetch", "disk", "tok/s", "spread", "roof", "hits", "hits ahead", "recall",
        "precision", "on", "MB read a token", "MB wasted", "ms waited",
    )  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for found in report["rows"]:

        def shown(name: str, pattern: str, factor: float = 1, found: dict[str, Any] = found) -> str:
            value = found.get(name)
            return "" if value is None else pattern.format(value * factor)

        lines.append(
            (
                found["rung"],
                *(found.get(name, "") for name in ("expert_format", "eviction", "prefetch")),
                _disk(found["read_bytes_per_s"]),
                shown("tokens_per_s", "{:.1f}"),
                shown("spread", "{:.1%}"),
                shown("roof_tokens_per_s", "{:.1f}"),
                shown("hit_rate", "{:.1%}"),
                shown("prefetch_hit_rate", "{:.1%}"),
                shown("prefetch_recall", "{:.1%}"),
                shown("prefetch_precision", "{:.1%}"),
                shown("prefetch_steps_on", "{:.0%}"),
                shown("bytes_read_per_token", "{:.2f}", 1e-6),
                shown("prefetch_wasted_bytes_per_token", "{:.2f}", 1e-6),
                shown("stall_s_per_token", "{:.2f}", 1e3),
            )
        )
    about = (
        f"{report['model']}, {report['share']:.0%} of the {QUANTISED} experts in memory; {report['machine']['cpu']}, "
        f"{report['threads']} threads; edgert {report['edgert']}; median of {report['rounds']}, {report['date']}"
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n" + about


def _disk(read: int | None) -> str:
    return "full" if read is None else f"{read / 1e6:.0f} MB/s"


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"a name for the checkpoint, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--calibration", type=Path, help="of the checkpoint")
    parser.add_argument("--trace", type=Path, help="recorded routing of the shape's model, JSON lines")
    parser.add_argument("--base-format", help="of the first rung's experts (f16; of a shape int8)")
    parser.add_argument("--share", type=float, default=0.25, help="of the int4 experts that fit into memory")
    parser.add_argument("--disk", type=parse_bytes, nargs="*", default=[300_000_000], help="held speeds")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=int(machine.describe()["cores"]))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    arguments = parser.parse_args(words)
    if (arguments.checkpoint is None) == (arguments.trace is None):
        parser.error("a checkpoint, or a shape's --trace")
    if arguments.checkpoint is not None and arguments.calibration is None:
        parser.error("a checkpoint needs its --calibration")
    return arguments


def main() -> None:
    arguments = arguments_of()
    job = prepare(arguments, settings.cache() / "ablation")
    report: dict[str, Any] = {
        "model": arguments.model,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "threads": arguments.threads,
        "edgert": version("edgert"),
        "rounds": arguments.rounds,
        "share": arguments.share,
        "memory_bytes": job.memory,
        "rows": [],
    }
    for report["rows"] in measure(job, arguments.rounds, [None, *arguments.disk]):
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))


if __name__ == "__main__":
    main()
