"""What llama.cpp's architectures are called here: their metadata as config.json keys, their tensors' Hugging Face names.

An architecture that a family serves is one entry; what differs from the common names is stated in it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
# All experts in one tensor; these names have no ending here.
_STACKED = {
    "ffn_gate_exps.weight": "mlp.experts.gate_proj",
    "ffn_up_exps.weight": "mlp.experts.up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}
ROWS = frozenset({"ffn_gate_inp_shexp.weight"})  # matrices of one row that are stored as vectors
_SEPARATE = {
    "ffn_gate": "w1",
    "ffn_up": "w3",
    "ffn_down": "w2",
}  # one tensor an expert, as files of 2023 have it
_LAYER_NAME = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)")
_EXPERT_NAME = re.compile(r"(ffn_gate|ffn_up|ffn_down)\.(0|[1-9]\d{0,5})\.weight")

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """`constants` are what the architecture implies and no key states; `keys` and `layer` extend the common names;
    `interleaved`: neighbouring elements of a head are rotated together."""

    model_type: str
    interleaved: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    layer: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, str] = field(
        default_factory=dict
    )  # of layer 0: the flag that says whether it is there

    def all_keys(self) -> dict[str, str]:
        return _KEYS | dict(self.keys)

    def hugging_face_name(self, name: str) -> str | None:
        """None for a tensor that has no counterpart."""
        if name in _ENDS:
            return _ENDS[name]
        match = _LAYER_NAME.fullmatch(name)
        if match is None:
            return None
        layer, rest = match.groups()
        expert = _EXPERT_NAME.fullmatch(rest)
        if expert is not None:
            return f"model.layers.{layer}.mlp.experts.{expert[2]}.{_SEPARATE[expert[1]]}.weight"
        if rest in _STACKED:
            return f"model.layers.{layer}.{_STACKED[rest]}"
        stem, _, ending = rest.rpartition(".")
        known = (_LAYER | dict(self.layer)).get(stem)
        return (
            None
            if known is None or ending not in ("weight", "bias")
            else f"model.layers.{layer}.{known}.{ending}"
        )

    def own_name(self, name: str) -> str:
        """The other way round, for messages."""
        ends = {there: here for here, there in _ENDS.items()}
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            return ends.get(name, name)
        layer, rest = match.groups()
        stacked = {there: here for here, there in _STACKED.items()}
        if rest in stacked:
            return f"blk.{layer}.{stacked[rest]}"
        expert = re.fullmatch(r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight", rest)
        if expert is not None:
            return f"blk.{layer}.ffn_{expert[1]}_exps.weight"
        stem, _, ending = rest.rpartition(".")
        stems = {there: here for here, there in (_LAYER | dict(self.layer)).items()}
        return f"blk.{layer}.{stems[stem]}.{ending}" if stem in stems else name


_QKV_BIAS = {"attn_q.bias": "qkv_bias"}
_ATTENTION_BIAS = {"attn_q.bias": "attention_bias"}
_LLAMA = Architecture("llama", interleaved=True, biases=_ATTENTION_BIAS)
_MIXTRAL = Architecture(
    "mixtral",
    interleaved=True,
    keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
)

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
        "olmoe", keys=_EXPERT_KEYS, constants={"norm_topk_prob": False}, biases=_ATTENTION_BIAS
    ),
}


def architecture(name: str, routed: bool) -> Architecture | None:
    """By llama.cpp's name; `routed`: whether it has experts. None for one that is not known."""
    entry = ARCHITECTURES.get(name)
    return entry if entry is None or isinstance(entry, Architecture) else entry(routed)
