"""The architectures of GGUF files that a family serves: each is one entry, which states what differs from the common
names."""

from collections.abc import Callable

from . import gguf_adjustments as adjustments
from .gguf_names import EXPERT_KEYS, Architecture

_QKV_BIAS = {"attn_q.bias": "qkv_bias"}
_ATTENTION_BIAS = {"attn_q.bias": "attention_bias"}
_LOCAL_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_OLMOE_EXPERTS = {key: there for key, there in EXPERT_KEYS.items() if there != "moe_intermediate_size"}
_ROUTED_EXPERTS = EXPERT_KEYS | {"expert_count": "n_routed_experts"}
_PARTS = ("gate", "up", "down")
_SHARED_EXPERTS = {f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in _PARTS}
_CORRECTION = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
_LATENT_ATTENTION = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
}
_SHORT_CONVOLUTION = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "attn_output": "self_attn.out_proj",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "ffn_gate_inp": "feed_forward.gate",
    "exp_probs_b.bias": "feed_forward.expert_bias",
}
_GATED_DELTA = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.decay",
}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_DELTA_KEYS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "full_attention_interval": "full_attention_interval",
}
_SHARED_WIDTH = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_EMBEDDING_NORM = {"token_embd_norm.weight": "model.embedding_norm.weight"}
_LLAMA = Architecture("llama", interleaved=True, biases=_ATTENTION_BIAS)
_MIXTRAL = Architecture("mixtral", interleaved=True, keys=_LOCAL_EXPERTS)

ARCHITECTURES: dict[str, Callable[[bool], Architecture] | Architecture] = {
    "llama": lambda routed: _MIXTRAL if routed else _LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture(
        "qwen2_moe",
        keys=EXPERT_KEYS | _SHARED_WIDTH,
        constants={"norm_topk_prob": False},
        biases=_QKV_BIAS,
    ),
    "qwen3": Architecture("qwen3", biases=_ATTENTION_BIAS),
    "qwen3moe": Architecture(
        "qwen3_moe", keys=EXPERT_KEYS, constants={"norm_topk_prob": True}, biases=_ATTENTION_BIAS
    ),
    "olmoe": Architecture(
        "olmoe", keys=_OLMOE_EXPERTS, constants={"norm_topk_prob": False}, biases=_ATTENTION_BIAS
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        keys=_LOCAL_EXPERTS
        | {"expert_feed_forward_length": "intermediate_size", "attention.sliding_window": "sliding_window"},
        layer={
            "attn_sinks.weight": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        biases=_ATTENTION_BIAS,
        adjust=adjustments.gpt_oss,
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        keys=_ROUTED_EXPERTS,
        layer=_SHARED_EXPERTS | _CORRECTION | {"post_attention_norm": "post_attention_layernorm"},
        biases=_ATTENTION_BIAS,
        adjust=adjustments.glm4_moe,
    ),
    "deepseek2": Architecture(
        "deepseek_v2",
        keys=_ROUTED_EXPERTS,
        without=("attention.key_length",),
        layer=_SHARED_EXPERTS | _CORRECTION | _LATENT_ATTENTION,
        adjust=adjustments.deepseek,
    ),
    "granite": Architecture(
        "granite", interleaved=True, keys=_GRANITE, biases=_ATTENTION_BIAS, adjust=adjustments.granite
    ),
    "granitemoe": Architecture(
        "granitemoe",
        interleaved=True,
        keys=_LOCAL_EXPERTS | _GRANITE | {"expert_shared_feed_forward_length": "shared_intermediate_size"},
        layer={
            "ffn_gate_inp": "block_sparse_moe.router",
            **{f"ffn_{part}_shexp": f"shared_mlp.{part}_proj" for part in _PARTS},
        },
        moe="block_sparse_moe.",
        biases=_ATTENTION_BIAS,
        adjust=adjustments.granite,
    ),
    "ernie4_5": Architecture("ernie4_5"),
    "ernie4_5-moe": Architecture(
        "ernie4_5_moe",
        keys={
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        layer=_SHARED_EXPERTS | {"exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias"},
        adjust=adjustments.ernie,
    ),
    "lfm2": Architecture(
        "lfm2",
        keys={"shortconv.l_cache": "conv_L_cache"},
        without=("attention.head_count_kv",),
        ends=_EMBEDDING_NORM,
        layer=_SHORT_CONVOLUTION,
        adjust=adjustments.lfm2,
    ),
    "lfm2moe": Architecture(
        "lfm2_moe",
        keys=EXPERT_KEYS | {"shortconv.l_cache": "conv_L_cache"},
        without=("attention.head_count_kv",),
        ends=_EMBEDDING_NORM,
        layer=_SHORT_CONVOLUTION,
        moe="feed_forward.",
        adjust=adjustments.lfm2,
    ),
    "qwen3next": Architecture(
        "qwen3_next",
        keys=EXPERT_KEYS | _DELTA_KEYS | _SHARED_WIDTH,
        layer=_GATED_DELTA | {"post_attention_norm": "post_attention_layernorm"},
        constants={"norm_topk_prob": True, "norms_are_zero_centred": False},
        adjust=adjustments.qwen3_next,
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text",
        keys=EXPERT_KEYS | _DELTA_KEYS | _SHARED_WIDTH,
        layer=_GATED_DELTA
        | {
            "post_attention_norm": "post_attention_layernorm",
            "ssm_alpha": "linear_attn.in_proj_a",
            "ssm_beta": "linear_attn.in_proj_b",
            "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
        },
        constants={"norm_topk_prob": True, "norms_are_zero_centred": False, "linear_value_heads_tiled": True},
        adjust=adjustments.qwen3_5_moe,
    ),
    "llama4": Architecture(
        "llama4_text",
        keys=_LOCAL_EXPERTS
        | {
            "feed_forward_length": "intermediate_size_mlp",
            "expert_feed_forward_length": "intermediate_size",
            "interleave_moe_layer_step": "interleave_moe_layer_step",
        },
        layer={
            "ffn_gate_inp": "feed_forward.router",
            **{f"ffn_{part}": f"feed_forward.{part}_proj" for part in _PARTS},
            **{f"ffn_{part}_shexp": f"feed_forward.shared_expert.{part}_proj" for part in _PARTS},
        },
        moe="feed_forward.",
        biases=_ATTENTION_BIAS,
        adjust=adjustments.llama4,
    ),
    "mistral3": Architecture("mistral", interleaved=True, adjust=adjustments.mistral3),
    "phimoe": Architecture(
        "phimoe",
        keys=_LOCAL_EXPERTS | {"attention.sliding_window": "sliding_window"},
        ends={"output_norm.bias": "model.norm.bias", "output.bias": "lm_head.bias"},
        layer={"ffn_gate_inp": "block_sparse_moe.gate"},
        moe="block_sparse_moe.",
        biases=_ATTENTION_BIAS,
        adjust=adjustments.phimoe,
    ),
    "gemma4": Architecture(
        "gemma4_text",
        keys={
            "expert_count": "num_experts",
            "expert_used_count": "top_k_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "attention.sliding_window": "sliding_window",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        without=("attention.head_count_kv",),
        layer={
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
            "post_ffw_norm_1": "post_feedforward_layernorm_1",
            "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
            "post_ffw_norm_2": "post_feedforward_layernorm_2",
            "layer_output_scale.weight": "layer_scalar",
            "ffn_gate_inp": "router.proj",
            "ffn_gate_inp.scale": "router.scale",
            "ffn_down_exps.scale": "router.per_expert_scale",
            "ffn_gate_up_exps.weight": "experts.gate_up_proj",
        },
        moe="",
        adjust=adjustments.gemma4,
    ),
}


def architecture(name: str, routed: bool) -> Architecture | None:
    """By llama.cpp's name; `routed`: whether it has experts. None for one that is not known."""
    entry = ARCHITECTURES.get(name)
    return entry if entry is None or isinstance(entry, Architecture) else entry(routed)
