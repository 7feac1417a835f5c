"""The statistics of a calibration, computed from what torch modules see: hooks on transformers, sums in numpy's f64.

For families whose experts are one module called with (hidden states, chosen ids, weights) and hold gate_up_proj and
down_proj without biases.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

# A linear module of a layer, and what its input is called in a calibration.
_LINEAR = {
    "self_attn.q_proj": "mixer.input",
    "self_attn.q_a_proj": "mixer.input",
    "self_attn.q_b_proj": "attention.q_b",
    "self_attn.o_proj": "attention.o",
    "mlp.down_proj": "ffn.down",
    "mlp.gate_proj": "ffn.input",
    "mlp.shared_expert.down_proj": "shared.down",
    "mlp.shared_experts.down_proj": "shared.down",
}


class Seen:
    """What the modules of a model were called with, window by window."""

    def __init__(self, model: Any) -> None:
        self.linear: dict[str, list[np.ndarray]] = defaultdict(list)  # [tokens, n] by site
        self.logits: dict[int, list[np.ndarray]] = defaultdict(list)  # [tokens, E] by layer
        self.chosen: dict[int, list[np.ndarray]] = defaultdict(list)  # [tokens, top]
        self.weights: dict[int, list[np.ndarray]] = defaultdict(list)
        self.inner: dict[int, list[np.ndarray]] = defaultdict(list)  # [tokens, top, W]
        self.widths: dict[int, int] = {}
        for name, module in model.named_modules():
            parts = name.split(".")
            if name == "lm_head":
                module.register_forward_pre_hook(self._hook("output"))
            if len(parts) == 3 and parts[1] == "layers":
                module.register_forward_hook(self._behind(f"layers.{parts[2]}.residual"))
            if len(parts) < 4 or parts[1] != "layers":
                continue
            layer, rest = int(parts[2]), ".".join(parts[3:])
            if rest in _LINEAR:
                module.register_forward_pre_hook(self._hook(f"layers.{layer}.{_LINEAR[rest]}"))
            if rest == "mlp.experts":
                module.register_forward_pre_hook(self._experts(layer))
            if rest == "mlp.gate":
                module.register_forward_pre_hook(self._router(layer))

    def _hook(self, site: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            self.linear[site].append(_rows(args[0]))

        return hook

    def _behind(self, site: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            self.linear[site].append(_rows(output[0] if isinstance(output, tuple) else output))

        return hook

    def _router(self, layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            x = _rows(args[0])
            self.linear[f"layers.{layer}.ffn.input"].append(x)
            self.logits[layer].append(x @ module.weight.detach().numpy().astype(np.float64).T)

        return hook

    def _experts(self, layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            x, chosen, weights = _rows(args[0]), args[1].numpy(), args[2].detach().numpy()
            gate_up = module.gate_up_proj.detach().numpy().astype(np.float64)
            width = gate_up.shape[1] // 2
            both = np.einsum("th,tkwh->tkw", x, gate_up[chosen])
            gate, up = both[..., :width], both[..., width:]
            self.chosen[layer].append(chosen)
            self.weights[layer].append(weights.astype(np.float64))
            self.inner[layer].append(gate / (1 + np.exp(-gate)) * up)
            self.widths[layer] = width

        return hook


def _rows(x: Any) -> np.ndarray:
    rows: np.ndarray = x.detach().numpy().astype(np.float64)
    return rows.reshape(-1, rows.shape[-1])


def second_moments(x: np.ndarray) -> np.ndarray:
    sums: np.ndarray = x.T @ x
    return sums / max(1, len(x))


def statistics(seen: Seen) -> dict[str, np.ndarray]:
    """What a calibration's `tensors` hold, with whole matrices under NAME."""
    out = {site: second_moments(np.concatenate(rows)) for site, rows in seen.linear.items()}
    layers = sorted(seen.chosen)
    x = {i: np.concatenate(seen.linear[f"layers.{i}.ffn.input"]) for i in layers}
    used = {}
    for i in layers:
        experts = seen.logits[i][0].shape[1]
        used[i] = [np.eye(experts, dtype=np.int64)[chosen].sum(1) for chosen in seen.chosen[i]]  # [tokens, E]
    for m, i in enumerate(layers):
        at = f"layers.{i}."
        chosen, weights = np.concatenate(seen.chosen[i]), np.concatenate(seen.weights[i])
        inner, logits = np.concatenate(seen.inner[i]), np.concatenate(seen.logits[i])
        experts = logits.shape[1]
        out[at + "experts.tokens"] = np.concatenate(used[i]).sum(0)
        out[at + "experts.weight"] = np.bincount(chosen.ravel(), weights.ravel(), experts)
        out[at + "experts.weight_squared"] = np.bincount(chosen.ravel(), weights.ravel() ** 2, experts)
        out[at + "experts.token_before"] = sum(window[:-1].T @ window[1:] for window in used[i])
        out[at + "experts.input"] = np.stack(
            [second_moments(x[i][(chosen == e).any(1)]) for e in range(experts)]
        )
        out[at + "experts.inner"] = np.stack([second_moments(inner[chosen == e]) for e in range(experts)])
        out[at + "router.mean"], out[at + "router.logits"] = x[i].mean(0), logits.mean(0)
        for d in (1, 2):
            if m >= d:
                before = np.concatenate(used[layers[m - d]])
                out[at + f"experts.before_{d}"] = before.T @ np.concatenate(used[i])
            if m + d < len(layers):
                ahead = np.concatenate(seen.logits[layers[m + d]])
                out[at + f"router.cross_{d}"] = x[i].T @ ahead / len(ahead)
    return out
