"""What llama.cpp's architectures are called here: their metadata as config.json keys, their tensors' Hugging Face names.

An architecture that a family serves is one entry; what differs from the common names is stated in it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

# Keys that most architectures have, behind "ARCHITECTURE.".
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
}
_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Of a layer, without ".weight" and ".bias".
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
ROWS = frozenset({"ffn_gate_inp_shexp.weight"})  # matrices of one row that are stored as vectors
CONVOLUTIONS = frozenset({"shortconv.conv.weight", "ssm_conv1d.weight"})  # a kernel for each channel
# One tensor an expert, as files of 2023 have it.
_SEPARATE = {"ffn_gate": "w1", "ffn_up": "w3", "ffn_down": "w2"}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)")
_EXPERT_NAME = re.compile(r"(ffn_gate|ffn_up|ffn_down)\.(0|[1-9]\d{0,5})\.weight")

Config = dict[str, Any]


class Metadata(Protocol):
    """The metadata of one architecture, by keys without its name."""

    def value(self, key: str) -> Any:
        """A number or flag, None where there is none; of an array the one value that every layer has."""

    def values(self, key: str) -> tuple[Any, ...] | None:
        """One a layer."""

    def has(self, tensor: str) -> bool: ...


@dataclass(frozen=True)
class Architecture:
    """`keys`, `ends` and `layer` extend the common names (a name with an ending stands for that tensor alone), `without`
    takes common keys away; `constants` are what the architecture implies and no key states; `interleaved`: neighbouring
    elements of a head are rotated together."""

    model_type: str
    interleaved: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    ends: Mapping[str, str] = field(default_factory=dict)
    layer: Mapping[str, str] = field(default_factory=dict)
    moe: str = "mlp"  # the module that has the experts
    constants: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, str] = field(
        default_factory=dict
    )  # a tensor of layer 0, and the flag that it is there
    adjust: Callable[[Metadata, Config], None] | None = None  # for what is no mere renaming

    def all_keys(self) -> dict[str, str]:
        return {key: there for key, there in {**_KEYS, **self.keys}.items() if key not in self.without}

    def hugging_face_name(self, name: str) -> str | None:
        """None for a tensor that has no counterpart."""
        if name in _ENDS or name in self.ends:
            return {**_ENDS, **self.ends}[name]
        match = _LAYER_NAME.fullmatch(name)
        if match is None:
            return None
        layer, rest = match.groups()
        expert = _EXPERT_NAME.fullmatch(rest)
        if expert is not None:
            return f"model.layers.{layer}.{self.moe}.experts.{expert[2]}.{_SEPARATE[expert[1]]}.weight"
        if rest.startswith("nextn."):  # of the layers that predict further tokens
            return f"model.layers.{layer}.{rest}"
        known = self._exact_names().get(rest)
        if known is None:
            stem, _, ending = rest.rpartition(".")
            known = {**_LAYER, **self.layer}.get(stem)
            if known is None or ending not in ("weight", "bias"):
                return None
            known = f"{known}.{ending}"
        return f"model.layers.{layer}.{known}"

    def own_name(self, name: str) -> str:
        """The other way round, for messages."""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            return {there: here for here, there in {**_ENDS, **self.ends}.items()}.get(name, name)
        layer, rest = match.groups()
        expert = re.fullmatch(r"[a-z_]+\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight", rest)
        if expert is not None:
            part = {"w1": "gate", "w2": "down", "w3": "up"}.get(expert[1], expert[1].removesuffix("_proj"))
            return f"blk.{layer}.ffn_{part}_exps.weight"
        exact = {there: here for here, there in self._exact_names().items()}
        if rest in exact:
            return f"blk.{layer}.{exact[rest]}"
        stem, _, ending = rest.rpartition(".")
        stems = {there: here for here, there in {**_LAYER, **self.layer}.items()}
        return f"blk.{layer}.{stems[stem]}.{ending}" if stem in stems else name

    def _exact_names(self) -> dict[str, str]:
        """Of tensors whose counterparts end otherwise."""
        names = {
            name: there
            for name, there in self.layer.items()
            if name.endswith((".weight", ".bias")) or name == "ssm_a"
        }
        for part in ("gate", "up", "down"):  # all experts in one
            names[f"ffn_{part}_exps.weight"] = f"{self.moe}.experts.{part}_proj"
            names[f"ffn_{part}_exps.bias"] = f"{self.moe}.experts.{part}_proj_bias"
        return names


# --- what is no mere renaming -----------------------------------------------------------------------------


def _partial_rotation(metadata: Metadata, config: Config) -> None:
    rotated, head = metadata.value("rope.dimension_count"), config.get("head_dim")
    if rotated is not None and isinstance(head, int) and head > 0:
        config["partial_rotary_factor"] = rotated / head


def _gpt_oss(metadata: Metadata, config: Config) -> None:
    scaling = config.get("rope_scaling")
    if scaling is not None and scaling["rope_type"] == "yarn":
        scaling["truncate"] = False  # as the model does it, and no key says


def _further_layers(metadata: Metadata, config: Config) -> None:
    """Layers that predict further tokens count among all."""
    further = metadata.value("nextn_predict_layers") or 0
    if further:
        config["num_nextn_predict_layers"] = further
        config["num_hidden_layers"] -= further


def _corrected_routing(metadata: Metadata, config: Config) -> None:
    config["first_k_dense_replace"] = metadata.value("leading_dense_block_count") or 0
    config["n_shared_experts"] = metadata.value("expert_shared_count") or 0
    config["routed_scaling_factor"] = metadata.value("expert_weights_scale") or 1.0
    config["norm_topk_prob"] = bool(metadata.value("expert_weights_norm"))
    config["n_group"] = metadata.value("expert_group_count") or 1
    config["topk_group"] = metadata.value("expert_group_used_count") or config["n_group"]


def _glm4_moe(metadata: Metadata, config: Config) -> None:
    _partial_rotation(metadata, config)
    _corrected_routing(metadata, config)
    _further_layers(metadata, config)
    if metadata.value("expert_gating_func") not in (None, _SIGMOID):
        config["scoring_func"] = "not sigmoid"  # which nobody reads, so it is refused
    config["use_qk_norm"] = metadata.has("blk.0.attn_q_norm.weight")


def _deepseek(metadata: Metadata, config: Config) -> None:
    _corrected_routing(metadata, config)
    _further_layers(metadata, config)
    rotated = metadata.value("rope.dimension_count") or 0
    # Where k_b and v_b are apart, the lengths of heads are those in the latent space, and others state the model's own.
    lengths = [(metadata.value(f"attention.{part}_length_mla"), metadata.value(f"attention.{part}_length"))
               for part in ("key", "value")]  # fmt: skip
    key, value = (own or general for own, general in lengths)
    config |= {"qk_rope_head_dim": rotated, "qk_nope_head_dim": (key or 0) - rotated, "v_head_dim": value}
    config["q_lora_rank"] = metadata.value("attention.q_lora_rank") or None
    config["kv_lora_rank"] = metadata.value("attention.kv_lora_rank")
    config["num_key_value_heads"] = config.get("num_attention_heads")
    gating = metadata.value("expert_gating_func")
    if not gating and metadata.has(f"blk.{config['first_k_dense_replace']}.exp_probs_b.bias"):
        gating = _SIGMOID  # older files do not state it
    if gating == _SIGMOID:
        config |= {"model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    else:
        limited = config["topk_group"] < config["n_group"]
        config["topk_method"] = "group_limited_greedy" if limited else "greedy"
    multiplier, scaling = metadata.value("rope.scaling.yarn_log_multiplier"), config.get("rope_scaling")
    if multiplier and scaling is not None:
        scaling |= {"mscale": 10 * multiplier, "mscale_all_dim": 10 * multiplier}


def _granite(metadata: Metadata, config: Config) -> None:
    if config.get("shared_intermediate_size"):
        config["model_type"] = "granitemoeshared"


def _ernie(metadata: Metadata, config: Config) -> None:
    config["moe_num_shared_experts"] = metadata.value("expert_shared_count") or 0
    config["moe_layer_interval"] = metadata.value("interleave_moe_layer_step") or 1
    config["moe_layer_start_index"] = metadata.value("leading_dense_block_count") or 0
    metadata.value("expert_shared_feed_forward_length")  # the tensors' shapes say it


def _lfm2(metadata: Metadata, config: Config) -> None:
    heads = metadata.values("attention.head_count_kv") or ()
    config["layer_types"] = ["full_attention" if count else "conv" for count in heads]
    config["num_key_value_heads"] = max(heads, default=0)
    config["norm_eps"] = config.pop("rms_norm_eps", None)
    if config["model_type"] == "lfm2":
        config["block_auto_adjust_ff_dim"] = False
        return
    config["num_dense_layers"] = metadata.value("leading_dense_block_count") or 0
    config["use_expert_bias"] = any(metadata.has(f"blk.{i}.exp_probs_b.bias") for i in range(len(heads)))
    config.setdefault("norm_topk_prob", True)
    if metadata.value("expert_gating_func") not in (None, _SIGMOID):
        config["scoring_func"] = "not sigmoid"


def _qwen3_next(metadata: Metadata, config: Config) -> None:
    _partial_rotation(metadata, config)
    _further_layers(metadata, config)
    config["linear_num_value_heads"] = heads = metadata.value("ssm.time_step_rank")
    width = metadata.value("ssm.inner_size")
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        config["linear_value_head_dim"] = width // heads
    recurrent = metadata.values("attention.recurrent_layers")
    if recurrent is not None:
        kinds = ("full_attention", "linear_attention")
        config["layer_types"] = [kinds[bool(each)] for each in recurrent][: config["num_hidden_layers"]]


# --- the architectures ------------------------------------------------------------------------------------

_SIGMOID = 2  # of expert_gating_func
_QKV_BIAS = {"attn_q.bias": "qkv_bias"}
_ATTENTION_BIAS = {"attn_q.bias": "attention_bias"}
_LOCAL_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_OLMOE_EXPERTS = {key: there for key, there in _EXPERT_KEYS.items() if there != "moe_intermediate_size"}
_ROUTED_EXPERTS = _EXPERT_KEYS | {"expert_count": "n_routed_experts"}
_SHARED_EXPERTS = {f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}
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
_EMBEDDING_NORM = {"token_embd_norm.weight": "model.embedding_norm.weight"}
_LLAMA = Architecture("llama", interleaved=True, biases=_ATTENTION_BIAS)
_MIXTRAL = Architecture("mixtral", interleaved=True, keys=_LOCAL_EXPERTS)

ARCHITECTURES: dict[str, Callable[[bool], Architecture] | Architecture] = {
    "llama": lambda routed: _MIXTRAL if routed else _LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture(
        "qwen2_moe",
        keys=_EXPERT_KEYS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        constants={"norm_topk_prob": False},
        biases=_QKV_BIAS,
    ),
    "qwen3": Architecture("qwen3", biases=_ATTENTION_BIAS),
    "qwen3moe": Architecture(
        "qwen3_moe", keys=_EXPERT_KEYS, constants={"norm_topk_prob": True}, biases=_ATTENTION_BIAS
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
        adjust=_gpt_oss,
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        keys=_ROUTED_EXPERTS,
        layer=_SHARED_EXPERTS | _CORRECTION | {"post_attention_norm": "post_attention_layernorm"},
        biases=_ATTENTION_BIAS,
        adjust=_glm4_moe,
    ),
    "deepseek2": Architecture(
        "deepseek_v2",
        keys=_ROUTED_EXPERTS,
        without=("attention.key_length",),
        layer=_SHARED_EXPERTS | _CORRECTION | _LATENT_ATTENTION,
        adjust=_deepseek,
    ),
    "granitemoe": Architecture(
        "granitemoe",
        interleaved=True,
        keys=_LOCAL_EXPERTS
        | {
            "expert_shared_feed_forward_length": "shared_intermediate_size",
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        layer={
            "ffn_gate_inp": "block_sparse_moe.router",
            **{f"ffn_{part}_shexp": f"shared_mlp.{part}_proj" for part in ("gate", "up", "down")},
        },
        moe="block_sparse_moe",
        biases=_ATTENTION_BIAS,
        adjust=_granite,
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
        adjust=_ernie,
    ),
    "lfm2": Architecture(
        "lfm2",
        keys={"shortconv.l_cache": "conv_L_cache"},
        without=("attention.head_count_kv",),
        ends=_EMBEDDING_NORM,
        layer=_SHORT_CONVOLUTION,
        adjust=_lfm2,
    ),
    "lfm2moe": Architecture(
        "lfm2_moe",
        keys=_EXPERT_KEYS | {"shortconv.l_cache": "conv_L_cache"},
        without=("attention.head_count_kv",),
        ends=_EMBEDDING_NORM,
        layer=_SHORT_CONVOLUTION,
        moe="feed_forward",
        adjust=_lfm2,
    ),
    "qwen3next": Architecture(
        "qwen3_next",
        keys=_EXPERT_KEYS
        | {
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
            "ssm.conv_kernel": "linear_conv_kernel_dim",
            "ssm.state_size": "linear_key_head_dim",
            "ssm.group_count": "linear_num_key_heads",
            "full_attention_interval": "full_attention_interval",
        },
        layer=_GATED_DELTA | {"post_attention_norm": "post_attention_layernorm"},
        constants={"norm_topk_prob": True, "norms_are_zero_centred": False},
        adjust=_qwen3_next,
    ),
}


def architecture(name: str, routed: bool) -> Architecture | None:
    """By llama.cpp's name; `routed`: whether it has experts. None for one that is not known."""
    entry = ARCHITECTURES.get(name)
    return entry if entry is None or isinstance(entry, Architecture) else entry(routed)
