"""A small configuration of every family, and what a family makes of it without a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgert.converters.config import Config
from edgert.converters.decoder import Decoder, SourceTensors
from edgert.converters.registry import FAMILIES
from edgert.converters.tensor import TensorInfo

BASE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "hidden_act": "silu",
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
GEMMA4: dict[str, Any] = {
    "num_experts": 8,
    "top_k_experts": 2,
    "enable_moe_block": True,
    "moe_intermediate_size": 48,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_act": None,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 64,
    "rope_theta": None,
    "rope_parameters": {
        "sliding_attention": {"rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}
LLAMA4 = {"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "head_dim": 16}
LATENT = BASE | {
    "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
DELTA = BASE | MOE | {
    "head_dim": 32, "shared_expert_intermediate_size": 80, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_conv_kernel_dim": 4,
}  # fmt: skip
CONV = {key: value for key, value in BASE.items() if key not in ("rms_norm_eps", "hidden_act")} | {
    "norm_eps": 1e-5, "layer_types": ["conv", "conv", "full_attention", "conv"],
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "qwen3": BASE | {"head_dim": 32},
    "qwen3_moe": BASE | MOE | {"head_dim": 32},
    "qwen2_moe": BASE | MOE | {"shared_expert_intermediate_size": 80},
    "olmoe": BASE | {"num_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": BASE
    | {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 128},
    "ernie4_5": BASE,
    "ernie4_5_moe": BASE
    | {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 2},
    "glm4_moe": BASE
    | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1},
    "granite": BASE,
    "granitemoe": BASE | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "granitemoeshared": BASE
    | {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 80},
    "ministral3": BASE
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "rope_theta": None,
    },
    "mistral": BASE,
    "mistral3": {
        "text_config": BASE | {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral"},
        "vision_feature_layer": -1,
    },
    "phimoe": BASE | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": BASE,
    "llama4": {"text_config": BASE | LLAMA4, "vision_config": {"hidden_size": 3}},
    "llama4_text": BASE | LLAMA4,
    "gemma4": {"text_config": BASE | GEMMA4, "vision_config": None, "audio_config": {"hidden_size": 3}},
    "gemma4_text": BASE | GEMMA4,
    "mixtral": BASE | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"n_group": 4, "topk_group": 2, "q_lora_rank": 24},
    "kimi_k2": LATENT | {"q_lora_rank": 24},
    "glm4_moe_lite": LATENT | {"q_lora_rank": 24},
    "qwen3_next": DELTA,
    "qwen3_5_moe_text": DELTA,
    "qwen3_5_moe": {
        "text_config": DELTA | {"model_type": "qwen3_5_moe_text"},
        "vision_config": {"model_type": "qwen3_5_moe_vision"},
        "image_token_id": 300,
    },
    "lfm2": CONV,
    "lfm2_moe": CONV | MOE,
}


class Requests(SourceTensors):
    """A checkpoint that has whatever is asked for, and remembers it. `fused`: experts as 3-D tensors."""

    def __init__(self, *, fused: bool = False, present: tuple[str, ...] = ()) -> None:
        super().__init__({}, "checkpoint")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._fused = fused
        self._present = present

    def __contains__(self, name: str) -> bool:
        if name.endswith("experts.gate_up_proj"):
            return self._fused
        if name.endswith(("experts.gate_proj", ".k_b_proj.weight")) or "input_linear" in name:
            return False
        return name in self._present or name.startswith("model.")

    def within(self, prefix: str) -> Requests:
        return self

    def find(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        self.shapes[name] = shape
        return TensorInfo(name, "BF16", shape, 1000, 1000 + 2 * int(np.prod(shape)), Path("x.safetensors"))


def describe(family: str, tensors: Requests | None = None, **changes: Any) -> Decoder:
    config = Config({"model_type": family} | CONFIGS[family] | changes, "config.json")
    decoder = FAMILIES[family](config, tensors or Requests())
    config.finish()
    return decoder


def mixers(decoder: Decoder) -> list[dict[str, Any]]:
    """The attention of every layer."""
    return [decoder.recipe["blocks"][block]["mixer"] for block in decoder.recipe["layers"]]


def ffns(decoder: Decoder) -> list[dict[str, Any]]:
    return [decoder.recipe["blocks"][block]["ffn"] for block in decoder.recipe["layers"]]
