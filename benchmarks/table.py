"""Results of side_by_side.py as Markdown.

python benchmarks/table.py result.json
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

_WARM = (
    "tok/s",
    "spread",
    "MB read a token",
    "simulated",
    "roof",
    "of roof",
    "plan",
    "plan is off",
    "times llama.cpp",
)
_COLD = (
    "disk",
    "",
    "first token, s",
    "spread",
    "of it loading",
    "MB read",
    "MB needed",
    "ideal, s",
    "times ideal",
)


def markdown(report: Mapping[str, Any]) -> str:
    """A table a phase, one of the cold starts, and a line about the machine; those that were measured."""
    parts = []
    if report["rows"]:
        lengths = {"prefill": report["prompt_tokens"], "decode": report["decode_tokens"]}
        parts += [
            f"{phase.capitalize()}, {n} tokens:\n\n{warm(report['rows'], phase)}"
            for phase, n in lengths.items()
        ]
    if report["cold"]:
        parts.append(
            f"Cold start, prompt of {report['cold_prompt_tokens']} tokens:\n\n{cold(report['cold'])}"
        )
    return "\n\n".join([*parts, about(report)])


def warm(rows: Sequence[Row], phase: str) -> str:
    """Of one phase; the last column divides edgert's speed by llama.cpp's in the same place."""
    head = ["memory", "disk", "", *_WARM]
    if phase == "decode":
        head.insert(5, "p99/p50")
    peer = {_place(row): row for row in rows if row["peer"] == "llama.cpp" and "failed" not in row}
    return _table(head, [_warm_cells(row, phase, peer.get(_place(row))) for row in rows])


def _warm_cells(row: Row, phase: str, peer: Row | None) -> list[str]:
    cells = [_memory(row), _disk(row), row["peer"]]
    if "failed" in row:
        return [*cells, row["failed"]]
    found = row[phase]
    cells += [_speed(found["tokens_per_s"]), f"{found['spread']:.1%}"]
    if phase == "decode":
        cells.append(f"{found['p99_over_p50']:.2f}")
    cells += [
        f"{found['bytes_read_per_token'] / 1e6:.1f}",
        f"{found['simulated_bytes_per_token'] / 1e6:.1f}" if "simulated_bytes_per_token" in found else "",
        _speed(found["roof_tokens_per_s"]) if "roof_tokens_per_s" in found else "",
        f"{found['roof_fraction']:.1%}" if "roof_fraction" in found else "",
        _speed(found["plan_tokens_per_s"]) if "plan_tokens_per_s" in found else "",
        f"{found['plan_deviation']:+.1%}" if "plan_deviation" in found else "",
    ]
    ours = row["peer"] == "edgert" and peer is not None
    return [*cells, f"{found['tokens_per_s'] / peer[phase]['tokens_per_s']:.2f}" if ours and peer else ""]


def cold(rows: Sequence[Row]) -> str:
    return _table(_COLD, [_cold_cells(row) for row in rows])


def _cold_cells(row: Row) -> list[str]:
    cells = [_disk(row), row["peer"]]
    if "failed" in row:
        return [*cells, row["failed"]]
    return [
        *cells,
        f"{row['first_token_s']:.3f}",
        f"{row['spread']:.1%}",
        f"{row['load_s']:.3f}",
        f"{row['bytes_read'] / 1e6:.0f}",
        f"{row['needed_bytes'] / 1e6:.0f}" if "needed_bytes" in row else "",
        f"{row['ideal_s']:.3f}" if "ideal_s" in row else "",
        f"{row['times_ideal']:.2f}" if "times_ideal" in row else "",
    ]


def about(report: Mapping[str, Any]) -> str:
    """What a reader needs beside the tables, in one line."""
    rows = [*report["rows"], *report["cold"]]
    busy = [value for row in rows for value in row.get("others_busy", ())]
    of_peer = {row["peer"]: row["about"] for row in rows if "about" in row}
    parts = [
        f"{report['shape']}: {report['machine']['cpu']}, {report['threads']} threads",
        f"{report['machine']['memory_bytes'] / 2**30:.0f} GiB",
        f"edgert {report['edgert']} ({of_peer.get('edgert', {}).get('isa', '-')})",
        f"llama-cpp-python {of_peer.get('llama.cpp', {}).get('version', '-')}",
        f"median of {report['rounds']}, {report['date']}",
        f"other processes kept {max(busy, default=0.0):.1f} processors busy in the worst round",
    ]
    if report["read_ahead_kb"] is not None:
        parts.append(f"read_ahead_kb {report['read_ahead_kb']}")
    measured = [speeds for row in rows for speeds in row.get("speeds", ())]
    if measured:
        parts.append(
            f"speeds from round to round: memory {_range(measured, 'memory_bytes_per_s', 1e9)} GB/s, reads of an expert "
            f"{_range(measured, 'storage_bytes_per_s', 1e9)} GB/s, int8 "
            f"{_range(measured, 'int8_operations_per_s', 1e9)} GOPS"
        )
    return "; ".join(parts)


def _range(speeds: Sequence[Mapping[str, float]], name: str, unit: float) -> str:
    values = [found[name] / unit for found in speeds]
    return f"{min(values):,.1f} to {max(values):,.1f}"


def _place(row: Row) -> tuple[float | None, int | None]:
    return row["share"], row["read_bytes_per_s"]


def _memory(row: Row) -> str:
    return "all" if row["share"] is None else f"{row['share']:.0%}"


def _disk(row: Row) -> str:
    return "full" if row["read_bytes_per_s"] is None else f"{row['read_bytes_per_s'] / 1e6:.0f} MB/s"


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.1f}" if tokens_per_s >= 10 else f"{tokens_per_s:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    full = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *full))


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
