"""Checkpoints of every family that GGUF files have, in both kinds of file.

Metadata is written from config.json and tensors are brought into llama.cpp's shapes as its own converter does; that these
files are what llama.cpp reads is held by tests/test_gguf_against_llama_cpp.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ggufs import interleave, metadata, write_gguf
from variants import Variant, make_checkpoint

from edgert.converters.gguf_architectures import architecture

Arrays = dict[str, np.ndarray]
Values = dict[str, Any]

# Beyond the family's own: sizes that ggml's kernels and most types of blocks take.
SIZES = {"hidden_size": 64, "vocab_size": 160, "max_position_embeddings": 256}
KEYS = {
    "num_hidden_layers": "block_count", "max_position_embeddings": "context_length", "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_experts": "expert_count", "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length", "head_dim": "attention.key_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A variant and llama.cpp's name for its architecture. `values` adds metadata, given the configuration; `reshape`
    changes tensors under their Hugging Face names; `permuted`: q and k have their halves by turns."""

    variant: Variant
    architecture: str
    permuted: bool = False
    values: Callable[[Values], Values] = lambda config: {}
    reshape: Callable[[Arrays, Values], Arrays] = lambda arrays, config: arrays
    within: float = 1e-5  # in the median; more where llama.cpp rounds or computes otherwise than the model


def model(family: str, name: str, config: Mapping[str, Any] | None = None, **others: Any) -> Model:
    sizes = {**SIZES, "num_key_value_heads": 2} if family != "deepseek" else SIZES
    return Model(Variant(others.pop("id", family), family, {**sizes, **(config or {})}), name, **others)


def write_pair(directory: Path, pair: Model) -> tuple[Path, Path]:
    """The checkpoint and the GGUF."""
    from safetensors.numpy import load_file

    source = make_checkpoint(directory / "checkpoint", pair.variant)
    config: Values = json.loads((source / "config.json").read_text())
    loaded = load_file(source / "model.safetensors")
    arrays = {name: array.astype(np.float32) for name, array in loaded.items()}
    arrays = pair.reshape(arrays, config)
    if pair.permuted:
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        for name, array in arrays.items():
            part = name.split(".")[-2]
            arrays[name] = interleave(array, config[heads[part]]) if part in heads else array
    rope = config.get("rope_parameters") or {}
    values = {there: config[here] for here, there in KEYS.items() if config.get(here) is not None}
    values["rope.freq_base"] = float(rope.get("rope_theta", 10000.0))
    values |= pair.values(config)
    values = {key: value for key, value in values.items() if value is not None}
    fields = metadata(pair.architecture, values, tokenizer__ggml__model="no_vocab")
    fields += metadata(pair.architecture, {"vocab_size": config["vocab_size"]})[1:]
    return source, write_gguf(directory / "model.gguf", fields, own_names(arrays, pair.architecture))


def own_names(arrays: Arrays, name: str) -> Arrays:
    """Under llama.cpp's names, the experts of a layer in one tensor."""
    chosen = architecture(name, any(".experts." in key for key in arrays))
    assert chosen is not None
    renamed: Arrays = {}
    experts: dict[str, list[np.ndarray]] = {}
    for key in sorted(arrays, key=_expert_number):
        own = chosen.own_name(key)
        assert own != key or key == "rope_freqs.weight", key
        if ".experts." in key and key.split(".experts.")[1][0].isdigit():
            experts.setdefault(own, []).append(arrays[key])
        else:
            renamed[own] = arrays[key][0] if own.endswith("ffn_gate_inp_shexp.weight") else arrays[key]
    return renamed | {own: np.stack(parts) for own, parts in experts.items()}


def _expert_number(name: str) -> tuple[int, str]:
    part = name.partition(".experts.")[2].partition(".")[0]
    return (int(part) if part.isdigit() else 0, name)


# --- what llama.cpp's converter does to tensors ---------------------------------------------------------


def mapped(
    change: Callable[[str, np.ndarray, Values], dict[str, np.ndarray]],
) -> Callable[[Arrays, Values], Arrays]:
    """`change` gives what takes a tensor's place."""

    def reshape(arrays: Arrays, config: Values) -> Arrays:
        changed: Arrays = {}
        for name, array in arrays.items():
            changed |= change(name, np.ascontiguousarray(array), config)
        return {name: np.ascontiguousarray(array) for name, array in changed.items()}

    return reshape


def _gpt_oss(name: str, array: np.ndarray, config: Values) -> Arrays:
    prefix, _, part = name.rpartition(".")
    if part == "gate_up_proj":
        return {
            f"{prefix}.gate_proj": array[..., ::2].swapaxes(1, 2),
            f"{prefix}.up_proj": array[..., 1::2].swapaxes(1, 2),
        }
    if part == "gate_up_proj_bias":
        return {f"{prefix}.gate_proj_bias": array[..., ::2], f"{prefix}.up_proj_bias": array[..., 1::2]}
    return {name: array.swapaxes(1, 2) if part == "down_proj" else array}


def _granite(name: str, array: np.ndarray, config: Values) -> Arrays:
    if name.endswith("input_linear.weight"):
        gate, up = np.split(array, 2, axis=-2)
        end = "" if "block_sparse" in name else ".weight"
        prefix = name.removesuffix("input_linear.weight") + ("experts." if not end else "")
        return {f"{prefix}gate_proj{end}": gate, f"{prefix}up_proj{end}": up}
    if name.endswith("block_sparse_moe.output_linear.weight"):
        return {name.replace("output_linear.weight", "experts.down_proj"): array}
    return {name.replace("output_linear", "down_proj").replace("router.layer", "router"): array}


def _mixtral(name: str, array: np.ndarray, config: Values) -> Arrays:
    return {name.replace("block_sparse_moe", "mlp"): array}


def _ernie(name: str, array: np.ndarray, config: Values) -> Arrays:
    return {name: array.reshape(-1) if "moe_statics" in name else array}


def _lfm2(name: str, array: np.ndarray, config: Values) -> Arrays:
    return {name: array[:, 0] if name.endswith("conv.conv.weight") else array}


def _deepseek(name: str, array: np.ndarray, config: Values) -> Arrays:
    if not name.endswith("kv_b_proj.weight"):
        return {name: array}
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    parts = array.reshape(heads, nope + config["v_head_dim"], -1)
    prefix = name.removesuffix("kv_b_proj.weight")
    return {
        f"{prefix}k_b_proj.weight": parts[:, :nope].swapaxes(1, 2),
        f"{prefix}v_b_proj.weight": parts[:, nope:],
    }


def _deepseek_values(config: Values) -> Values:
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    sigmoid = config["model_type"] == "deepseek_v3"
    return {
        "attention.head_count_kv": 1, "attention.key_length": rank + rotated, "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"], "attention.q_lora_rank": config["q_lora_rank"],
        "attention.kv_lora_rank": rank, "rope.dimension_count": rotated,
        "leading_dense_block_count": config["first_k_dense_replace"], "expert_count": config["n_routed_experts"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": float(config["routed_scaling_factor"]), "expert_weights_norm": sigmoid,
        "expert_gating_func": 2 if sigmoid else 1,
        "expert_group_count": config["n_group"] if sigmoid else None,
        "expert_group_used_count": config["topk_group"] if sigmoid else None,
    }  # fmt: skip


def _llama4(name: str, array: np.ndarray, config: Values) -> Arrays:
    prefix, _, part = name.rpartition(".")
    if part == "gate_up_proj":
        gate, up = np.split(array.swapaxes(1, 2), 2, axis=1)
        return {f"{prefix}.gate_proj": gate, f"{prefix}.up_proj": up}
    return {name: array.swapaxes(1, 2) if part == "down_proj" and array.ndim == 3 else array}


def _rows(name: str, array: np.ndarray, config: Values) -> Arrays:
    """Gate and up, one after the other in each expert."""
    prefix, _, part = name.rpartition(".")
    if part == "gate_up_proj" and array.ndim == 3:
        gate, up = np.split(array, 2, axis=1)
        return {f"{prefix}.gate_proj": gate, f"{prefix}.up_proj": up}
    return {name: array}


def _full_heads(config: Values) -> Values:
    """Of the layers with full attention."""
    return dict(next(iter(config["per_layer_config"].values())))


def _proportional(arrays: Arrays, config: Values) -> Arrays:
    """What frequencies of layers with full attention are divided by: most of a head does not rotate."""
    half = _full_heads(config)["head_dim"] // 2
    rotating = int(half * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    factors = np.where(np.arange(half) < rotating, 1.0, 1e30).astype(np.float32)
    return mapped(_rows)(arrays, config) | {"rope_freqs.weight": factors}


def _gemma4_values(config: Values) -> Values:
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    ropes, full, sliding = config["rope_parameters"], _full_heads(config)["head_dim"], config["head_dim"]
    heads = (_full_heads(config)["num_key_value_heads"], config["num_key_value_heads"])
    return {
        "attention.key_length": full, "attention.value_length": full, "rope.dimension_count": full,
        "attention.key_length_swa": sliding, "attention.value_length_swa": sliding, "rope.dimension_count_swa": sliding,
        "rope.freq_base": ropes["full_attention"]["rope_theta"],
        "rope.freq_base_swa": ropes["sliding_attention"]["rope_theta"],
        "attention.sliding_window": config["sliding_window"], "attention.sliding_window_pattern": slides,
        "attention.head_count_kv": [heads[each] for each in slides], "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0, "final_logit_softcapping": config["final_logit_softcapping"],
        "expert_count": config["num_experts"], "expert_used_count": config["top_k_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }  # fmt: skip


def _tiled(rows: np.ndarray, config: Values) -> np.ndarray:
    """Rows of all value heads, the first of every key head before the second ones."""
    keys = config["linear_num_key_heads"]
    heads = rows.reshape(keys, config["linear_num_value_heads"] // keys, -1, *rows.shape[1:])
    return np.asarray(heads.swapaxes(0, 1).reshape(rows.shape))


def _qwen3_5(name: str, array: np.ndarray, config: Values) -> Arrays:
    keys = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    part = name.rpartition(".linear_attn.")[2]
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        rows = array[:, 0] if array.ndim == 3 else array
        return {name: np.concatenate([rows[:keys], _tiled(rows[keys:], config)])}
    if part in ("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight", "dt_bias"):
        return {name: _tiled(array, config)}
    if part == "A_log":
        return {name.replace("A_log", "decay"): -np.exp(_tiled(array, config))}
    if part == "out_proj.weight":
        return {name: _tiled(array.T, config).T}
    if name.endswith("norm.weight") and part != "norm.weight":
        return {name: array + np.float32(1)}
    return _rows(name, array, config)


def _qwen3_5_values(config: Values) -> Values:
    return {
        "ssm.conv_kernel": config["linear_conv_kernel_dim"], "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"], "ssm.time_step_rank": config["linear_num_value_heads"],
        "ssm.inner_size": config["linear_num_value_heads"] * config["linear_value_head_dim"],
        "full_attention_interval": 4, "rope.dimension_count": config["head_dim"] // 4,
        "attention.value_length": config["head_dim"], "rope.dimension_sections": [11, 11, 10, 0],
        "attention.recurrent_layers": [kind == "linear_attention" for kind in config["layer_types"]],
    }  # fmt: skip


def _granite_values(config: Values) -> Values:
    return {
        "attention.scale": float(config["attention_multiplier"]), "residual_scale": config["residual_multiplier"],
        "embedding_scale": float(config["embedding_multiplier"]), "logit_scale": float(config["logits_scaling"]),
        "rope.dimension_count": 16,
    }  # fmt: skip


def _corrected_values(config: Values) -> Values:
    return {
        "expert_count": config["n_routed_experts"], "expert_shared_count": config["n_shared_experts"],
        "leading_dense_block_count": config["first_k_dense_replace"], "expert_gating_func": 2,
        "expert_weights_scale": float(config["routed_scaling_factor"]), "expert_weights_norm": True,
        "rope.dimension_count": config["head_dim"] // 2, "attention.value_length": config["head_dim"],
    }  # fmt: skip


_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_SCALED = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
_PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_LFM2_KEYS = {
    "attention.layer_norm_rms_epsilon": 2e-3,
    "shortconv.l_cache": 3,
    "attention.head_count_kv": [0, 0, 2, 0],
}

# llama.cpp has no other epsilon for the norms of the latent space.
_LATENT = {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}

MODELS = [
    model("qwen3_moe", "qwen3moe", {"num_experts_per_tok": 3}),
    model("qwen3_moe", "qwen3moe", {"tie_word_embeddings": True}, id="qwen3_moe-tied"),
    model("qwen3_moe", "qwen3moe", {"rope_parameters": _YARN}, id="qwen3_moe-yarn", values=lambda c: _SCALED),
    model("qwen2_moe", "qwen2moe", {"norm_topk_prob": False}),
    model("olmoe", "olmoe", {"norm_topk_prob": False, "num_key_value_heads": 4}),
    model("mixtral", "llama", _PLAIN, permuted=True, reshape=mapped(_mixtral), values=lambda c: {"rope.dimension_count": 16}),
    model("llama", "llama", permuted=True, values=lambda c: {"rope.dimension_count": 16}),
    model("llama", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
          id="llama-linear", permuted=True,
          values=lambda c: {"rope.dimension_count": 16, "rope.scaling.type": "linear", "rope.scaling.factor": 2.5}),
    model("llama", "llama", {"attention_bias": True}, id="llama-bias", permuted=True,
          values=lambda c: {"rope.dimension_count": 16}),
    model("qwen2", "qwen2"),
    model("qwen3", "qwen3"),
    model("gpt_oss", "gpt-oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}, "head_dim": 32,
                                 "intermediate_size": 64},
          reshape=mapped(_gpt_oss), values=lambda c: {
              "attention.sliding_window": c["sliding_window"], "attention.value_length": c["head_dim"],
              "expert_feed_forward_length": c["intermediate_size"]}),
    model("glm4_moe", "glm4moe", {"head_dim": 32, "rope_parameters": {
              "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
          values=_corrected_values),
    model("granite", "granite", permuted=True, values=_granite_values),
    model("granitemoe", "granitemoe", permuted=True, reshape=mapped(_granite), values=_granite_values),
    model("granitemoeshared", "granitemoe", {"attention_multiplier": 0.3}, permuted=True, reshape=mapped(_granite),
          values=lambda c: {**_granite_values(c), "expert_shared_feed_forward_length": c["shared_intermediate_size"]}),
    model("mistral", "mistral3", {"sliding_window": None}, id="mistral3", permuted=True,
          values=lambda c: {"rope.dimension_count": 16}),
    model("ministral3", "mistral3", permuted=True, values=lambda c: {
        **_SCALED, "rope.scaling.original_context_length": 16, "rope.dimension_count": 16,
        "rope.scaling.yarn_log_multiplier": 1.0,
        "attention.temperature_scale": c["rope_parameters"]["llama_4_scaling_beta"]}),
    model("llama4_text", "llama4", {
              "attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "no_rope_layer_interval": 4,
              "num_hidden_layers": 4, "interleave_moe_layer_step": 2},
          reshape=mapped(_llama4), values=lambda c: {
              "feed_forward_length": c["intermediate_size_mlp"], "expert_feed_forward_length": c["intermediate_size"],
              "interleave_moe_layer_step": c["interleave_moe_layer_step"], "rope.dimension_count": 16,
              "attention.value_length": 16}),
    model("gemma4_text", "gemma4", reshape=_proportional, values=_gemma4_values, within=2e-3),  # its gelu is a table of f16
    model("qwen3_5_moe_text", "qwen35moe", {"head_dim": 128, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
              "linear_num_key_heads": 2, "linear_num_value_heads": 6},
          reshape=mapped(_qwen3_5), values=_qwen3_5_values, within=2e-3),  # its epsilon beside q and k is another
    model("ernie4_5", "ernie4_5"),
    model("ernie4_5_moe", "ernie4_5-moe", reshape=mapped(_ernie), values=lambda c: {
        "expert_count": c["moe_num_experts"], "expert_used_count": c["moe_k"], "interleave_moe_layer_step": 1,
        "expert_shared_count": c["moe_num_shared_experts"], "leading_dense_block_count": c["moe_layer_start_index"],
        "expert_shared_feed_forward_length": c["moe_num_shared_experts"] * c["moe_intermediate_size"]}),
    model("deepseek_v2", "deepseek2", {**_LATENT, "q_lora_rank": 24}, reshape=mapped(_deepseek), values=_deepseek_values),
    model("deepseek_v3", "deepseek2", _LATENT, reshape=mapped(_deepseek), values=_deepseek_values),
    model("deepseek_v3", "deepseek2", {**_LATENT, "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
          id="deepseek_v3-yarn", reshape=mapped(_deepseek),
          values=lambda c: {**_deepseek_values(c), **_SCALED, "rope.scaling.yarn_log_multiplier": 0.07}),
    model("lfm2", "lfm2", reshape=mapped(_lfm2),
          values=lambda c: {**_LFM2_KEYS, "feed_forward_length": 80}),
    model("lfm2_moe", "lfm2moe", reshape=mapped(_lfm2), values=lambda c: {
        **_LFM2_KEYS, "leading_dense_block_count": 1, "expert_gating_func": 2}),
]  # fmt: skip
