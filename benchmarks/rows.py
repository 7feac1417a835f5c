"""Rows of the side-by-side: peers measured in turns at one setting, their medians, and what was to be expected."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import machine
import peers
from peers import Job, PeerError

from edgert import plan
from edgert._native import knobs
from edgert.benchmark import drop_from_page_cache, percentiles
from edgert.cold_start import ideal
from edgert.errors import BudgetError
from edgert.footprint import find
from edgert.roof import Bandwidths, Work, roof

INTERPRETER_BYTES = 96 << 20  # of Python and its libraries, which edgert's --memory does not count
READS_IN_FLIGHT = next(int(knob["default"]) for knob in knobs() if knob["name"] == "io_threads")
PHASES = ("prefill", "decode")
_ABOUT = ("version", "features", "isa", "budget_bytes", "resident", "bits_per_weight", "expert_overlap")

Row = dict[str, Any]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """Memory as a share of llama.cpp's file, and bytes a second that are read; None: all there is."""

    share: float | None = None
    read: int | None = None

    def __str__(self) -> str:
        memory = "all memory" if self.share is None else f"{self.share:.0%} memory"
        return memory if self.read is None else f"{memory}, {self.read / 1e6:.0f} MB/s"


def warm(job: Job, setting: Setting, count: int, note: Note) -> list[Row]:
    """Prefill and decode, a row a peer. Raises limiter.NoLimiterError."""
    memory = None if setting.share is None else int(setting.share * job.gguf.stat().st_size)
    budget = None if memory is None else memory - INTERPRETER_BYTES
    held = peers.limits(job, memory, setting.read)
    found = _in_turns(
        peers.warm(job, memory, budget),
        lambda command: peers.run(command, held, job.files),
        lambda: speeds(job, setting),
        count,
        lambda line: note(f"{setting}, {line}"),
    )
    return _rows(found, setting, lambda reports: warm_row(job, reports))


def cold(job: Job, setting: Setting, count: int, note: Note) -> list[Row]:
    """Cold starts, a row a peer. Raises limiter.NoLimiterError."""
    held = peers.limits(job, None, setting.read)

    def measure(command: peers.Command) -> dict[str, Any]:
        drop_from_page_cache(job.files)
        return peers.run(command, held, job.files)

    found = _in_turns(
        peers.cold(job),
        measure,
        lambda: speeds(job, setting),
        count,
        lambda line: note(f"cold, {setting}, {line}"),
    )
    return _rows(found, setting, cold_row)


def _rows(
    found: Mapping[str, dict[str, Any]],
    setting: Setting,
    row: Callable[[Sequence[Mapping[str, Any]]], Row],
) -> list[Row]:
    """A row a peer: where it was measured, and what `row` makes of its reports or how it failed."""
    return [
        {
            "peer": peer,
            "share": setting.share,
            "read_bytes_per_s": setting.read,
            **(outcome if "failed" in outcome else row(outcome["reports"])),
        }
        for peer, outcome in found.items()
    ]


def _in_turns(
    commands: Mapping[str, peers.Command],
    measure: Callable[[peers.Command], dict[str, Any]],
    speeds_now: Callable[[], Bandwidths],
    count: int,
    note: Note,
) -> dict[str, dict[str, Any]]:
    """A peer's reports, or how it failed; one that fails is not asked again. Before each of edgert's the machine's speeds
    are measured."""
    found: dict[str, dict[str, Any]] = {peer: {"reports": []} for peer in commands}
    for index in range(count):
        for peer, command in commands.items():
            if "failed" in found[peer]:
                continue
            speeds = speeds_now() if peer == "edgert" else None
            others = machine.Others()
            try:
                report = measure(command)
            except PeerError as error:
                found[peer] = {"failed": str(error)}
                note(f"{peer}: {error}")
                continue
            report["others_busy"] = others.processors()
            if speeds is not None:
                report["speeds"] = speeds
            found[peer]["reports"].append(report)
            note(f"round {index + 1} of {count}: {peer} {_in_short(report)}")
    return found


def _in_short(report: Mapping[str, Any]) -> str:
    if "first_token_s" in report:
        return f"{report['first_token_s']:.3f} s"
    return ", ".join(f"{phase} {report[phase]['tokens_per_s']:.2f}" for phase in PHASES) + " tok/s"


def speeds(job: Job, setting: Setting) -> Bandwidths:
    """Of the machine now, with the disk as it is held."""
    experts = max(job.bundle.glob("experts*.bin"), key=lambda file: file.stat().st_size)
    sizes = find(job.shape).sizes.weights
    found = machine.speeds(experts, int(sizes.mean_expert_bytes), job.threads, READS_IN_FLIGHT)
    if setting.read is None:
        return found
    return dataclasses.replace(found, storage_bytes_per_s=min(found.storage_bytes_per_s, setting.read))


def warm_row(job: Job, reports: Sequence[Mapping[str, Any]]) -> Row:
    """The medians of one peer's rounds; times of single tokens are of all rounds."""
    result = _common(reports)
    for phase in PHASES:
        phases = [report[phase] for report in reports]
        result[phase] = _median(phases, "tokens_per_s")
        for name in ("bytes_read_per_token", "simulated_bytes_per_token"):
            if name in phases[0]:
                result[phase][name] = statistics.median(row[name] for row in phases)
        if "speeds" in reports[0]:
            roofs = [roof(Work(**report[phase]["work"]), report["speeds"]) for report in reports]
            shares = [row["tokens_per_s"] / limit for row, limit in zip(phases, roofs, strict=True)]
            result[phase] |= {
                "roof_tokens_per_s": statistics.median(roofs),
                "roof_fraction": statistics.median(shares),
            }
    result["decode"].update(percentiles([ms for report in reports for ms in report["decode"]["token_ms"]]))
    if "speeds" in reports[0]:
        for phase, planned in planned_speeds(job, reports).items():
            speed = result[phase]["tokens_per_s"]
            result[phase] |= {"plan_tokens_per_s": planned, "plan_deviation": planned / speed - 1}
    return result


def cold_row(reports: Sequence[Mapping[str, Any]]) -> Row:
    result = _common(reports) | _median(reports, "first_token_s")
    for name in ("load_s", "bytes_read", "needed_bytes"):
        if name in reports[0]:
            result[name] = statistics.median(report[name] for report in reports)
    if "speeds" in reports[0]:
        ideals = [ideal(report, report["speeds"]) for report in reports]
        for name in ("ideal_s", "times_ideal"):
            result[name] = statistics.median(row[name] for row in ideals)
    return result


def _common(reports: Sequence[Mapping[str, Any]]) -> Row:
    return {
        "rounds": len(reports),
        "others_busy": [report["others_busy"] for report in reports],
        "about": {name: reports[0][name] for name in _ABOUT if name in reports[0]},
        "speeds": [dataclasses.asdict(report["speeds"]) for report in reports if "speeds" in report],
    }


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> Row:
    values = [row[name] for row in rows]
    median = statistics.median(values)
    return {name: median, "spread": (max(values) - min(values)) / median}


def planned_speeds(job: Job, reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What `edgert plan` says of these runs on a machine with the median of the rounds' speeds, tokens a second; nothing for
    a budget that it refuses."""
    found = [dataclasses.astuple(report["speeds"]) for report in reports]
    memory, storage, int8 = (statistics.median(values) for values in zip(*found, strict=True))
    speeds = plan.Speeds(
        "the rounds", True, job.threads, READS_IN_FLIGHT, memory, int8, lambda size, depth: storage
    )
    lengths = plan.Run(job.prompt_tokens, job.decode_tokens)
    context = job.prompt_tokens + job.decode_tokens + 1
    try:
        expected = plan.expect(find(job.shape).sizes, speeds, reports[0]["budget_bytes"], context, lengths)
    except BudgetError:
        return {}
    return {"prefill": expected.prefill_tokens_per_s, "decode": expected.decode_tokens_per_s}
