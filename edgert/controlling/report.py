"""A page that shows a control record: what was sensed, what the knobs did, which experts were in memory."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgert.controlling.record import Line, read
from edgert.drawing import figure, heat_map, page, panel
from edgert.units import format_bytes

_MIB = 1 << 20
_MOST_COLUMNS, _MOST_EVENTS = 240, 60


def report_page(path: str | Path) -> str:
    """HTML in one file. NotFoundError, CorruptError as record.read()."""
    head, lines = read(path)
    every = list(lines)
    windows = [line for line in every if line.get("kind") == "window"]
    about, settings = head.get("about", {}), head["settings"]
    title = f"{about.get('model', 'model')} under control"
    if not windows:
        return page(title, ["<p>The record holds no window.</p>"])
    start = windows[0]["t"]
    t = [line["t"] - start for line in windows]
    marks = [index for index, line in enumerate(windows) if _moves(line)]
    parts = [f"<p>{html.escape(_facts(about, settings, every, windows))}</p>"]
    parts += [figure(caption, drawing) for caption, drawing in _panels(t, windows, settings["bounds"], marks)]
    parts.append(figure("experts in memory, by layer", _store(t, windows, about.get("layers", []))))
    parts.append(_events(every, start))
    return page(title, parts)


def _facts(
    about: Mapping[str, Any], settings: Mapping[str, Any], every: list[Line], windows: list[Line]
) -> str:
    tokens = sum(line["signals"]["tokens"] for line in windows)
    seconds = windows[-1]["t"] - windows[0]["t"]
    bound = settings["bounds"]["token_time_high_ms"]
    over = sum((line["signals"]["p95_ms"] or 0) > bound for line in windows)
    moves = sum(bool(_moves(line)) for line in every)
    return (
        f"{len(windows)} windows in {seconds:.1f} s, {tokens} tokens; the slowest twentieth of a window's tokens took longer "
        f"than {bound:g} ms in {over} windows; knobs moved {moves} times (red); budget "
        f"{format_bytes(about.get('budget_bytes', 0))}, law {settings.get('law', '')}."
    )


def _panels(
    t: list[float], windows: list[Line], bounds: Mapping[str, Any], marks: list[int]
) -> list[tuple[str, str]]:
    def series(*names: str, scale: float = 1.0) -> list[float]:
        found = []
        for line in windows:
            value: Any = line
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            found.append(math.nan if value is None else value * scale)
        return found

    def a_token(name: str, scale: float = 1.0) -> list[float]:
        return [
            line["counted"][name] * scale / line["signals"]["tokens"]
            if line["signals"]["tokens"]
            else math.nan
            for line in windows
        ]

    times = series("signals", "p95_ms")
    slowest = max((value for value in times if math.isfinite(value)), default=1.0)
    seconds = bounds["window_ms"] / 1000
    drawn = [
        (
            "time of a token, ms: 95th percentile (dark), median (pale), within the bound (green)",
            panel(
                t, series("signals", "p95_ms"), marks, second=series("signals", "p50_ms"),
                band=(0.0, min(bounds["token_time_high_ms"], 2 * slowest)),
            ),
        ),
        (
            "expert slots, MiB: capacity (dark), in use (pale)",
            panel(t, series("knobs", "expert_memory", scale=1 / _MIB), marks,
                  second=series("counted", "slot_bytes", scale=1 / _MIB), height=120),
        ),
        ("memory that is available, MiB", panel(t, series("available_bytes", scale=1 / _MIB), marks, height=110)),
        ("misses a token", panel(t, a_token("expert_misses"), marks, height=110)),
        ("waited for storage, ms a token", panel(t, a_token("stall_s", 1000), marks, height=110)),
        ("read, MB/s", panel(t, series("counted", "bytes_read", scale=1e-6 / seconds), marks, height=110)),
        ("threads", panel(t, series("knobs", "threads"), marks, height=80)),
        ("least time from token to token, ms", panel(t, series("knobs", "token_interval_ms"), marks, height=80)),
        (
            "temperature, degrees Celsius",
            panel(t, series("signals", "temperature"), marks, height=110,
                  band=(bounds["temperature_low_celsius"], bounds["temperature_high_celsius"])),
        ),
        ("share of time in which tasks waited for memory (dark) and for the processor (pale)",
         panel(t, series("signals", "memory_pressure"), marks, second=series("signals", "cpu_pressure"), height=110)),
    ]  # fmt: skip
    without = {"temperature, degrees Celsius"} if not any(
        line["signals"]["temperature"] is not None for line in windows
    ) else set()  # fmt: skip
    return [(caption, drawing) for caption, drawing in drawn if caption not in without]


def _store(t: list[float], windows: list[Line], sizes: Sequence[int]) -> str:
    step = -(-len(windows) // _MOST_COLUMNS)
    shown = windows[::step]
    rows = [
        [line["resident"][layer] / size if size else 0.0 for line in shown]
        for layer, size in enumerate(sizes)
    ]
    return heat_map(rows, [f"layer {index}" for index in range(len(sizes))], t[::step])


def _moves(line: Line) -> list[str]:
    """What the laws did, in words; empty where nothing moved."""
    return [
        f"{name}: {made['action']} {'opened' if made['direction'] > 0 else 'tightened'} ({made['reason']})"
        for name, made in line["decisions"].items()
        if made["action"] != "hold"
    ]


def _events(every: list[Line], start: float) -> str:
    rows = [(line["t"] - start, "; ".join(moves), line) for line in every if (moves := _moves(line))]
    cells = "".join(
        f"<tr><td>{t:.2f} s</td><td>{html.escape(words)}</td><td>{format_bytes(line['knobs']['expert_memory'])}, "
        f"{line['knobs']['threads']} threads, {line['knobs']['token_interval_ms']:g} ms</td></tr>"
        for t, words, line in rows[:_MOST_EVENTS]
    )
    more = f"<p>and {len(rows) - _MOST_EVENTS} more</p>" if len(rows) > _MOST_EVENTS else ""
    return f"<h2>Moves</h2><table><tr><th>at</th><th>law</th><th>knobs from then on</th></tr>{cells}</table>{more}"
