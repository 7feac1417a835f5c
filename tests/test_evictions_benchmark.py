"""The comparison of eviction policies as a command."""

from __future__ import annotations

import json
from pathlib import Path

import evictions
import pytest

from edgert import routing

LAYERS = [(32, 4)] * 4  # of the shape "tiny"


def test_the_command_compares_every_policy_on_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, result = tmp_path / "trace.jsonl", tmp_path / "result.json"
    routing.write_trace(trace, evictions.drawn(LAYERS, 120, drift=0.3))
    evictions.main(f"tiny --routing trace:{trace} --shares 0.2 0.5 --request 20 10 --json {result}".split())
    assert "forecast: hits" in capsys.readouterr().out
    rows = json.loads(result.read_text())["rows"]
    assert [(row["way"], row["share"]) for row in rows] == [
        (way, share) for way in ("decode", "requests") for share in (0.2, 0.5)
    ]
    for row in rows:
        found = row["policies"]
        assert found["lru"]["over_lru_bounds"] == [0, 0]
        for policy in found.values():
            low, high = policy["hit_rate_bounds"]
            assert low <= policy["hit_rate"] <= high
            assert policy["bytes_per_token"] >= found["optimum"]["bytes_per_token"]


def test_a_bundles_own_routing_is_recorded(tiny_bundle: Path, tmp_path: Path) -> None:
    text, trace = tmp_path / "text", tmp_path / "trace.jsonl"
    text.write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2)
    evictions.main([str(tiny_bundle), "--text", str(text), "--record", str(trace), "--shares", "0.5"])
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert len(lines) > 20
    assert [line["tok"] for line in lines] == list(range(1, len(lines) + 1))


def test_a_prompt_is_one_step_and_only_later_answers_count() -> None:
    table = routing.uniform(LAYERS, 61)
    steps, counted = evictions.requests(table, 20, 10)
    assert len(steps) == 2 * (1 + 10)
    assert counted == [False] * 12 + [True] * 10
    assert steps[1] == table[20]
    assert set(steps[0][0]) == {id for position in table[:20] for id in position[0]}


def test_drawn_routing_prefers_some_experts_and_drifts() -> None:
    def favourite(table: routing.Table) -> int:
        uses = [id for position in table for id in position[0]]
        return max(range(32), key=uses.count)

    for drift in (0, 1):
        table = evictions.drawn(LAYERS, 600, drift=drift)
        assert all(len(set(ids)) == 4 for position in table for ids in position)
        assert (favourite(table[:200]) == favourite(table[-200:])) == (drift == 0)
