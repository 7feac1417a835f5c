"""Pages that show a run: one HTML file with drawings inside, which needs nothing else."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_WIDTH, _LEFT, _RIGHT = 900, 78, 16
_INK, _BAND, _LINE, _MARK = "#333", "#dcebdc", "#1f5fa8", "#c0392b"
_STYLE = "body{font:14px system-ui,sans-serif;color:#333;max-width:940px;margin:24px auto}svg{display:block;margin:6px 0 18px}text{font:12px system-ui,sans-serif;fill:#333}"


def decisions_page(title: str, settings: Mapping[str, Any], decisions: Sequence[Mapping[str, Any]]) -> str:
    """Signal and band, fast knob, slow knobs by window, slow moves marked; and how often each reason was given."""
    t = (
        [float(d["t"]) for d in decisions]
        if len({d["t"] for d in decisions}) > 1
        else list(range(len(decisions)))
    )
    moves = [i for i, d in enumerate(decisions) if d["action"] == "slow"]
    fast = settings["fast"]
    values = [float(d["value"]) for d in decisions]
    drawings = [
        ("events a second", _panel(t, values, moves, band=(settings["low"], settings["high"]), log=True)),
        (
            f"{fast.get('name') or 'fast'} ({fast['minimum']} to {fast['maximum']})",
            _panel(t, [d["fast"] for d in decisions], moves, height=110),
        ),
    ]
    for i, knob in enumerate(settings.get("slow", [])):
        drawings.append(
            (str(knob.get("name")), _panel(t, [d["slow"][i] for d in decisions], moves, height=80))
        )
    reasons: dict[str, int] = {}
    for d in decisions:
        reasons[d["reason"]] = reasons.get(d["reason"], 0) + 1
    inside = sum(settings["low"] <= v <= settings["high"] for v in values)
    facts = f"{len(decisions)} windows, {inside} in the band, {len(moves)} slow moves (red). Reasons: "
    facts += ", ".join(f"{name} {count}" for name, count in sorted(reasons.items(), key=lambda r: -r[1]))
    return page(title, [f"<p>{html.escape(facts)}.</p>"] + [_figure(*drawing) for drawing in drawings])


def matrix_page(title: str, facts: str, distance: Any) -> str:
    """Distances of queries (down) to references (across), dark where alike."""
    rows = _thinned(np.asarray(distance), 90)
    low, high = np.quantile(rows, [0.005, 0.5])
    shade = np.clip((rows - low) / (high - low + 1e-12), 0, 1)
    side = 540 / max(rows.shape)
    cells = [
        f'<rect x="{x * side:.1f}" y="{y * side:.1f}" width="{side + 0.3:.1f}" height="{side + 0.3:.1f}" '
        f'fill="rgb({g},{g},{g})"/>'
        for (y, x), g in np.ndenumerate((shade * 255).astype(int))
    ]
    size = f'width="{rows.shape[1] * side:.0f}" height="{rows.shape[0] * side:.0f}"'
    drawing = f'<svg {size} role="img">{"".join(cells)}</svg>'
    return page(
        title,
        [f"<p>{html.escape(facts)}</p>", _figure("queries down, references across; dark is alike", drawing)],
    )


def page(title: str, parts: Sequence[str]) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def _figure(caption: str, drawing: str) -> str:
    return f"<div><b>{html.escape(caption)}</b>{drawing}</div>"


def _panel(
    t: Sequence[float],
    values: Sequence[float],
    marks: Sequence[int],
    *,
    height: int = 200,
    band: tuple[float, float] | None = None,
    log: bool = False,
) -> str:
    """A line over time, gaps where a value is missing."""
    shown = [math.log10(max(v, 1.0)) if log and math.isfinite(v) else float(v) for v in values]
    edges = [math.log10(max(b, 1.0)) if log else b for b in band or ()]
    known = [v for v in [*shown, *edges] if math.isfinite(v)] or [0.0]
    low, high = min(known), max(known)
    pad = (high - low) * 0.08 or 1.0
    low, high = low - pad, high + pad
    first, last = (min(t), max(t)) if t else (0.0, 1.0)

    def x(at: float) -> float:
        return _LEFT + (at - first) / ((last - first) or 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return (high - value) / (high - low) * (height - 22) + 4

    parts = []
    if edges:
        top, bottom = y(edges[1]), y(edges[0])
        parts.append(
            f'<rect x="{_LEFT}" y="{top:.1f}" width="{_WIDTH - _LEFT - _RIGHT}" height="{bottom - top:.1f}" fill="{_BAND}"/>'
        )
    parts += [
        f'<line x1="{x(t[i]):.1f}" x2="{x(t[i]):.1f}" y1="4" y2="{height - 18}" stroke="{_MARK}" stroke-opacity=".5"/>'
        for i in marks
    ]
    for value in (low + pad, high - pad):
        label = f"{10**value:.3g}" if log else f"{value:g}"
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>')
    parts += [
        f'<text x="{x(t[i]):.1f}" y="{height - 4}" text-anchor="middle">{t[i]:.4g}</text>'
        for i in _ticks(len(t))
    ]
    for run in _runs(shown):
        points = " ".join(f"{x(t[i]):.1f},{y(shown[i]):.1f}" for i in run)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_LINE}" stroke-width="1.5"/>')
    return f'<svg width="{_WIDTH}" height="{height}" role="img">{"".join(parts)}</svg>'


def _ticks(n: int) -> list[int]:
    return sorted({0, n // 4, n // 2, 3 * n // 4, n - 1}) if n > 1 else []


def _runs(values: Sequence[float]) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for i, value in enumerate(values):
        if math.isfinite(value):
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(rows: Any, most: int) -> Any:
    return rows[:: -(-rows.shape[0] // most), :: -(-rows.shape[1] // most)]
