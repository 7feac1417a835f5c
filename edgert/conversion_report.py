"""The report of a conversion as a file: all figures in JSON, or a page with plots that needs nothing but itself."""

import dataclasses
import html
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.errors import InvalidArgumentError, StorageError
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.converters.component import ComponentReport
    from edgert.converters.convert import ConversionReport
    from edgert.converters.expert_bits import ExpertBitsReport, ExpertRow

_SUFFIXES = (".html", ".json")
_WIDTH = 960  # of plots, in the units of their drawing
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1e; --soft: #5d6468; --line: #d5dadd; --paper: #fff; --one: #2a6f97; --two: #c8553d }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7e9; --soft: #9aa3a8; --line: #3a4145; --paper: #16191b;
  --one: #6ab0d8; --two: #ef8a72 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2.2rem } p { color: var(--soft) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1rem; margin: 1.5rem 0 }
.figures div { border-top: 2px solid var(--one); padding-top: .4rem; color: var(--soft); font-size: .85rem }
.figures b { display: block; font-size: 1.45rem; font-weight: 600; color: var(--ink) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } th, td { padding: .25rem .6rem;
  border-bottom: 1px solid var(--line); text-align: right } th { color: var(--soft); font-weight: 500 }
th.name, td.name { text-align: left } td { white-space: nowrap } td:last-child { white-space: normal } svg { width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif;
  fill: var(--soft) } .axis { stroke: var(--line) } .wide { overflow-x: auto }
"""


def check_report_names(paths: Sequence[Path]) -> None:
    """Raises InvalidArgumentError before any work is done for a file that would not be written."""
    for path in paths:
        if path.suffix not in _SUFFIXES:
            raise InvalidArgumentError(f"--report: {path}: its name ends in {' or '.join(_SUFFIXES)}")
        if not path.parent.is_dir():
            raise InvalidArgumentError(f"--report: {path.parent}: no such directory")


def write_report(report: "ConversionReport | ComponentReport", path: Path) -> None:
    """Raises StorageError."""
    text = json.dumps(as_json(report), indent=1) + "\n" if path.suffix == ".json" else page(report)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def as_json(report: "ConversionReport | ComponentReport") -> dict[str, Any]:
    """Everything that is known, ready for JSON."""
    value = {**dataclasses.asdict(report), "path": str(report.path)}
    if value.get("loss"):
        value["loss"]["loss"] = report.loss.loss  # type: ignore[union-attr]
    return value


def page(report: "ConversionReport | ComponentReport") -> str:
    """HTML."""
    from edgert.converters.component import ComponentReport

    title = html.escape(report.path.name)
    parts = [f"<h1>{title}</h1><p>{html.escape(report.architecture)}, bundle {report.bundle_id}</p>"]
    if isinstance(report, ComponentReport):
        parts.append(f"<p>{html.escape(report.kind)}, {format_bytes(report.bytes)}, as it came</p>")
    else:
        parts += [_figures(report), _tensors(report)]
        if report.expert_bits is not None:
            parts += _experts(report.expert_bits)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


def _figures(report: "ConversionReport") -> str:
    figures = [
        (format_bytes(report.bytes), f"of {format_bytes(report.source_bytes)} in the checkpoint"),
        (format_bytes(report.expert_bytes), f"in {report.num_experts} experts"),
    ]
    if report.expert_bits is not None:
        figures.append((f"{report.expert_bits.bits:.3f}", "bits a weight of the experts, scales included"))
    if report.loss is not None:
        loss = report.loss
        figures += [
            (
                f"{loss.loss:+.2%}",
                f"perplexity: {loss.perplexity:.3f}, unquantised {loss.reference_perplexity:.3f}",
            ),
            (f"{loss.kl:.4f}", "KL to the unquantised model, nats a token"),
            (f"{loss.top1_agreement:.1%}", f"same first token, of {loss.tokens}"),
        ]
    return '<div class="figures">' + "".join(f"<div><b>{b}</b>{text}</div>" for b, text in figures) + "</div>"


def _tensors(report: "ConversionReport") -> str:
    rows = [("tensors", "format", "weights", "relative error of the weights", "largest error")]
    rows += [
        (
            row["kind"],
            row["format"],
            f"{row['weights']:,}",
            f"{row['relative_error']:.3%}",
            f"{row['largest_error']:.3g}",
        )
        for row in report.quantization["tensors"]
    ]
    return f"<h2>Tensors</h2>{_table(rows, names=2)}"


def _experts(report: "ExpertBitsReport") -> list[str]:
    layers = report.by_layer()
    unused = sum(row.tokens == 0 for row in report.experts)
    proof = "no method to prove it the least" if not report.bound else f"proven bound {report.bound:.4g}"
    parts = [
        "<h2>Bits by layer and expert</h2>"
        f"<p>{html.escape(report.method)} among {html.escape(', '.join(report.candidates))}. One cell an expert, one row a "
        f"layer. {unused or 'No'} experts were used by no token of the calibration.</p>",
        _heat_map(layers, lambda row: row.bits, lambda value: f"{value:.2f} bits"),
        "<h2>Predicted error by layer and expert</h2>"
        f"<p>Mean square error of the layer's output over the hidden state's mean square: {report.error:.4g} in all, {proof}. "
        "Darker is more, in even steps of the logarithm.</p>",
        _heat_map(layers, lambda row: row.error, lambda value: f"{value:.3g}", logarithmic=True),
        "<h2>Use and bits</h2><p>One dot an expert: the more tokens use it, the more bits it is worth.</p>",
        _scatter(
            [(row.tokens, row.bits, _name(row)) for row in report.experts],
            "tokens of the calibration",
            "bits a weight",
        ),
        "<h2>Error of the weights and predicted error</h2><p>One dot an expert: what packing does to its weights, measured, "
        "and what that is predicted to do to the model.</p>",
        _scatter(
            [(100 * row.relative_error, 1e6 * row.error, _name(row)) for row in report.experts],
            "relative error of the weights, %",
            "predicted error, millionths",
        ),
    ]
    if report.trials:
        parts += [
            "<h2>The search</h2><p>Perplexity lost on the text by bits; each dot is a bundle that was tried.</p>",
            _scatter(
                [(row.bits, 100 * row.loss, f"{row.bits:.3f} bits: {row.loss:.2%}") for row in report.trials],
                "bits a weight of the experts",
                "perplexity lost, %",
                level=None if report.max_loss is None else 100 * report.max_loss,
            ),
        ]
    parts.append(f"<h2>Layers</h2>{_layers(layers)}")
    return parts


def _layers(layers: "dict[int, list[ExpertRow]]") -> str:
    rows = [
        ("layer", "bits a weight", "bytes", "predicted error", "relative error of the weights", "formats")
    ]
    for layer, experts in layers.items():
        counts: dict[str, int] = {}
        for row in experts:
            for name in row.formats:
                counts[name] = counts.get(name, 0) + 1
        rows.append(
            (
                str(layer),
                f"{sum(row.bits for row in experts) / len(experts):.3f}",
                format_bytes(sum(row.bytes for row in experts)),
                f"{sum(row.error for row in experts):.4g}",
                f"{sum(row.relative_error for row in experts) / len(experts):.2%}",
                ", ".join(f"{count} {name}" for name, count in sorted(counts.items())),
            )
        )
    return _table(rows, names=1)


# --- drawing --------------------------------------------------------------------------------------------


def _heat_map(
    layers: "dict[int, list[ExpertRow]]",
    value: "Callable[[ExpertRow], float]",
    shown: Callable[[float], str],
    *,
    logarithmic: bool = False,
) -> str:
    """Rows are layers, columns experts; every cell says on hover what it is."""

    def level(row: "ExpertRow") -> float:
        return math.log(max(value(row), 1e-300)) if logarithmic else value(row)

    levels = [level(row) for experts in layers.values() for row in experts]
    low, high = min(levels), max(levels)
    most = max(map(len, layers.values()))
    left, top = 46, 18
    cell = (_WIDTH - left) / most
    height = min(26.0, max(7.0, cell))
    drawn = [
        f'<text x="{left}" y="12">expert 0</text><text x="{_WIDTH}" y="12" text-anchor="end">{most - 1}</text>'
    ]
    for line, (layer, experts) in enumerate(layers.items()):
        y = top + line * height
        if height >= 12 or line % 4 == 0:
            drawn.append(
                f'<text x="{left - 8}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{layer}</text>'
            )
        for column, row in enumerate(experts):
            share = (level(row) - low) / (high - low) if high > low else 0.5
            drawn.append(
                f'<rect x="{left + column * cell:.2f}" y="{y:.2f}" width="{max(1.0, cell - 1):.2f}" '
                f'height="{max(1.0, height - 1):.2f}" fill="var(--one)" fill-opacity="{0.08 + 0.92 * share:.3f}">'
                f"<title>{_name(row)}: {shown(value(row))}</title></rect>"
            )
    end = top + len(layers) * height
    legend = (
        f'<text x="{left}" y="{end + 20:.0f}">{shown(min(map(value, _all(layers))))} (lightest) to '
        f"{shown(max(map(value, _all(layers))))}</text>"
    )
    return _svg(end + 28, "".join(drawn) + legend)


def _scatter(
    points: Sequence[tuple[float, float, str]], x_name: str, y_name: str, level: float | None = None
) -> str:
    left, right, top, bottom, height = 60, 28, 12, 44, 300
    x_ticks = _ticks([x for x, _, _ in points])
    y_ticks = _ticks([y for _, y, _ in points] + ([] if level is None else [level]))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (_WIDTH - left - right), height - bottom - up * (height - top - bottom)

    drawn = []
    for tick in x_ticks:
        x, y = place(tick, y_ticks[0])
        drawn.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{y:.1f}"/>'
            f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in y_ticks:
        x, y = place(x_ticks[0], tick)
        drawn.append(
            f'<line class="axis" x1="{x:.1f}" x2="{_WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    if level is not None:
        _, y = place(x_ticks[0], level)
        drawn.append(
            f'<line x1="{left}" x2="{_WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--two)" stroke-dasharray="6 4"/>'
        )
    for point_x, point_y, name in points:
        x, y = place(point_x, point_y)
        drawn.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--one)" fill-opacity="0.6"><title>{html.escape(name)}</title>'
            "</circle>"
        )
    drawn.append(
        f'<text x="{_WIDTH / 2}" y="{height - 8}" text-anchor="middle">{x_name}</text>'
        f'<text transform="translate(12 {height / 2}) rotate(-90)" text-anchor="middle">{y_name}</text>'
    )
    return _svg(height, "".join(drawn))


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around the values, four to nine of them."""

    low, high = min(values), max(values)
    spread = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(spread / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if spread / (step * factor) <= 7)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _svg(height: float, content: str) -> str:
    return f'<div class="wide"><svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img">{content}</svg></div>'


def _table(rows: Sequence[Sequence[str]], names: int) -> str:
    """The first row is the head, the first `names` columns are names."""

    def line(row: Sequence[str], tag: str) -> str:
        cells = (
            f"<{tag}{' class=name' if column < names else ''}>{html.escape(cell)}</{tag}>"
            for column, cell in enumerate(row)
        )
        return f"<tr>{''.join(cells)}</tr>"

    return f'<div class="wide"><table>{line(rows[0], "th")}{"".join(line(row, "td") for row in rows[1:])}</table></div>'


def _all(layers: "dict[int, list[ExpertRow]]") -> "list[ExpertRow]":
    return [row for experts in layers.values() for row in experts]


def _name(row: "ExpertRow") -> str:
    formats = "/".join(dict.fromkeys(row.formats)) if len(set(row.formats)) == 1 else "/".join(row.formats)
    return f"layer {row.layer}, expert {row.expert}: {formats}, {row.tokens} tokens"
