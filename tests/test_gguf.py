"""GGUF files: what they hold is carried over exactly, and means what the same model's safetensors mean."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, convert, open_model
from checkpoints import Variant, make_checkpoint, prompt_tokens
from ggufs import (
    gguf_arrays,
    interleave,
    metadata,
    write_gguf,
)

# --- the same model in both kinds of file ---------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A family's checkpoint and llama.cpp's name for it; `rope` is added to the metadata."""

    variant: Variant
    architecture: str
    permuted: bool = False
    rope: dict[str, Any] = field(default_factory=dict)


_MOE = {"hidden_size": 64, "num_key_value_heads": 2}
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
PAIRS = [
    Pair(Variant("qwen3_moe", "qwen3_moe", {"num_experts_per_tok": 3}), "qwen3moe"),
    Pair(Variant("qwen3_moe-tied", "qwen3_moe", {"tie_word_embeddings": True}), "qwen3moe"),
    Pair(
        Variant("qwen3_moe-yarn", "qwen3_moe", _YARN),
        "qwen3moe",
        rope={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
    ),
    Pair(Variant("qwen2_moe", "qwen2_moe"), "qwen2moe"),
    Pair(Variant("olmoe", "olmoe"), "olmoe"),
    Pair(Variant("mixtral", "mixtral"), "llama", permuted=True),
    Pair(Variant("llama", "llama"), "llama", permuted=True),
    Pair(
        Variant("llama-linear", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}}),
        "llama",
        permuted=True,
        rope={"rope.scaling.type": "linear", "rope.scaling.factor": 2.5},
    ),
    Pair(Variant("llama-bias", "llama", {"attention_bias": True}), "llama", permuted=True),
    Pair(Variant("qwen3", "qwen3"), "qwen3"),
]  # fmt: skip
KEYS = {
    "num_hidden_layers": "block_count", "max_position_embeddings": "context_length", "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_experts": "expert_count", "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length", "head_dim": "attention.key_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}  # fmt: skip


def as_gguf(source: Path, path: Path, pair_: Pair) -> Path:
    """The checkpoint at `source` as llama.cpp's own converter would write it."""
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    values = {there: config[here] for here, there in KEYS.items() if config.get(here) is not None}
    if pair_.variant.family in ("mixtral", "olmoe"):
        values.pop("expert_feed_forward_length", None)
    arrays = {
        name: array.astype(np.float32) for name, array in load_file(source / "model.safetensors").items()
    }
    if pair_.permuted:
        for name, array in arrays.items():
            for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if f".{part}." in name:
                    arrays[name] = interleave(array, config[heads])
    fields = metadata(pair_.architecture, values | {"rope.freq_base": 10000.0} | pair_.rope)
    return write_gguf(path, fields, gguf_arrays(arrays))


@pytest.mark.parametrize("pair_", PAIRS, ids=lambda p: p.variant.name)
def test_a_gguf_computes_what_the_checkpoint_does(pair_: Pair, tmp_path: Path) -> None:
    config = {"hidden_size": 64, "num_key_value_heads": 2, "vocab_size": 160, **pair_.variant.config}
    if pair_.variant.family == "mixtral":
        config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    if pair_.variant.family == "qwen2_moe":
        config |= {"norm_topk_prob": False}
    if pair_.variant.family == "olmoe":
        config |= {"norm_topk_prob": False}
    variant = Variant(pair_.variant.name, pair_.variant.family, config)
    source = make_checkpoint(tmp_path / "checkpoint", variant)
    expected = convert(source, tmp_path / "a.edgert", **F32)
    actual = convert(as_gguf(source, tmp_path / "model.gguf", pair_), tmp_path / "b.edgert", **F32)
    tokens = prompt_tokens(40, 160)
    a, b = (model.logits(model.sequence(), tokens) for model in map(open_model, (expected, actual)))
    assert np.abs(a - b).max() <= 2e-5 * np.abs(a).max()
