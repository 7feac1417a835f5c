"""Routing imposed on a model: what a trace says is what runs, and every law holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import bits, minimum_bytes, open_model, read_manifest

from edgert import _native, routing
from edgert.errors import CorruptError, InvalidArgumentError, NotFoundError
from edgert.roof import Footprint, chunks
from edgert.shapes import SHAPES

LAYERS = [(32, 4)] * 4  # of the shape "tiny"
TOKENS = [(7 * i * i + 3 * i) % 1024 for i in range(40)]


def trace_file(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def table(positions: int = 24) -> routing.Table:
    return routing.uniform(LAYERS, positions, seed=5)


def run(model: Any, tokens: list[int]) -> np.ndarray:
    """The bits of the logits at every position."""
    sequence = model.sequence()
    out = bits(model.logits(sequence, tokens))
    sequence.close()
    return out


# --- what runs ----------------------------------------------------------------------------------------


def test_each_position_uses_the_experts_that_the_routing_names(tiny_shape: Path) -> None:
    model, imposed = open_model(tiny_shape), table()
    model.impose_routing(imposed)
    sequence = model.sequence()
    model.step([(sequence, TOKENS[:10], None)])
    assert model.last_experts() == imposed[9]
    for position in range(10, 40):  # past the table's end it begins again
        model.step([(sequence, [TOKENS[position]], None)])
        assert model.last_experts() == imposed[position % 24]


def test_the_routers_choose_again_once_the_routing_is_taken_back(tiny_shape: Path) -> None:
    model = open_model(tiny_shape)
    own = run(model, TOKENS)
    model.impose_routing(table())
    assert (run(model, TOKENS) != own).any()
    model.impose_routing([])
    assert (run(model, TOKENS) == own).all()


def test_only_imposed_experts_are_read(tiny_shape: Path) -> None:
    few = [[[1, 2, 3, 4 + layer] for layer in range(4)]]
    model = open_model(tiny_shape, memory=minimum_bytes(tiny_shape) + (1 << 18))
    assert not model.resident
    model.impose_routing(few)
    run(model, TOKENS)
    statistics = model.statistics()
    assert statistics["expert_misses"] == 16  # each once: they fit
    for layer, states in enumerate(model.store()):
        assert [expert for expert, state in enumerate(states) if state] == few[0][layer]


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("threads", [1, 2])
def test_imposed_routing_keeps_the_bits_at_every_budget(tiny_shape: Path, chunk: int, threads: int) -> None:
    whole = open_model(tiny_shape)
    whole.impose_routing(table())
    expected = run(whole, TOKENS)
    least = minimum_bytes(tiny_shape, chunk=chunk, threads=threads)
    model = open_model(tiny_shape, memory=least, threads=threads, chunk=chunk)
    model.impose_routing(table())
    assert not model.resident
    assert (run(model, TOKENS) == expected).all()


def test_a_routing_that_does_not_fit_is_refused(tiny_shape: Path) -> None:
    model = open_model(tiny_shape)
    for experts, complaint in (
        ([[[0, 1, 2, 3]] * 3], "position 0: found 3, this model needs 4 MoE layers"),
        ([[[0, 1, 2, 3]] * 4, [[0, 1, 2]] * 4], "position 1, MoE layer 0: found 3"),
        ([[[0, 1, 2, 32]] * 4], "expert 32, allowed 0 to 31"),
        ([[[0, 1, 1, 2]] * 4], "expert 1 stands twice"),
    ):
        with pytest.raises(InvalidArgumentError, match=complaint):
            model.impose_routing(experts)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.7])
def test_reads_are_those_of_the_simulated_cache(tiny_shape: Path, share: float) -> None:
    footprint = Footprint.of(read_manifest(tiny_shape))
    experts = sum(map(sum, footprint.experts))
    model = open_model(tiny_shape, memory=minimum_bytes(tiny_shape) + int(share * experts))
    imposed = table(200)
    model.impose_routing(imposed)
    sequence = model.sequence()
    model.step([(sequence, [i % 1024 for i in range(40)], None)])
    for position in range(40, 200):
        model.step([(sequence, [position], None)])
    plan = model.plan()
    simulated = _native.StoreSimulation(footprint.experts, plan["slots_bytes"], model.eviction).run(
        [*chunks(imposed[:40], plan["chunk"]), *imposed[40:]]
    )
    assert model.statistics()["expert_bytes_read"] <= 1.03 * simulated["bytes"]


# --- traces -------------------------------------------------------------------------------------------


def test_a_trace_is_read_as_it_stands(tmp_path: Path) -> None:
    wanted = table(5)
    path = trace_file(tmp_path / "t", [{"tok": 3 + i, "layers": layers} for i, layers in enumerate(wanted)])
    assert routing.read_trace(path, LAYERS) == wanted
    recipe = partly_dense_recipe()
    assert routing.imposed(f"trace:{path}", recipe, 100) == wanted


def partly_dense_recipe() -> dict[str, Any]:
    """The part of a recipe that says what is routed, with a dense layer among the others."""
    moe = {"ffn": {"kind": "moe", "num_experts": 32, "num_experts_per_tok": 4}}
    return {"blocks": [moe, {"ffn": {"kind": "dense"}}], "layers": [0, 1, 0, 0, 0]}


@pytest.mark.parametrize(
    ("lines", "error", "complaint"),
    [
        ([], CorruptError, "is empty"),
        (["{"], CorruptError, "line 1: "),
        ([""], CorruptError, "line 1: "),
        (["[1]"], CorruptError, "line 1: found"),
        ([{"tok": 1}], CorruptError, "line 1: found"),
        ([{"tok": True, "layers": []}], CorruptError, "line 1: found"),
        (['{"tok": 1, "tok": 2, "layers": []}'], CorruptError, "line 1: the key 'tok' appears twice"),
        ([{"tok": 1, "layers": [3]}], CorruptError, "line 1: layers"),
        ([{"tok": 1, "layers": [[1.0, 2, 3, 4]] * 4}], CorruptError, "line 1: layers"),
        ([{"tok": 1, "layers": [[1, 2, 3, 4]] * 5}], InvalidArgumentError, "line 1: found 5 layers"),
        (
            [{"tok": 1, "layers": [[1, 2, 3, 4]] * 4}, {"tok": 2, "layers": [[1, 2, 3]] * 4}],
            InvalidArgumentError,
            "line 2: layer 0: found experts \\[1, 2, 3\\]; this model uses 4 different ones of 0 to 31",
        ),
        ([{"tok": 1, "layers": [[1, 2, 3, 32]] * 4}], InvalidArgumentError, "line 1: layer 0"),
        ([{"tok": 1, "layers": [[1, 2, 3, -1]] * 4}], InvalidArgumentError, "line 1: layer 0"),
        ([{"tok": 1, "layers": [[1, 2, 3, 3]] * 4}], InvalidArgumentError, "line 1: layer 0"),
        (
            [{"tok": 1, "layers": [[1, 2, 3, 4]] * 4}, {"tok": 1, "layers": [[1, 2, 3, 4]] * 4}],
            CorruptError,
            "line 2: tok: found 1 after 1",
        ),
    ],
)
def test_a_bad_trace_is_refused_by_its_line(
    tmp_path: Path, lines: list[object], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        routing.read_trace(trace_file(tmp_path / "trace", lines), LAYERS)


def test_an_endless_line_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"[" * (2 << 20))
    with pytest.raises(CorruptError, match="line 1: allowed are 1048576 bytes a line"):
        routing.read_trace(path, LAYERS)


def test_other_options_and_missing_files_are_refused(tmp_path: Path) -> None:
    recipe = partly_dense_recipe()
    for option in ("random", "trace", "trace:", "uniform:3"):
        with pytest.raises(InvalidArgumentError, match="allowed are uniform and trace:FILE"):
            routing.imposed(option, recipe, 8)
    with pytest.raises(NotFoundError, match="no such file"):
        routing.imposed(f"trace:{tmp_path / 'none'}", recipe, 8)
    dense = {"blocks": [{"ffn": {"kind": "dense"}}], "layers": [0]}
    with pytest.raises(InvalidArgumentError, match="has no routed experts"):
        routing.imposed("uniform", dense, 8)


def test_uniform_routing_is_uniform() -> None:
    drawn = routing.uniform(LAYERS, 2000)
    assert routing.overlap(drawn) == pytest.approx(4 / 32, rel=0.05)
    counts = np.bincount([expert for position in drawn for expert in position[0]], minlength=32)
    assert counts.min() > 200 and counts.max() < 300  # 250 each, more or less
    assert routing.uniform(LAYERS, 5) == drawn[:5]


@pytest.mark.skipif(
    "EDGERT_REFERENCE_DIR" not in os.environ, reason="EDGERT_REFERENCE_DIR names no directory"
)
def test_the_recorded_run_of_olmoe_is_read() -> None:
    path = Path(os.environ["EDGERT_REFERENCE_DIR"]) / "traces/olmoe-1b-7b-299-tokens.jsonl"
    config = SHAPES["olmoe-1b-7b"]
    layers = [(config["num_experts"], config["num_experts_per_tok"])] * config["num_hidden_layers"]
    recorded = routing.read_trace(path, layers)
    assert len(recorded) == 299
    assert routing.overlap(recorded) == pytest.approx(0.435, abs=0.005)
