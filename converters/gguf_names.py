"""Names of GGUF files in those of Hugging Face: metadata as config.json keys, and tensors."""

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
EXPERT_KEYS = {
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

SIGMOID = 2  # of expert_gating_func

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
    moe: str = "mlp."  # the module that has the experts
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
            return f"model.layers.{layer}.{self.moe}experts.{expert[2]}.{_SEPARATE[expert[1]]}.weight"
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
        expert = re.fullmatch(
            r"(?:[a-z_]+\.)?experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight", rest
        )
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
            if name.endswith((".weight", ".bias", ".scale")) or name == "ssm_a"
        }
        for part in ("gate", "up", "down"):  # all experts in one
            names[f"ffn_{part}_exps.weight"] = f"{self.moe}experts.{part}_proj"
            names[f"ffn_{part}_exps.bias"] = f"{self.moe}experts.{part}_proj_bias"
        return names
