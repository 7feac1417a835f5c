"""Small random checkpoints of every family, whose tensor names and shapes transformers (5 or later) says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import BOS, IM_END, random_weights, write_tokenizer, write_weights


@dataclass(frozen=True)
class Variant:
    """A family, what its config says beyond SMALL, and how the checkpoint lies on disk."""

    name: str
    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = (
        False  # experts as 3-D tensors under the module's names; else as save_pretrained writes them
    )
    dtype: str = "float32"
    shards: bool = False
    old_config: bool = False  # config.json with the keys that transformers wrote before version 5
    seed: int = 0  # chosen so that no position of the tests is a near tie


# Sizes that are multiples neither of a tile (16 rows) nor of a quantisation group (32 or 64 columns).
SMALL: dict[str, Any] = {
    "hidden_size": 72,
    "vocab_size": 131,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 2e-3,  # large enough to be missed where it is not taken over
    "bos_token_id": BOS,
    "eos_token_id": IM_END,
    "pad_token_id": None,
}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "intermediate_size": 56}
_LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "intermediate_size": 56,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 16,
}
_DELTA = {
    "num_hidden_layers": 5,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 44,
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 20,
    "linear_value_head_dim": 24,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
_CONV = {"num_hidden_layers": 4, "norm_eps": 2e-3, "layer_types": ["conv", "conv", "full_attention", "conv"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": _MOE | {"head_dim": 16, "norm_topk_prob": True},
    "qwen2_moe": _MOE | {"shared_expert_intermediate_size": 44},
    "olmoe": {"num_experts": 9, "num_experts_per_tok": 3, "intermediate_size": 40},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40},
    "llama": {"intermediate_size": 100},
    "ernie4_5": {"intermediate_size": 100, "head_dim": 16},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 40, "intermediate_size": 56},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "intermediate_size": 56,
        "head_dim": 24,
        "attention_bias": True,
    },
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 40,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.7,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
    },
    "granitemoeshared": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 40,
        "shared_intermediate_size": 44,
        "residual_multiplier": 0.6,
    },
    "llama4_text": {
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "intermediate_size": 40,
        "intermediate_size_mlp": 56,
        "head_dim": 16,
        "attention_chunk_size": 13,
        "floor_scale": 7,
        "attn_scale": 0.5,
        "no_rope_layer_interval": 2,
    },
    "gemma4_text": {
        "num_experts": 8,
        "top_k_experts": 3,
        "enable_moe_block": True,
        "moe_intermediate_size": 40,
        "intermediate_size": 56,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 5.0,
        "sliding_window": 11,
        "tie_word_embeddings": True,
    },
    "granite": {
        "intermediate_size": 100,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.7,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
    },
    "mistral": {"intermediate_size": 100},
    "ministral3": {
        "intermediate_size": 100,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.4,
        },
    },
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40},
    "qwen2": {"intermediate_size": 100},
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 40,
        "head_dim": 16,
        "sliding_window": 11,
    },
    "qwen3": {"intermediate_size": 100, "head_dim": 16},
    "deepseek_v2": _LATENT | {"q_lora_rank": None, "first_k_dense_replace": 1, "n_shared_experts": 2},
    "deepseek_v3": _LATENT
    | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "glm4_moe_lite": _LATENT | {"q_lora_rank": 24, "n_shared_experts": 1},
    "qwen3_next": _DELTA | {"intermediate_size": 56},
    "qwen3_5_moe_text": _DELTA,
    "lfm2": _CONV | {"intermediate_size": 100, "block_multiple_of": 16},
    "lfm2_moe": _CONV
    | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "intermediate_size": 56}
    | {"num_dense_layers": 1},
}


ZERO_CENTRED = ("qwen3_next", "qwen3_5_moe_text")


def _rope(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **keys}}


_LINEAR = _rope("linear", factor=2.5)
_LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64)
_GPT_OSS_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    }
}
_DEEPSEEK_YARN = _rope(
    "yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.0
)
_LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 256,
        "short_factor": [1.0 + i / 9 for i in range(9)],
        "long_factor": [2.0 + i for i in range(9)],
        "short_mscale": 1.1,
        "long_mscale": 1.3,
    }
}
_YARN_ALL = _rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=64,
    attention_factor=0.9,
    beta_fast=16.0,
    beta_slow=2.0,
    truncate=False,
)

VARIANTS = [
    Variant("qwen3_moe", "qwen3_moe"),
    Variant(
        "qwen3_moe-tied-raw_gates-dense_layer-bias-bf16-shards",
        "qwen3_moe",
        {"tie_word_embeddings": True, "norm_topk_prob": False, "mlp_only_layers": [1], "attention_bias": True},
        dtype="bfloat16",
        shards=True,
    ),
    Variant(
        "qwen3_moe-sparse_step_2-f16-fused",
        "qwen3_moe",
        {"decoder_sparse_step": 2, "num_hidden_layers": 4},
        dtype="float16",
        fused=True,
    ),
    Variant("qwen3_moe-window", "qwen3_moe", {"use_sliding_window": True, "sliding_window": 11}),
    Variant("qwen3_moe-yarn", "qwen3_moe", _YARN, fused=True, shards=True, seed=1),
    Variant(
        "qwen3_moe-MHA-even_sizes-old_config",
        "qwen3_moe",
        {"hidden_size": 64, "num_key_value_heads": 4, "moe_intermediate_size": 64, "vocab_size": 160, **_YARN_ALL},
        old_config=True,
    ),
    Variant("qwen2_moe", "qwen2_moe", seed=1),
    Variant(
        "qwen2_moe-mixed_windows-normalized-fused",
        "qwen2_moe",
        {
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 3,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
        },
        fused=True,
    ),
    Variant(
        "qwen2_moe-no_bias-dense_layer-old_config",
        "qwen2_moe",
        {"qkv_bias": False, "mlp_only_layers": [0], "tie_word_embeddings": True},
        dtype="bfloat16",
        old_config=True,
    ),
    Variant("olmoe-MHA", "olmoe", {"num_key_value_heads": 4}, seed=1),
    Variant("olmoe-clip_qkv-normalized-linear_rope", "olmoe", {"clip_qkv": 0.8, "norm_topk_prob": True, **_LINEAR}, seed=1),
    Variant("olmoe-bias-fused-bf16", "olmoe", {"attention_bias": True}, fused=True, dtype="bfloat16"),
    Variant("mixtral", "mixtral", seed=1),
    Variant("mixtral-window-MQA-shards", "mixtral", {"sliding_window": 13, "num_key_value_heads": 1}, shards=True, seed=1),
    Variant("mixtral-head_dim-tied-fused", "mixtral", {"head_dim": 24, "tie_word_embeddings": True}, fused=True),
    Variant("mixtral-old_config", "mixtral", {"num_local_experts": 4}, old_config=True),
    Variant("llama-llama3_rope-tied", "llama", {"tie_word_embeddings": True, **_LLAMA3}),
    Variant("llama-bias-MHA-linear_rope-old_config", "llama", {
        "attention_bias": True, "num_key_value_heads": 4, **_LINEAR}, old_config=True),
    Variant("llama-head_dim-MQA-f16", "llama", {"head_dim": 32, "num_key_value_heads": 1}, dtype="float16"),
    Variant("gpt_oss", "gpt_oss", _GPT_OSS_YARN),
    Variant("gpt_oss-bf16-shards-full_attention-tied", "gpt_oss", {
        "layer_types": ["full_attention"] * 2 + ["sliding_attention"], "tie_word_embeddings": True},
        dtype="bfloat16", shards=True),
    Variant("deepseek_v2", "deepseek_v2"),
    Variant("deepseek_v2-q_rank-groups-scale-bias-yarn-bf16", "deepseek_v2", {
        "q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 1.5, "attention_bias": True, **_DEEPSEEK_YARN}, dtype="bfloat16"),
    Variant("deepseek_v3", "deepseek_v3"),
    Variant("deepseek_v3-q-bias-yarn-half_rope-fused-f16", "deepseek_v3", {
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "attention_bias": True, "rope_interleave": False,
        **_DEEPSEEK_YARN}, fused=True, dtype="float16"),
    Variant("glm4_moe_lite", "glm4_moe_lite"),
    Variant("qwen3_next", "qwen3_next"),
    Variant("qwen3_next-dense_layer-bf16-shards-tied", "qwen3_next", {
        "mlp_only_layers": [1], "tie_word_embeddings": True, "linear_conv_kernel_dim": 3},
        dtype="bfloat16", shards=True),
    Variant("qwen3_5_moe_text", "qwen3_5_moe_text", fused=True, seed=2),
    Variant("lfm2", "lfm2"),
    Variant("lfm2-bias-untied-plain_width", "lfm2", {
        "conv_bias": True, "tie_word_embeddings": False, "block_auto_adjust_ff_dim": False, "conv_L_cache": 4}),
    Variant("lfm2_moe", "lfm2_moe"),
    Variant("lfm2_moe-no_expert_bias-f16", "lfm2_moe", {"use_expert_bias": False}, dtype="float16"),
    Variant("ernie4_5-tied", "ernie4_5", {"tie_word_embeddings": True}),
    Variant("ernie4_5_moe", "ernie4_5_moe"),
    Variant("ernie4_5_moe-interval-bf16", "ernie4_5_moe", {
        "moe_layer_interval": 2, "moe_layer_start_index": 0, "num_hidden_layers": 4, "moe_num_shared_experts": 0},
        dtype="bfloat16"),
    Variant("glm4_moe", "glm4_moe"),
    Variant("glm4_moe-groups-qk_norm-scaled-shards", "glm4_moe", {
        "n_group": 4, "topk_group": 2, "use_qk_norm": True, "routed_scaling_factor": 2.5, "n_shared_experts": 2,
        "first_k_dense_replace": 2, "attention_bias": False}, shards=True),
    Variant("granitemoe", "granitemoe", seed=1),
    Variant("granitemoeshared-tied-bias-f16", "granitemoeshared", {
        "tie_word_embeddings": True, "attention_bias": True}, dtype="float16"),
    Variant("llama4_text", "llama4_text"),
    Variant("llama4_text-interleaved-no_qk_norm-top_2-bf16-shards", "llama4_text", {
        "interleave_moe_layer_step": 2, "use_qk_norm": False, "num_experts_per_tok": 2, "num_hidden_layers": 4,
        "attn_temperature_tuning": False, **_LLAMA3}, dtype="bfloat16", shards=True),
    Variant("gemma4_text", "gemma4_text"),
    Variant("gemma4_text-dense-own_values-bf16", "gemma4_text", {
        "enable_moe_block": False, "attention_k_eq_v": False, "final_logit_softcapping": None}, dtype="bfloat16"),
    Variant("granite-bias-tied", "granite", {"attention_bias": True, "tie_word_embeddings": True}),
    Variant("mistral-window", "mistral", {"sliding_window": 12}),
    Variant("ministral3", "ministral3"),
    Variant("phimoe", "phimoe", {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2}),
    Variant("phimoe-longrope-window-fused", "phimoe", {"sliding_window": 21, "router_jitter_noise": 0.05, **_LONGROPE},
            fused=True),
    Variant("qwen2-tied", "qwen2", {"tie_word_embeddings": True}),
    Variant("qwen3", "qwen3", {"tie_word_embeddings": True}, dtype="bfloat16"),
    Variant("qwen3-mixed_windows-bias-yarn", "qwen3", {
        "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1, "attention_bias": True, **_YARN}),
]  # fmt: skip


def make_checkpoint(directory: Path, variant: Variant) -> Path:
    """Write the variant's checkpoint at `directory`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    keys = SMALL | FAMILIES[variant.family] | dict(variant.config)
    if "norm_eps" in keys:
        del keys["rms_norm_eps"]
    config = AutoConfig.for_model(variant.family, **keys)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    tensors = random_weights(shapes, variant.seed, zero_centred=variant.family in ZERO_CENTRED)
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)
    model.to(getattr(torch, variant.dtype))
    model.save_pretrained(directory, max_shard_size="100KB" if variant.shards else "1GB")
    if variant.fused:
        for file in directory.glob("model*"):
            file.unlink()
        dtype = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[variant.dtype]
        write_weights(directory, tensors, dtype=dtype, shards=3 if variant.shards else 1)
    if variant.old_config:
        _rewrite_config(directory / "config.json")
    write_tokenizer(directory, config.vocab_size)
    return directory


def _rewrite_config(path: Path) -> None:
    """The same config in the keys of transformers 4, which most published checkpoints have."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = rope
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    path.write_text(json.dumps(config, indent=2))


def by_name(variants: Iterable[Variant], name: str) -> Variant:
    return next(v for v in variants if v.name == name)
