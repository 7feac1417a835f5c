"""Pages that show a run: one HTML file with drawings inside, which needs nothing else."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgert.drawing import figure, page, panel


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
        ("events a second", panel(t, values, moves, band=(settings["low"], settings["high"]), log=True)),
        (
            f"{fast.get('name') or 'fast'} ({fast['minimum']} to {fast['maximum']})",
            panel(t, [d["fast"] for d in decisions], moves, height=110),
        ),
    ]
    for i, knob in enumerate(settings.get("slow", [])):
        drawings.append(
            (str(knob.get("name")), panel(t, [d["slow"][i] for d in decisions], moves, height=80))
        )
    reasons: dict[str, int] = {}
    for d in decisions:
        reasons[d["reason"]] = reasons.get(d["reason"], 0) + 1
    inside = sum(settings["low"] <= v <= settings["high"] for v in values)
    moved = "1 slow move" if len(moves) == 1 else f"{len(moves)} slow moves"
    facts = f"{len(decisions)} windows, {inside} in the band, {moved} (red); seconds from left to right. Reasons: "
    facts += ", ".join(f"{name} {count}" for name, count in sorted(reasons.items(), key=lambda r: -r[1]))
    return page(title, [f"<p>{html.escape(facts)}.</p>"] + [figure(*drawing) for drawing in drawings])


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
        [f"<p>{html.escape(facts)}</p>", figure("queries down, references across; dark is alike", drawing)],
    )


def _thinned(rows: Any, most: int) -> Any:
    return rows[:: -(-rows.shape[0] // most), :: -(-rows.shape[1] // most)]
