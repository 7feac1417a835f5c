"""Adapters as PEFT saves them, written by hand for the tiny checkpoint, each with the weights that it makes of the base's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import TINY_CONFIG, Tensors, qwen3_moe_shapes, random_weights, tiny_checkpoint

PREFIX = "base_model.model."
LAYERS = TINY_CONFIG["num_hidden_layers"]
EXPERTS = TINY_CONFIG["num_experts"]
RANK = 4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_peft(directory: Path, tensors: Tensors, **config: Any) -> Path:
    """adapter_config.json and adapter_model.safetensors, the latter by the safetensors library."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@contextmanager
def loaded(bundle: Path, directories: Mapping[str, Path], **knobs: Any) -> Iterator[Any]:
    """A model with these adapters loaded, by name; none is on."""
    import edgert

    with edgert.load(bundle, **{"memory": "64MiB", "threads": 1, **knobs}) as model:
        for name, path in directories.items():
            model.load_adapter(path, name)
        yield model


def base_weights(**overrides: Any) -> Tensors:
    """Of tiny_checkpoint(), by name."""
    return random_weights(qwen3_moe_shapes(TINY_CONFIG | overrides), 0)


@dataclass
class Adapter:
    """What is written, and the weights that stand in place of the base's."""

    config: dict[str, Any]
    tensors: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        return write_peft(directory, self.tensors, **self.config)

    def merged(self, directory: Path) -> Path:
        """The checkpoint with the adapter in its weights."""
        from checkpoints import write_weights

        tiny_checkpoint(directory)
        write_weights(directory, base_weights() | self.weights)
        return directory


def _attention() -> list[str]:
    return [f"model.layers.{i}.self_attn.{name}" for i in range(LAYERS) for name in ATTENTION]


def _random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * 0.2).astype(np.float32)


def lora(seed: int = 0, *, root: bool = False, magnitudes: bool = False) -> Adapter:
    """LoRA of every projection of attention, of expert 3's up and of the router; rsLoRA, or DoRA of attention alone."""
    rng = np.random.default_rng(seed)
    base = base_weights()
    made = Adapter(
        {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "use_rslora": root, "use_dora": magnitudes}
    )
    made.config["rank_pattern"] = {"q_proj": 2}
    made.config["alpha_pattern"] = {"layers.1.self_attn.k_proj": 3}
    modules = _attention()
    if not magnitudes:
        modules += ["model.layers.1.mlp.experts.3.up_proj", "model.layers.2.mlp.gate"]
    for module in modules:
        weights = base[f"{module}.weight"]
        rank = 2 if module.endswith("q_proj") else RANK
        a, b = _random(rng, rank, weights.shape[1]), _random(rng, weights.shape[0], rank)
        alpha = 3 if module.endswith("layers.1.self_attn.k_proj") else 6
        changed = weights + b @ a * np.float32(alpha / (math.sqrt(rank) if root else rank))
        made.tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        if magnitudes:
            norms = np.linalg.norm(changed, axis=1)
            magnitude = (np.linalg.norm(weights, axis=1) * rng.uniform(0.8, 1.2, norms.shape)).astype(
                np.float32
            )
            made.tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude
            changed = changed * (magnitude / norms)[:, np.newaxis]
        made.weights[f"{module}.weight"] = changed
    return made


def shira(seed: int = 0) -> Adapter:
    """SHiRA of the attention and of one expert, its indices in no order."""
    rng = np.random.default_rng(seed)
    base = base_weights()
    made = Adapter({"peft_type": "SHIRA", "r": 2})
    for module in [*_attention(), "model.layers.0.mlp.experts.5.down_proj"]:
        weights = base[f"{module}.weight"].copy()
        places = rng.choice(weights.size, 90, replace=False)
        indices = np.stack(np.unravel_index(places, weights.shape)).astype(np.int32)
        values = _random(rng, 90)
        weights[indices[0], indices[1]] += values
        made.tensors |= {f"{PREFIX}{module}.shira_weight": values, f"{PREFIX}{module}.shira_indices": indices}
        made.weights[f"{module}.weight"] = weights
    return made


def ia3() -> Adapter:
    """IA3 of keys and values, of one expert's up, and of the input of its down."""
    rng = np.random.default_rng(0)
    base = base_weights()
    made = Adapter({"peft_type": "IA3", "feedforward_modules": ["down_proj"]})
    modules = [module for module in _attention() if module.endswith(("k_proj", "v_proj"))]
    for module in [*modules, "model.layers.2.mlp.experts.1.up_proj"]:
        gain = 1 + _random(rng, base[f"{module}.weight"].shape[0])
        made.tensors[f"{PREFIX}{module}.ia3_l"] = gain[:, np.newaxis]
        made.weights[f"{module}.weight"] = base[f"{module}.weight"] * gain[:, np.newaxis]
    module = "model.layers.2.mlp.experts.1.down_proj"
    gain = 1 + _random(rng, base[f"{module}.weight"].shape[1])
    made.tensors[f"{PREFIX}{module}.ia3_l"] = gain[np.newaxis]
    made.weights[f"{module}.weight"] = base[f"{module}.weight"] * gain
    return made


def vera() -> Adapter:
    rng = np.random.default_rng(0)
    base = base_weights()
    made = Adapter({"peft_type": "VERA", "r": RANK, "save_projection": True})
    modules = [m for m in _attention() if m.endswith(("q_proj", "o_proj"))]
    rows, cols = (max(base[f"{m}.weight"].shape[i] for m in modules) for i in (0, 1))
    a, b = _random(rng, RANK, cols), _random(rng, rows, RANK)
    made.tensors |= {"base_model.vera_A": a, "base_model.vera_B": b}
    for module in modules:
        weights = base[f"{module}.weight"]
        of_rows, of_rank = _random(rng, weights.shape[0]), _random(rng, RANK) * 5
        made.tensors |= {
            f"{PREFIX}{module}.vera_lambda_b": of_rows,
            f"{PREFIX}{module}.vera_lambda_d": of_rank,
        }
        delta = (of_rows[:, None] * b[: weights.shape[0]]) @ (of_rank[:, None] * a[:, : weights.shape[1]])
        made.weights[f"{module}.weight"] = weights + delta
    return made


def adalora() -> Adapter:
    rng = np.random.default_rng(0)
    base = base_weights()
    made = Adapter({"peft_type": "ADALORA", "r": 8, "lora_alpha": 8})
    for module in _attention():
        weights = base[f"{module}.weight"]
        a, b, e = (
            _random(rng, RANK, weights.shape[1]),
            _random(rng, weights.shape[0], RANK),
            _random(rng, RANK, 1),
        )
        names = (f"{PREFIX}{module}.lora_{factor}" for factor in "ABE")
        made.tensors |= dict(zip(names, (a, b, e), strict=True))
        made.weights[f"{module}.weight"] = weights + b @ (a * e) * np.float32(8 / (RANK + 1e-5))
    return made


def fused_lora(
    *,
    version: str | None = "0.21.2",
    parts: tuple[str, ...] = ("gate_up_proj", "down_proj"),
    **overrides: Any,
) -> Adapter:
    """LoRA of layer 1's experts as one tensor each of gate_up [experts, 2 * width, hidden] and down."""
    rng = np.random.default_rng(0)
    base = base_weights(**overrides)
    config = TINY_CONFIG | overrides
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    made = Adapter({"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "peft_version": version})
    made.config["target_parameters"] = [f"mlp.experts.{part}" for part in parts]
    for part in parts:
        outputs, inputs = (2 * width, hidden) if part == "gate_up_proj" else (hidden, width)
        inner = ".base_layer" if len(parts) == 2 and part == "gate_up_proj" else ""
        a, b = _random(rng, EXPERTS * RANK, inputs), _random(rng, outputs, RANK * EXPERTS)
        module = f"{PREFIX}model.layers.1.mlp.experts{inner}"
        made.tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        for e in range(EXPERTS):
            delta = 2 * b.reshape(outputs, RANK, EXPERTS)[:, :, e] @ a.reshape(EXPERTS, RANK, inputs)[e]
            halves = (
                {"gate_proj": delta[:width], "up_proj": delta[width:]}
                if outputs == 2 * width and part == "gate_up_proj"
                else {"down_proj": delta}
            )
            for name, own in halves.items():
                weight = f"model.layers.1.mlp.experts.{e}.{name}.weight"
                made.weights[weight] = base[weight] + own
    return made


def head(*, resized: int = 0, changed: float = 0.0) -> Adapter:
    """LoRA of the output head, with the base's weights beside it as PEFT saves them."""
    rng = np.random.default_rng(0)
    weights = base_weights()["lm_head.weight"]
    a, b = _random(rng, RANK, weights.shape[1]), _random(rng, weights.shape[0] + resized, RANK)
    made = Adapter({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK})
    own = weights * np.float32(1 + changed)
    made.tensors = {
        f"{PREFIX}lm_head.lora_A.weight": a,
        f"{PREFIX}lm_head.lora_B.weight": b,
        f"{PREFIX}lm_head.base_layer.weight": np.concatenate([own, own[:resized]]),
    }
    if not resized:
        made.weights["lm_head.weight"] = weights + b @ a
    return made


KINDS: dict[str, Callable[[], Adapter]] = {
    "LoRA": lora,
    "rsLoRA": lambda: lora(root=True),
    "DoRA": lambda: lora(magnitudes=True),
    "SHiRA": shira,
    "IA3": ia3,
    "VeRA": vera,
    "AdaLoRA": adalora,
    "LoRA of fused experts": fused_lora,
    "LoRA of the head": head,
}


def faithful_shira(seed: int = 0, size: float = 0.3) -> Adapter:
    """SHiRA of attention and of every expert, with values of several steps of a code."""
    rng = np.random.default_rng(seed)
    base = base_weights()
    made = Adapter({"peft_type": "SHIRA", "r": 4})
    for name, weights in base.items():
        if "_proj" not in name:
            continue
        places = rng.permutation(weights.size)[: weights.size // 50]
        rows, cols = np.unravel_index(places, weights.shape)
        values = (rng.standard_normal(len(places)) * weights.std() * size).astype(np.float32)
        module = "base_model.model." + name.removesuffix(".weight")
        made.tensors[f"{module}.shira_weight"] = values
        made.tensors[f"{module}.shira_indices"] = np.stack([rows, cols]).astype(np.int32)
        changed = weights.copy()
        changed[rows, cols] += values
        made.weights[name] = changed
    return made
