"""Checkpoints of random weights in a model's shape, that conversions are measured with: they are what publishers save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors_shape
from bundles import convert, open_model, read_manifest

from edgert.shapes import SHAPES

SMALL: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_experts_per_tok": 2, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_oss": SHAPES["gpt-oss-20b"] | SMALL | {"num_local_experts": 4, "intermediate_size": 96},
    "qwen3_moe": SHAPES["qwen3-30b-a3b"] | SMALL | {"num_experts": 4, "moe_intermediate_size": 128},
}


@pytest.mark.parametrize(
    ("model", "scheme", "kept"),
    [("gpt_oss", "mxfp4", "mxfp4"), ("qwen3_moe", "gptq", "int4"), ("qwen3_moe", "bf16", None)],
)
def test_it_is_converted_as_it_is_stored_and_runs(
    model: str, scheme: str, kept: str | None, tmp_path: Path
) -> None:
    source = tmp_path / "checkpoint"
    safetensors_shape.write(CONFIGS[model], source, scheme, shard_bytes=300_000)
    assert len(list(source.glob("model-*.safetensors"))) > 2
    bundle = convert(source, tmp_path / "b.edgert", expert_format=None if kept else "bf16")
    assert read_manifest(bundle)["expert_formats"] == [[kept or "bf16"] * 3]
    runner = open_model(bundle)
    logits = np.asarray(runner.logits(runner.sequence(), list(range(1, 20))))
    assert 0.2 < logits.std() < 5


def test_the_statistics_are_those_asked_for() -> None:
    draw = np.random.Generator(np.random.SFC64(1))
    (part,) = safetensors_shape._dense("x", (256, 256), 0.05)
    words = np.concatenate([np.frombuffer(slab, "<u2") for slab in safetensors_shape.slabs(part, draw)])
    values = (words.astype(np.uint32) << 16).view(np.float32)
    assert abs(values.mean()) < 0.001
    assert values.std() == pytest.approx(0.05, rel=0.42)  # its exponent is a whole number
