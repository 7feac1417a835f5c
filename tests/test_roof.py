"""The roof's arithmetic, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from edgert.roof import Bandwidths, Footprint, Work, chunks, roof, sequence_bytes

MANIFEST: dict[str, Any] = {
    "recipe": {
        "hidden_size": 16,
        "output": {"tied": False},
        "blocks": [
            {"ffn": {"kind": "dense"}},
            {"ffn": {"kind": "moe", "num_experts_per_tok": 2, "moe_intermediate_size": 10}},
        ],
        "layers": [0, 1, 1],
    },
    "tensors": [
        {"name": "embedding", "bytes": 5000, "shape": [100, 16]},
        {"name": "output", "bytes": 700, "shape": [100, 16]},
        {"name": "final_norm", "bytes": 64, "shape": [16]},
        {"name": "layers.0.attention.q", "bytes": 136, "shape": [16, 16]},
    ],
    "experts": [
        {"layer": 1, "extents": [[1, 0, 4096, "", 0], [1, 0, 4000, "", 0]]},
        {"layer": 2, "extents": [[1, 0, 4097, "", 0], [1, 0, 8192, "", 0]]},
    ],
}
FOOTPRINT = Footprint(200, 256, 700, 1600, [[4096, 4096], [8192, 8192]], [480, 480], [2, 2])


def test_a_footprint_counts_what_a_token_reads() -> None:
    assert Footprint.of(MANIFEST) == FOOTPRINT
    assert FOOTPRINT.routed_bytes == 2 * 4096 + 2 * 8192
    assert FOOTPRINT.routed_weights == 4 * 480
    tied = {**MANIFEST, "recipe": {**MANIFEST["recipe"], "output": {"tied": True}}}
    assert Footprint.of(tied).output_bytes == 5000


def test_the_roof_is_the_slowest_of_memory_storage_and_arithmetic() -> None:
    machine = Bandwidths(memory_bytes_per_s=1000, storage_bytes_per_s=10, int8_operations_per_s=400)
    assert roof(Work(memory_bytes=500, storage_bytes=0, operations=100), machine) == 2
    assert roof(Work(memory_bytes=500, storage_bytes=20, operations=100), machine) == 0.5
    assert roof(Work(memory_bytes=500, storage_bytes=0, operations=800), machine) == 0.5
    assert roof(Work(memory_bytes=500, operations=800), Bandwidths(1000, 10)) == 2


def test_a_decoded_token_reads_every_weight_it_uses_and_its_context() -> None:
    plan = {"kv_bytes": 5000, "context": 50, "state_bytes": 640}
    assert sequence_bytes(plan, 10) == 10 * 100 + 640
    work = FOOTPRINT.decode(kv_bytes=1000, missed_bytes=4096)
    assert work == Work(200 + 700 + 24576 + 1000, 4096, 2 * (256 + 1600 + 1920))


def test_a_prompt_reads_the_dense_weights_and_each_expert_once_a_chunk() -> None:
    steps = chunks([[[0, 1], [0]], [[0], [0]], [[1], [1]]], 2)
    assert steps == [[[0, 1], [0]], [[1], [1]]]
    work = FOOTPRINT.prefill(3, steps, missed_bytes=600)
    assert work.memory_bytes == pytest.approx((2 * 200 + 700 + 3 * 4096 + 2 * 8192) / 3)
    assert work.storage_bytes == 200
    assert work.operations == pytest.approx(2 * (256 + 1920) + 2 * 1600 / 3)
