"""Which of a bundle's matrices a module of an adapter is."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from edgert.errors import InvalidArgumentError, UnsupportedError

from .adapter_base import Base

LAYER = re.compile(r"(?:.+[.])?layers[.](\d{1,5})[.](.+)")
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe|feed_forward)[.]experts[.](\d{1,6})[.](\w+)")

# What families call a layer's modules, by the bundle's names; used where the checkpoint's own names do not decide.
_MODULES = {
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "self_attn.out_proj": "attention.o",
    "self_attn.q_a_proj": "attention.q_a",
    "self_attn.q_b_proj": "attention.q_b",
    "self_attn.kv_a_proj_with_mqa": "attention.kv_a",
    "conv.in_proj": "conv.in",
    "conv.out_proj": "conv.o",
    "feed_forward.w1": "ffn.gate",
    "feed_forward.w3": "ffn.up",
    "feed_forward.w2": "ffn.down",
    "mlp.gate": "router",
    "mlp.router": "router",
    "block_sparse_moe.gate": "router",
    "block_sparse_moe.router": "router",
    "block_sparse_moe.router.layer": "router",
    "router.proj": "router",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
    "mlp.shared_expert.gate_proj": "shared.gate",
    "mlp.shared_expert.up_proj": "shared.up",
    "mlp.shared_expert.down_proj": "shared.down",
    "mlp.shared_experts.gate_proj": "shared.gate",
    "mlp.shared_experts.up_proj": "shared.up",
    "mlp.shared_experts.down_proj": "shared.down",
    "mlp.shared_expert_gate": "shared.router",
}
_EXPERT_PARTS = {
    **dict.fromkeys(("gate_proj", "w1"), "gate"),
    **dict.fromkeys(("up_proj", "w3"), "up"),
    **dict.fromkeys(("down_proj", "w2"), "down"),
}
# The same of norms.
_NORMS = {
    "norm": "final_norm",
    "embedding_norm": "final_norm",
    "input_layernorm": "attention_norm",
    "operator_norm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "ffn_norm": "ffn_norm",
}


@dataclass(frozen=True)
class Targets:
    """The matrices of `base`, for the adapter at `adapter_path`."""

    adapter_path: Path
    base: Base

    def of(self, module: str) -> str:
        """The bundle's name of a module's matrix."""
        names = self.base.by_source.get(f"{module}.weight")
        if names is not None:
            if len(names) > 1:
                raise UnsupportedError(
                    f"{self.adapter_path}: {module}: the bundle has its weights in several matrices ({', '.join(names)}), and this "
                    "version runs no adapters of such"
                )
            (name,) = names
            if name == "embedding":
                raise UnsupportedError(
                    f"{self.adapter_path}: {module}: adapters of embeddings are not run by this version"
                )
            return self._matrix(name, module)
        if module == "lm_head" or module.endswith(".lm_head"):
            return "output"
        match = LAYER.fullmatch(module)
        if match is None:
            self.unknown(module)
        layer, rest = int(match[1]), match[2]
        expert = _EXPERT.fullmatch(rest)
        if expert is not None and expert[2] in _EXPERT_PARTS:
            return f"layers.{layer}.experts.{int(expert[1])}.{_EXPERT_PARTS[expert[2]]}"
        target = f"layers.{layer}.{_MODULES.get(rest, rest)}"
        if target not in self.base.by_name:
            target = target.replace(".ffn.", ".shared.")  # beside experts
        if target not in self.base.by_name:
            self.unknown(module)
        return self._matrix(target, module)

    def norm(self, module: str) -> str | None:
        """The bundle's name of a norm, as a checkpoint calls it; None where it is none."""
        names = self.base.by_source.get(f"{module}.weight")
        if names is not None:
            return names[0] if len(names) == 1 else None
        match = LAYER.fullmatch(module)
        if match is None:
            name = _NORMS.get(module.rpartition(".")[2], "")
            return name if name == "final_norm" else None
        layer = f"layers.{int(match[1])}."
        if match[2] == "post_attention_layernorm" and f"{layer}attention_post_norm" in self.base.by_name:
            return f"{layer}attention_post_norm"
        name = layer + _NORMS.get(match[2], "?")
        return name if name in self.base.by_name else None

    def _matrix(self, name: str, module: str) -> str:
        if len(self.base.by_name[name]["shape"]) != 2:
            self.unknown(module)
        return name

    def unknown(self, module: str) -> NoReturn:
        raise InvalidArgumentError(
            f"{self.adapter_path}: module {module[:120]!r}: the base {self.base.path.name} ({self.base.architecture}) has no "
            "matrix of this name; is the adapter of another model?"
        )
