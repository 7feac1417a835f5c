"""A calibration made by hand, for the tests of what reads one."""

from __future__ import annotations

from typing import Any

import numpy as np


def calibration(*, full: bool = True, seed: int = 0) -> Any:
    """Two MoE layers (3 and 4 experts of width 6, 2 a token, hidden size 8) behind a dense one; 100 tokens. In the first
    MoE layer nobody uses expert 2."""
    from edgert.calibration import Calibration
    from edgert.calibration_file import Measured, MoeLayer

    rng = np.random.default_rng(seed)
    moe = (MoeLayer(1, 3, 2, 6), MoeLayer(2, 4, 2, 6))
    model = Measured("qwen3_moe", 8, 320, 3, moe, {"final_norm": "0123456789abcdef"})
    uses = {1: [100, 100, 0], 2: [100, 50, 30, 20]}
    tensors: dict[str, np.ndarray] = {}

    def moments(name: str, *shape: int, whole: bool = full) -> None:
        *experts, n = shape
        rows = rng.standard_normal((*experts, 200, n))
        matrices = np.einsum("...ti,...tj->...ij", rows, rows) / 200
        lower = np.tril_indices(n)
        if whole:
            tensors[f"{name}.triangle"] = matrices[..., lower[0], lower[1]].astype(np.float32)
        else:
            tensors[f"{name}.diagonal"] = np.diagonal(matrices, axis1=-2, axis2=-1).astype(np.float32)

    for row in moe:
        at = f"layers.{row.layer}."
        experts = row.num_experts
        used = np.array(uses[row.layer], np.int64)
        tensors[at + "experts.tokens"] = used
        tensors[at + "experts.weight"] = used * 0.5
        tensors[at + "experts.weight_squared"] = used * 0.3
        tensors[at + "experts.token_before"] = np.outer(used, used) // 100
        moments(at + "experts.input", experts, 8)
        moments(at + "experts.inner", experts, 6)
        moments(at + "ffn.input", 8)
        moments(at + "residual", 8, whole=False)
        tensors[at + "router.mean"] = rng.standard_normal(8).astype(np.float32)
        tensors[at + "router.logits"] = rng.standard_normal(experts).astype(np.float32)
    tensors["layers.2.experts.before_1"] = np.outer(uses[1], uses[2]).astype(np.int64)
    tensors["layers.1.router.cross_1"] = rng.standard_normal((8, 4)).astype(np.float32)
    for layer in range(3):
        moments(f"layers.{layer}.mixer.input", 8)
        moments(f"layers.{layer}.attention.o", 10)
    moments("output", 8, whole=False)
    return Calibration(model, tokens=100, window=64, tensors=tensors)


def recipe_of(model: Any) -> dict[str, Any]:
    """The part of a recipe that says as much as `model` does."""
    moe = {row.layer: row for row in model.moe}
    blocks = [
        {"ffn": {"kind": "dense", "intermediate_size": 16}}
        if layer not in moe
        else {
            "ffn": {
                "kind": "moe",
                "num_experts": moe[layer].num_experts,
                "num_experts_per_tok": moe[layer].num_experts_per_tok,
                "moe_intermediate_size": moe[layer].width,
            }
        }
        for layer in range(model.num_layers)
    ]
    return {
        "architecture": model.architecture,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "blocks": blocks,
        "layers": list(range(model.num_layers)),
    }
