"""Every architecture of GGUF that a family serves: the file computes what its checkpoint does, and what is not understood
is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, convert, open_model
from checkpoints import prompt_tokens
from ggufs import QWEN3_MOE, gguf_arrays, interleave, metadata, qwen3_moe_arrays, write_gguf
from variants import Variant, make_checkpoint

from edgert.errors import CorruptError, UnsupportedError

Arrays = dict[str, np.ndarray]
Config = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A family's checkpoint, and how llama.cpp's converter writes it: `values` are metadata, or the keys of config.json
    that hold them; `names` are parts of names that it exchanges; `change` turns the tensors into its own."""

    variant: Variant
    architecture: str
    values: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    change: Callable[[Arrays, Config], Arrays] = lambda arrays, config: arrays


TEXTS = {"yarn": "yarn"}  # values that are no keys
COMMON = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim",
}  # fmt: skip
CORRECTED = {
    "expert_count": "n_routed_experts", "expert_used_count": "num_experts_per_tok", "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size", "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob", "expert_group_count": "n_group", "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "first_k_dense_replace", "expert_gating_func": 2,
}  # fmt: skip
CORRECTED_NAMES = {
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias", "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp", "mlp.shared_experts.down_proj": "ffn_down_shexp",
}  # fmt: skip
LATENT_NAMES = CORRECTED_NAMES | {
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
}  # fmt: skip
# 32 of latents, 20 and 12 of a head's key, 16 of its value.
LATENT = COMMON | CORRECTED | {
    "attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank", "rope.dimension_count": 12,
    "attention.head_count_kv": 1, "attention.key_length": 44, "attention.value_length": 32,
    "attention.key_length_mla": 32, "attention.value_length_mla": 16,
}  # fmt: skip
LATENT_OF_2024 = {
    key: value for key, value in LATENT.items() if not key.endswith("_mla") and key != "expert_gating_func"
} | {"attention.head_count_kv": 4, "attention.key_length": 32, "attention.value_length": 16}  # fmt: skip
YARN = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_log_multiplier": 0.07,
}  # fmt: skip
YARN_CONFIG = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.7}}  # fmt: skip
LFM2 = {**COMMON, "attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache",
        "attention.head_count_kv": [0, 0, 2, 0]}  # fmt: skip
LFM2_NAMES = {
    "operator_norm": "attn_norm", "ffn_norm": "ffn_norm", "embedding_norm.weight": "token_embd_norm.weight",
    "self_attn.out_proj": "attn_output", "self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm",
    "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down",
    "feed_forward.gate": "ffn_gate_inp", "feed_forward.expert_bias": "exp_probs_b.bias",
    "conv.in_proj": "shortconv.in_proj", "conv.conv": "shortconv.conv", "conv.out_proj": "shortconv.out_proj",
}  # fmt: skip


def absorbed(arrays: Arrays, config: Config) -> Arrays:
    """kv_b in its two parts, that of the keys transposed."""
    changed = {}
    for name, array in arrays.items():
        if "kv_b_proj" not in name:
            changed[name] = array
            continue
        heads = array.reshape(config["num_attention_heads"], -1, array.shape[1])
        keys = config["qk_nope_head_dim"]
        layer = name.split(".")[2]
        changed[f"blk.{layer}.attn_k_b.weight"] = heads[:, :keys].swapaxes(1, 2)
        changed[f"blk.{layer}.attn_v_b.weight"] = heads[:, keys:]
    return changed


def stacked(module: str, gate_up: str, down: str) -> Callable[[Arrays, Config], Arrays]:
    """Gate and up, one after the other in each expert, in tensors of their own."""

    def change(arrays: Arrays, config: Config) -> Arrays:
        changed = {}
        for name, array in arrays.items():
            own = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
            if name.endswith(f"{module}.{gate_up}"):
                for part, half in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                    changed[f"{own}ffn_{part}_exps.weight"] = half
            elif name.endswith(f"{module}.{down}"):
                changed[f"{own}ffn_down_exps.weight"] = array
            else:
                changed[name] = array
        return changed

    return change


def gpt_oss(arrays: Arrays, config: Config) -> Arrays:
    """Gate and up, which lie by turns in the columns of the checkpoint."""
    changed = {}
    for name, array in arrays.items():
        stem, _, part = name.partition(".mlp.experts.")
        if not part:
            changed[name] = array
            continue
        own = f"blk.{stem.rpartition('.')[2]}.ffn_"
        ending = "bias" if part.endswith("bias") else "weight"
        rows = array if ending == "bias" else array.swapaxes(1, 2)
        if part.startswith("down"):
            changed[f"{own}down_exps.{ending}"] = rows
        else:
            changed[f"{own}gate_exps.{ending}"], changed[f"{own}up_exps.{ending}"] = (
                rows[:, ::2],
                rows[:, 1::2],
            )
    return changed


def lfm2(arrays: Arrays, config: Config) -> Arrays:
    return {name: a.squeeze(1) if "conv.conv" in name else a for name, a in arrays.items()}


def qwen3_next(arrays: Arrays, config: Config) -> Arrays:
    """q, k and v each with all heads; one added to norms; decays as they are used."""
    keys, values = config["linear_key_head_dim"], 2 * config["linear_value_head_dim"]
    changed = {}
    for name, array in arrays.items():
        if name.endswith("in_proj_qkvz.weight"):
            heads = array.reshape(config["linear_num_key_heads"], -1, array.shape[1])
            parts = np.split(heads, np.cumsum([keys, keys, values]), axis=1)
            rows = [part.reshape(-1, array.shape[1]) for part in parts]
            changed[name.replace("qkvz", "qkv")] = np.concatenate(rows[:3])
            changed[name.replace("qkvz", "z")] = rows[3]
        elif name.endswith("A_log"):
            changed[name] = -np.exp(array)
        elif "conv1d" in name:
            changed[name] = array.squeeze(1)
        elif "norm" in name and "linear_attn" not in name:
            changed[name] = array + np.float32(1)
        else:
            changed[name] = array
    return changed


def granite(arrays: Arrays, config: Config) -> Arrays:
    changed = stacked("block_sparse_moe", "input_linear.weight", "output_linear.weight")(arrays, config)
    for name, array in list(changed.items()):
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".{part}." in name:
                changed[name] = interleave(array, config[heads])
        if name.endswith("shared_mlp.input_linear.weight"):
            gate, up = np.split(changed.pop(name), 2)
            own = f"blk.{name.split('.')[2]}."
            changed[own + "ffn_gate_shexp.weight"], changed[own + "ffn_up_shexp.weight"] = gate, up
    return changed


GRANITE = COMMON | {
    "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok", "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
    "expert_shared_feed_forward_length": "shared_intermediate_size",
}  # fmt: skip
GRANITE_NAMES = {
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "shared_mlp.output_linear": "ffn_down_shexp",
}

CASES = [
    Case(
        Variant("gpt_oss", "gpt_oss", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0,
            "truncate": False, "original_max_position_embeddings": 32}}),
        "gpt-oss",
        COMMON | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size", "attention.sliding_window": "sliding_window",
            "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 32},
        {"post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp",
            "self_attn.sinks": "attn_sinks.weight"},
        gpt_oss,
    ),
    Case(
        Variant("deepseek_v2", "deepseek_v2", {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}),
        "deepseek2", LATENT | {"expert_gating_func": 1}, LATENT_NAMES, absorbed,
    ),
    Case(
        Variant("deepseek_v3-yarn", "deepseek_v3", YARN_CONFIG), "deepseek2", LATENT | YARN, LATENT_NAMES, absorbed
    ),
    Case(Variant("deepseek_v3-of_2024", "deepseek_v3"), "deepseek2", LATENT_OF_2024, LATENT_NAMES),
    Case(
        Variant("glm4_moe", "glm4_moe", {"n_group": 4, "topk_group": 2, "use_qk_norm": True}),
        "glm4moe",
        COMMON | CORRECTED | {"rope.dimension_count": 12},
        CORRECTED_NAMES | {"post_attention_layernorm": "post_attention_norm"},
    ),
    Case(Variant("lfm2", "lfm2", {"block_auto_adjust_ff_dim": False}), "lfm2", LFM2, LFM2_NAMES, lfm2),
    Case(
        Variant("lfm2_moe", "lfm2_moe"),
        "lfm2moe",
        LFM2 | {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok", "expert_gating_func": 2,
            "expert_feed_forward_length": "moe_intermediate_size", "leading_dense_block_count": "num_dense_layers"},
        LFM2_NAMES,
        lfm2,
    ),
    Case(
        Variant("qwen3_next", "qwen3_next", {"num_hidden_layers": 4}),
        "qwen3next",
        COMMON | {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size", "rope.dimension_count": 6,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size", "ssm.conv_kernel": 4,
            "ssm.state_size": "linear_key_head_dim", "ssm.group_count": "linear_num_key_heads",
            "ssm.time_step_rank": "linear_num_value_heads", "ssm.inner_size": 96,
            "attention.recurrent_layers": [True, True, True, False], "full_attention_interval": 4},
        {"post_attention_layernorm": "post_attention_norm", "linear_attn.in_proj_qkv.": "attn_qkv.",
            "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_ba": "ssm_ba", "linear_attn.conv1d": "ssm_conv1d",
            "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out", "linear_attn.dt_bias": "ssm_dt.bias",
            "linear_attn.A_log": "ssm_a"},
        qwen3_next,
    ),
    Case(Variant("granitemoe", "granitemoe"), "granitemoe", GRANITE, GRANITE_NAMES, granite),
    Case(
        Variant("granitemoeshared-tied", "granitemoeshared", {"tie_word_embeddings": True}),
        "granitemoe", GRANITE, GRANITE_NAMES, granite,
    ),
    Case(
        Variant("phimoe", "phimoe", {"attention_bias": True, "lm_head_bias": True}),  # llama.cpp has other norms and router
        "phimoe",
        COMMON | {"expert_count": "num_local_experts", "expert_used_count": 2, "attention.sliding_window": 256},
        {"model.norm.bias": "output_norm.bias", "lm_head.bias": "output.bias"},
    ),
    Case(Variant("ernie4_5", "ernie4_5"), "ernie4_5", COMMON),
    Case(
        Variant("ernie4_5_moe", "ernie4_5_moe", {"head_dim": 16}),
        "ernie4_5-moe",
        COMMON | {"expert_count": "moe_num_experts", "expert_used_count": "moe_k",
            "expert_feed_forward_length": "moe_intermediate_size", "expert_shared_count": "moe_num_shared_experts",
            "interleave_moe_layer_step": "moe_layer_interval", "leading_dense_block_count": "moe_layer_start_index",
            "expert_shared_feed_forward_length": 28},
        CORRECTED_NAMES | {"mlp.moe_statics.e_score_correction_bias": "exp_probs_b.bias"},
    ),
]  # fmt: skip


def as_gguf(source: Path, path: Path, case: Case) -> Path:
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    values = {}
    for key, value in case.values.items():
        stated = config.get(value, TEXTS.get(value)) if isinstance(value, str) else value
        if stated is not None:
            values[key] = stated
    arrays = {
        name: array.astype(np.float32) for name, array in load_file(source / "model.safetensors").items()
    }
    renamed, rest = {}, {}
    for name, array in case.change(arrays, config).items():
        here = next((part for part in case.names if part in name and ".experts." not in name), None)
        if here is not None:
            layer = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
            renamed[layer + case.names[here] + name.partition(here)[2]] = array
        elif name.startswith("blk."):
            renamed[name] = array
        else:
            rest[name] = array
    fields = metadata(case.architecture, values | {"rope.freq_base": config["rope_parameters"]["rope_theta"]})
    return write_gguf(path, fields, renamed | gguf_arrays(rest))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.variant.name)
def test_a_gguf_computes_what_the_checkpoint_does(case: Case, tmp_path: Path) -> None:
    config = {"hidden_size": 64, "vocab_size": 160, **case.variant.config}
    source = make_checkpoint(tmp_path / "checkpoint", Variant(case.variant.name, case.variant.family, config))
    expected = convert(source, tmp_path / "a.edgert", **F32)
    actual = convert(as_gguf(source, tmp_path / "model.gguf", case), tmp_path / "b.edgert", **F32)
    tokens = prompt_tokens(40, 160)
    a, b = (model.logits(model.sequence(), tokens) for model in map(open_model, (expected, actual)))
    assert np.abs(a - b).max() <= 2e-5 * np.abs(a).max()


@pytest.mark.parametrize("name", ["phi3", "gemma3n", "deepseek32"])
def test_other_architectures_are_refused_by_name_and_llama_cpp_is_named(name: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", metadata(name, QWEN3_MOE), gguf_arrays(qwen3_moe_arrays()))
    with pytest.raises(UnsupportedError, match=f"'{name}' is not supported.*--backend llama.cpp"):
        convert(file, tmp_path / "b.edgert")


def _mixtral(tmp_path: Path, expert_width: int) -> Path:
    keys = {key: value for key, value in QWEN3_MOE.items() if key != "expert_feed_forward_length"}
    keys |= {"feed_forward_length": 32, "expert_feed_forward_length": expert_width}
    arrays = {name: array for name, array in qwen3_moe_arrays().items() if "_norm." not in name}
    return write_gguf(tmp_path / "m.gguf", metadata("llama", keys), gguf_arrays(arrays))


def test_the_experts_width_may_be_stated_twice(tmp_path: Path) -> None:
    convert(_mixtral(tmp_path, 32), tmp_path / "b.edgert")


def test_two_widths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="expert_feed_forward_length"):
        convert(_mixtral(tmp_path, 48), tmp_path / "b.edgert")


def test_sizes_that_an_architecture_needs_are_not_assumed(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", metadata("deepseek2", QWEN3_MOE), gguf_arrays(qwen3_moe_arrays()))
    with pytest.raises(CorruptError, match="qk_rope_head_dim"):
        convert(file, tmp_path / "b.edgert")
