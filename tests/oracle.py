"""A second reader of bundles, written from docs/bundle-format.md alone, in numpy and double precision.

Slow and plain on purpose: it shows that the format is written down well enough to be read by others, tells an
error of the converter from one of the engine, and gives integer formats a reference that transformers lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from bundles import read_manifest
from oracle_formats import INTEGERS, packed_bytes, round_up, unpack
from oracle_mixing import MIXERS


@dataclass
class Weight:
    format: str
    values: np.ndarray
    bias: np.ndarray | None = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if self.format in INTEGERS:
            x = as_int8(x)
        return np.asarray(x @ self.values.T) + (0 if self.bias is None else self.bias)


def as_int8(x: np.ndarray) -> np.ndarray:
    """Activations as integer products see them: int8 codes with a scale for every 32 columns."""
    n, cols = x.shape
    groups = np.pad(x, ((0, 0), (0, -cols % 32))).reshape(n, -1, 32)
    scales = np.abs(groups).max(-1, keepdims=True) / 127
    codes = np.rint(groups / np.where(scales == 0, 1, scales))
    return np.asarray((codes * scales).reshape(n, -1)[:, :cols])


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * weight + bias)


def activation(ffn: dict[str, Any], g: np.ndarray, u: np.ndarray) -> np.ndarray:
    if ffn["activation"] == "clamped_swiglu":
        alpha, limit = ffn["activation_alpha"], ffn["activation_limit"]
        g = np.minimum(g, limit)
        return np.asarray(g * sigmoid(alpha * g) * (np.clip(u, -limit, limit) + 1))
    if ffn["activation"] == "gelu_tanh":
        return np.asarray(0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u)
    return np.asarray(g * sigmoid(g) * u)


def feed_forward(
    ffn: dict[str, Any],
    x: np.ndarray,
    gate: Callable[[np.ndarray], np.ndarray],
    up: Callable[[np.ndarray], np.ndarray],
    down: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    return down(activation(ffn, gate(x), up(x)))


class Oracle:
    """A bundle, read as documented."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.manifest = read_manifest(bundle)
        self.recipe = self.manifest["recipe"]
        self.tensors = {t["name"]: t for t in self.manifest["tensors"]}

    @cached_property
    def files(self) -> list[np.ndarray]:
        return [np.fromfile(self.bundle / f["name"], np.uint8) for f in self.manifest["files"]]

    def vector(self, name: str) -> np.ndarray:
        t = self.tensors[name]
        assert t["format"] == "f32" and len(t["shape"]) == 1
        data = self.files[t["file"]][t["offset"] : t["offset"] + t["bytes"]]
        values: np.ndarray = data.view("<f4").astype(np.float64)
        return values

    @cache  # noqa: B019 - a reader lives as long as its test
    def matrix(self, name: str) -> Weight:
        t = self.tensors[name]
        rows, cols = t["shape"]
        assert t["bytes"] == packed_bytes(t["format"], rows, cols)
        data = self.files[t["file"]][t["offset"] : t["offset"] + t["bytes"]]
        return Weight(t["format"], unpack(t["format"], data, rows, cols))

    @cache  # noqa: B019 - a reader lives as long as its test
    def expert(self, layer: int, expert: int, inter: int, biased: bool) -> list[Weight]:
        row = next(r for r in self.manifest["experts"] if r["layer"] == layer)
        file, offset, length, _, combination = row["extents"][expert]
        hidden = self.recipe["hidden_size"]
        weights, at = [], offset
        shapes = [(inter, hidden), (inter, hidden), (hidden, inter)]
        for format, (rows, cols) in zip(self.manifest["expert_formats"][combination], shapes, strict=True):
            at = offset + round_up(at - offset, 64)
            size = packed_bytes(format, rows, cols)
            weights.append(Weight(format, unpack(format, self.files[file][at : at + size], rows, cols)))
            at += size
        if biased:  # of gate, up and down, one after the other
            for weight, rows in zip(weights, (inter, inter, hidden), strict=True):
                weight.bias = self.files[file][at : at + 4 * rows].view("<f4").astype(np.float64)
                at += 4 * rows
        assert at == offset + length
        return weights

    def norm(self, kind: str, x: np.ndarray, name: str, eps: float) -> np.ndarray:
        if kind == "layer":
            return layer_norm(x, self.vector(name), self.vector(name + "_bias"), eps)
        return rms_norm(x, self.vector(name), eps)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Tokens of one sequence from its start -> [n, vocab]."""
        embedding = self.matrix("embedding")
        x = embedding.values[tokens] * self.recipe["embedding"]["scale"]
        for i, index in enumerate(self.recipe["layers"]):
            x = self.layer(x, self.recipe["blocks"][index], f"layers.{i}.", i)
        x = self.norm(self.recipe.get("final_norm", "rms"), x, "final_norm", self.recipe["final_norm_eps"])
        stated = self.recipe["output"]
        logits: np.ndarray = (embedding if stated["tied"] else self.matrix("output"))(x)
        if stated.get("bias"):
            logits = logits + self.vector("output_bias")
        logits = logits * stated["scale"]
        cap = stated.get("softcap")
        return cap * np.tanh(logits / cap) if cap else logits

    def layer(self, x: np.ndarray, block: dict[str, Any], prefix: str, index: int) -> np.ndarray:
        eps, kind = block["norm_eps"], block.get("norm", "rms")

        def add(half: str, y: np.ndarray) -> np.ndarray:
            if block.get("post_norms"):
                y = rms_norm(y, self.vector(f"{prefix}{half}_post_norm"), eps)
            return np.asarray(x + block["residual_scale"] * y)

        h = self.norm(kind, x, prefix + "attention_norm", eps)
        mixer = block["mixer"]
        if mixer["kind"] == "attention":
            x = add("attention", self.attention(h, block, prefix + "attention."))
        else:
            x = add("attention", MIXERS[mixer["kind"]](self, h, mixer, prefix))
        h = self.norm(kind, x, prefix + "ffn_norm", eps)
        is_moe = block["ffn"]["kind"] == "moe"
        x = add("ffn", self.moe(x, h, block, index) if is_moe else self.dense(h, block["ffn"], index))
        return x * self.vector(prefix + "scale") if block.get("scaled") else x

    def heads(self, x: np.ndarray, block: dict[str, Any], prefix: str, name: str) -> np.ndarray:
        """q, k or v as [n, heads, head_dim], before rotation."""
        mixer, eps = block["mixer"], block["norm_eps"]
        stored = "k" if name == "v" and mixer.get("values_are_keys") else name
        y = self.matrix(prefix + stored)(x)
        if mixer["qkv_bias"]:
            y = y + self.vector(f"{prefix}{stored}_bias")
        norm = mixer["qk_norm"] if name != "v" else "unit" if mixer.get("value_norm") else None
        if norm == "row":
            y = rms_norm(y, self.vector(f"{prefix}{name}_norm"), eps)
        y = y.reshape(len(x), -1, mixer["head_dim"])
        if norm in ("head", "unit"):
            weight = self.vector(f"{prefix}{name}_norm") if norm == "head" else np.ones(mixer["head_dim"])
            y = rms_norm(y, weight, eps)
        if mixer["clip_qkv"] is not None:
            y = np.clip(y, -mixer["clip_qkv"], mixer["clip_qkv"])
        return y

    def attention(self, x: np.ndarray, block: dict[str, Any], prefix: str) -> np.ndarray:
        mixer, n = block["mixer"], len(x)
        q, k, v = (self.heads(x, block, prefix, name) for name in "qkv")
        if mixer["rope"] is not None:
            q, k = rotate(q, mixer["rope"]), rotate(k, mixer["rope"])
        if "temperature" in mixer:
            grown = mixer["temperature"]
            steps = np.floor((np.arange(n) + grown.get("offset", 1)) / grown["floor"])
            q = q * (1 + mixer["temperature"]["scale"] * np.log1p(steps))[:, None, None]
        group = mixer["num_heads"] // mixer["num_kv_heads"]
        k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * mixer["scale"]
        q_at, k_at = np.arange(n)[:, None], np.arange(n)[None, :]
        seen = k_at <= q_at
        if mixer["window"] is not None:
            seen &= k_at > q_at - mixer["window"]
        if "chunk" in mixer:
            seen &= k_at // mixer["chunk"] == q_at // mixer["chunk"]
        scores = np.where(seen, scores, -np.inf)
        if mixer.get("sinks"):
            sinks = np.broadcast_to(self.vector(prefix + "sinks")[:, None, None], (len(scores), n, 1))
            scores = np.concatenate([scores, sinks], axis=-1)
        attended = np.einsum("hqk,khd->qhd", softmax(scores)[:, :, :n], v).reshape(n, -1)
        if mixer.get("output_gate") == "sigmoid":
            attended = attended * sigmoid(self.matrix(prefix + "gate")(x))
        out = self.matrix(prefix + "o")(attended)
        return out + self.vector(prefix + "o_bias") if mixer["output_bias"] else out

    def dense(self, x: np.ndarray, ffn: dict[str, Any], layer: int) -> np.ndarray:
        return feed_forward(
            ffn, x, *(self.matrix(f"layers.{layer}.ffn.{part}") for part in ("gate", "up", "down"))
        )

    def route(self, x: np.ndarray, ffn: dict[str, Any], layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Experts [n, num_experts_per_tok] and their weights."""
        router, prefix = ffn["router"], f"layers.{layer}.router"
        logits = self.matrix(prefix)(x)
        if router.get("bias") == "logits":
            logits = logits + self.vector(prefix + ".bias")
        if router["scoring"] == "sparsemixer":
            return sparsemixer(logits, router["jitter"])
        scores = softmax(logits) if router["scoring"] == "softmax" else sigmoid(logits)
        values = scores + self.vector(prefix + ".bias") if router.get("bias") == "selection" else scores
        if router.get("groups") is not None:
            values = best_groups(values, router["groups"])
        chosen = np.argsort(-values, axis=-1, kind="stable")[:, : ffn["num_experts_per_tok"]]
        gates = np.take_along_axis(scores, chosen, axis=-1)
        if router["normalize"]:
            total = gates.sum(-1, keepdims=True) + router.get("norm_epsilon", 0)
            gates = gates / np.maximum(total, router.get("norm_minimum", 0))
        gates = gates * router["scale"]
        if router.get("expert_scale"):
            gates = gates * self.vector(prefix + ".expert_scale")[chosen]
        return chosen, gates

    def moe(self, x: np.ndarray, h: np.ndarray, block: dict[str, Any], layer: int) -> np.ndarray:
        """Of the hidden state `x`, and `h`, which is it normed."""
        ffn, prefix, apart = block["ffn"], f"layers.{layer}.", block["ffn"].get("branch_norms")

        def branch(y: np.ndarray, name: str) -> np.ndarray:
            return rms_norm(y, self.vector(prefix + name), block["norm_eps"]) if apart else y

        chosen, gates = self.route(branch(x, "router_norm") if apart else h, ffn, layer)
        inputs = branch(x, "experts_norm") if apart else h
        out = np.zeros_like(h)
        for e in np.unique(chosen):
            rows, slots = np.nonzero(chosen == e)
            expert = self.expert(layer, int(e), ffn["moe_intermediate_size"], ffn.get("expert_bias", False))
            weight = gates[rows, slots, None]
            if ffn["router"].get("weighs") == "input":
                out[rows] += feed_forward(ffn, weight * inputs[rows], *expert)
            else:
                out[rows] += weight * feed_forward(ffn, inputs[rows], *expert)
        out = branch(out, "experts_post_norm")
        if ffn["shared"] is not None:
            parts = (self.matrix(f"{prefix}shared.{part}") for part in ("gate", "up", "down"))
            shared = branch(feed_forward(ffn, h, *parts), "shared.post_norm")
            if ffn["shared"]["gate"] == "sigmoid":
                shared = shared * sigmoid(self.matrix(prefix + "shared.router")(h))
            out += shared
        return out


def sparsemixer(logits: np.ndarray, jitter: float) -> tuple[np.ndarray, np.ndarray]:
    """The best expert and its share, then the best of the others and its share without the first."""
    chosen, gates = [], []
    remaining = logits
    for _ in range(2):
        best = remaining.max(-1, keepdims=True)
        far = (best - logits) / np.maximum(np.abs(logits), best) > 2 * jitter
        chosen.append(remaining.argmax(-1))
        gates.append(softmax(np.where(far, -np.inf, remaining)).max(-1))
        remaining = np.where(np.arange(logits.shape[1]) == chosen[-1][:, None], -np.inf, remaining)
    return np.stack(chosen, -1), np.stack(gates, -1)


def best_groups(values: np.ndarray, groups: dict[str, Any]) -> np.ndarray:
    """The values of experts outside the best groups become -inf."""
    grouped = values.reshape(len(values), groups["count"], -1)
    best = np.sort(grouped, axis=-1)[:, :, -2 if groups["score"] == "sum_of_top_2" else -1 :].sum(-1)
    kept = np.argsort(-best, axis=-1, kind="stable")[:, : groups["keep"]]
    mask = np.zeros(best.shape, bool)
    np.put_along_axis(mask, kept, True, axis=-1)
    return np.where(mask[:, :, None], grouped, -np.inf).reshape(values.shape)


def rotate(x: np.ndarray, rope: dict[str, Any]) -> np.ndarray:
    """Rope on [n, heads, head_dim], at positions 0 .. n-1."""
    frequencies = np.array(rope["inv_freq"])
    pairs = len(frequencies)
    angle = np.arange(len(x))[:, None, None] * frequencies
    cos, sin = np.cos(angle) * rope["attention_factor"], np.sin(angle) * rope["attention_factor"]
    if rope["layout"] == "half":
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    else:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out
