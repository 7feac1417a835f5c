"""Decode speed by memory, from the results of side_by_side.py, as an SVG to be read on light and on dark.

pip install matplotlib
python benchmarks/plot.py result.json result.svg
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]

# Of middling brightness: the background is the page's.
_INK = "#7d8590"
_COLOURS = {"edgert": "#2f81f7", "llama.cpp": "#d9730d", "roof": _INK}
_NAMES = {"edgert": "edgert", "llama.cpp": "llama.cpp mmap", "roof": "roof"}
_STYLES = ("-", "--", ":", "-.")  # by disk speed


def series(report: Mapping[str, Any]) -> dict[tuple[str, int | None], Points]:
    """Memory share and decode speed by line (edgert, llama.cpp, roof) and by speed of the disk, in rising order. edgert with
    all memory belongs to every disk; llama.cpp with all memory maps nothing, and has no place in its line."""
    lines: dict[tuple[str, int | None], Points] = {}
    rows = [row for row in report["rows"] if "failed" not in row]
    disks = {row["read_bytes_per_s"] for row in rows if row["share"] is not None}
    for row in rows:
        decode = row["decode"]
        for disk in disks if row["share"] is None else {row["read_bytes_per_s"]}:
            place = 1.0 if row["share"] is None else row["share"]
            if row["peer"] == "edgert" or row["share"] is not None:
                lines.setdefault((row["peer"], disk), []).append((place, decode["tokens_per_s"]))
            if "roof_tokens_per_s" in decode:
                lines.setdefault(("roof", disk), []).append((place, decode["roof_tokens_per_s"]))
    return {key: sorted(points) for key, points in lines.items()}


def draw(report: Mapping[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    lines = series(report)
    disks = sorted({disk for _, disk in lines}, key=lambda disk: -(disk or 1 << 62))
    colours = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    )
    # Text stays text, and the same figures give the same file.
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "edgert", "font.family": "sans-serif"}
    with pyplot.rc_context({**colours, **fixed}):
        figure, axes = pyplot.subplots(figsize=(7.2, 4.4))
        for name in ("roof", "edgert", "llama.cpp"):
            for disk, style in zip(disks, _STYLES, strict=False):
                if points := lines.get((name, disk)):
                    speed = "full disk speed" if disk is None else f"disk held to {disk / 1e6:.0f} MB/s"
                    shares, speeds = zip(*points, strict=True)
                    width, marker = (1.0, "") if name == "roof" else (2.0, "o")
                    label = f"{_NAMES[name]}, {speed}"
                    axes.plot(
                        shares,
                        speeds,
                        style,
                        color=_COLOURS[name],
                        lw=width,
                        marker=marker,
                        ms=5,
                        label=label,
                    )
        places = sorted({share for points in lines.values() for share, _ in points})
        axes.set_xticks(places, ["all" if share == 1 else f"{share:.0%}" for share in places])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.grid(color=_INK, alpha=0.25, lw=0.5, which="both")
        axes.set_xlabel("memory, as a share of the model")
        axes.set_ylabel("decode, tokens/s")
        axes.set_title(
            f"{report['shape']}, {report['threads']} threads, {report['machine']['cpu']}", fontsize=10
        )
        axes.legend(frameon=False, fontsize=8, loc="upper left", handlelength=4)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
