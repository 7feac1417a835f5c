"""Time to the first token with nothing in memory: what it needs is counted apart from what the engine reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import edgert
from edgert import _native
from edgert.benchmark import draw_tokens
from edgert.bundle import Bundle
from edgert.cold_start import cold_start
from edgert.errors import InvalidArgumentError
from edgert.roof import Bandwidths, Footprint

KNOBS: dict[str, Any] = {"threads": 1, "context": 40}


def test_a_prompt_needs_the_dense_weights_and_the_experts_that_any_of_its_tokens_uses(
    tiny_shape: Path,
) -> None:
    row = cold_start(tiny_shape, KNOBS, prompt_tokens=3, repetitions=1)["results"][0]
    with edgert.load(tiny_shape, **KNOBS) as model:
        prompt, _ = draw_tokens(model, 3, 1, 0)
        used = set()
        sequence = model.native.sequence()
        for token in prompt:
            model.native.step([(sequence, [token], None)])
            used |= {(layer, id) for layer, ids in enumerate(model.native.last_experts()) for id in ids}
    bundle = Bundle.open(tiny_shape)
    sizes = Footprint.of(bundle.manifest).experts
    needed = bundle.sizes["dense_bytes"] + sum(sizes[layer][id] for layer, id in used)
    assert row["needed_bytes"] == needed
    assert row["bytes_read"] >= needed


def test_the_ideal_reads_what_is_needed_and_then_computes(tiny_shape: Path) -> None:
    limits = Bandwidths(memory_bytes_per_s=1e9, storage_bytes_per_s=1e6, int8_operations_per_s=1e6)
    report = cold_start(tiny_shape, KNOBS, repetitions=2, bandwidths=lambda model: limits)
    (row,) = report["results"]
    assert row["tokens"] == 16
    assert row["compute_s"] > 0
    assert row["ideal_s"] == pytest.approx(row["needed_bytes"] / 1e6 + row["compute_s"])
    assert row["times_ideal"] == pytest.approx(row["first_token_s"] / row["ideal_s"])
    assert 0 < row["load_s"] < row["first_token_s"]
    assert report["threads"] == 1


def test_where_the_machine_is_not_measured_there_is_no_ideal(tiny_shape: Path) -> None:
    (row,) = cold_start(tiny_shape, KNOBS, repetitions=1)["results"]
    assert "ideal_s" not in row


def test_a_prompt_that_does_not_fit_is_refused(tiny_shape: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="context"):
        cold_start(tiny_shape, KNOBS, prompt_tokens=41, repetitions=1)


def test_the_smallest_budget_starts_too(tiny_shape: Path) -> None:
    with edgert.load(tiny_shape, **KNOBS) as model:
        least = model.minimum_bytes
    with pytest.warns(RuntimeWarning, match="every token will wait"):
        report = cold_start(tiny_shape, {**KNOBS, "memory": least}, repetitions=1)
    assert report["peak_bytes"] <= least < _native.available_memory_bytes()
