"""Pages of drawings: one HTML file, SVG inside, which needs nothing else."""

import html
import math
from collections.abc import Sequence

_WIDTH, _LEFT, _RIGHT = 900, 78, 16
_BAND, _LINE, _PALE, _MARK = "#dcebdc", "#1f5fa8", "#9dbbdd", "#c0392b"
_STYLE = "body{font:14px system-ui,sans-serif;color:#333;max-width:940px;margin:24px auto}svg{display:block;margin:6px 0 18px}text{font:12px system-ui,sans-serif;fill:#333}td,th{padding:2px 12px 2px 0;text-align:left;vertical-align:top}"


def page(title: str, parts: Sequence[str]) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def figure(caption: str, drawing: str) -> str:
    return f"<div><b>{html.escape(caption)}</b>{drawing}</div>"


def panel(
    t: Sequence[float],
    values: Sequence[float],
    marks: Sequence[int],
    *,
    height: int = 200,
    band: tuple[float, float] | None = None,
    log: bool = False,
    second: Sequence[float] = (),
) -> str:
    """A line over time, gaps where a value is missing; `second` is drawn paler."""
    shown, paler = (
        [math.log10(max(v, 1.0)) if log and math.isfinite(v) else float(v) for v in series]
        for series in (values, second)
    )
    edges = [math.log10(max(b, 1.0)) if log else b for b in band or ()]
    known = [v for v in [*shown, *paler, *edges] if math.isfinite(v)] or [0.0]
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
        label = f"{10**value:.3g}" if log else f"{value:.4g}"
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>')
    parts += [
        f'<text x="{x(t[i]):.1f}" y="{height - 4}" text-anchor="middle">{t[i]:.4g}</text>'
        for i in _ticks(len(t))
    ]
    for series, colour in ((paler, _PALE), (shown, _LINE)):
        for run in _runs(series):
            points = " ".join(f"{x(t[i]):.1f},{y(series[i]):.1f}" for i in run)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
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


def heat_map(rows: Sequence[Sequence[float]], labels: Sequence[str], t: Sequence[float]) -> str:
    """A row a label, a column a moment; values from 0 (pale) to 1 (dark)."""
    columns = len(rows[0]) if rows else 0
    high, wide = max(6.0, min(18.0, 360 / max(1, len(rows)))), (_WIDTH - _LEFT - _RIGHT) / max(1, columns)
    parts = []
    every = max(1, math.ceil(14 / high))
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = 4 + index * high
        if index % every == 0:
            parts.append(
                f'<text x="{_LEFT - 6}" y="{top + high - 2:.1f}" text-anchor="end">{html.escape(label)}</text>'
            )
        parts += [
            f'<rect x="{_LEFT + column * wide:.1f}" y="{top:.1f}" width="{wide + 0.3:.1f}" height="{high + 0.3:.1f}" '
            f'fill="rgb({round(240 - 209 * value)},{round(244 - 149 * value)},{round(248 - 80 * value)})"/>'
            for column, value in enumerate(row)
        ]
    bottom = 4 + len(rows) * high
    parts += [
        f'<text x="{_LEFT + (i + 0.5) * wide:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{t[i]:.4g}</text>'
        for i in _ticks(columns)
    ]
    return f'<svg width="{_WIDTH}" height="{bottom + 18:.0f}" role="img">{"".join(parts)}</svg>'
