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
from oracle_mixing import MIXERS

FLOATS = {"f32": (4, "<f4"), "f16": (2, "<f2"), "bf16": (2, "<u2")}


@dataclass(frozen=True)
class Integers:
    """A row of the table: bits of the planes, columns of a group and a block, types of scale and zero, codebook."""

    planes: tuple[int, ...]
    group: int
    scale: str = "f16"
    zero: str = "none"
    codebook: tuple[int, ...] = ()
    block: int = 0

    def parts(self) -> dict[str, tuple[str, int]]:
        """The parts after the codes in their order: type, and columns that share an element."""
        block = self.block or self.group
        parts = {"scales": ("u1" if self.scale == "e8m0" else "<f2", block)}
        if self.block:
            parts["group_scales"] = ("i1" if self.scale == "i8" else "u1", self.group)
        if self.zero != "none":
            parts["zeros"] = ("u1" if self.zero == "u8" else "<f2", block)
        if self.zero == "min_u8":
            parts["group_minima"] = ("u1", self.group)
        return parts

    def padded(self, cols: int) -> int:
        return round_up(cols, self.block or self.group)


IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
INTEGERS = {
    "int8": Integers((8,), 32),
    "int4": Integers((4,), 64, zero="u8"),
    "int3": Integers((2, 1), 64, zero="u8"),
    "int2": Integers((2,), 32, zero="u8"),
    "int4_32": Integers((4,), 32, zero="u8"),
    "q4_0": Integers((4,), 32),
    "q4_1": Integers((4,), 32, zero="min_f16"),
    "q5_0": Integers((4, 1), 32),
    "q5_1": Integers((4, 1), 32, zero="min_f16"),
    "q2_k": Integers((2,), 16, "u4", "min_u4", block=256),
    "q3_k": Integers((2, 1), 16, "i8", block=256),
    "q4_k": Integers((4,), 32, "i8", "min_u8", block=256),
    "q5_k": Integers((4, 1), 32, "i8", "min_u8", block=256),
    "q6_k": Integers((4, 2), 16, "i8", block=256),
    "iq4_nl": Integers((4,), 32, codebook=IQ4_NL),
    "iq4_xs": Integers((4,), 32, "i8", codebook=IQ4_NL, block=256),
    "mxfp4": Integers((4,), 32, "e8m0", codebook=E2M1),
    "affine2": Integers((2,), 64, zero="min_f16"),
    "affine3": Integers((2, 1), 64, zero="min_f16"),
    "affine4": Integers((4,), 64, zero="min_f16"),
    "affine5": Integers((4, 1), 64, zero="min_f16"),
    "affine6": Integers((4, 2), 64, zero="min_f16"),
    "affine8": Integers((8,), 64, zero="min_f16"),
    "affine2_32": Integers((2,), 32, zero="min_f16"),
    "affine3_32": Integers((2, 1), 32, zero="min_f16"),
    "affine6_32": Integers((4, 2), 32, zero="min_f16"),
    "affine8_32": Integers((8,), 32, zero="min_f16"),
}
TILE_ROWS = 16


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def tile_bytes(format: str, cols: int) -> int:
    if format in FLOATS:
        return round_up(TILE_ROWS * cols * FLOATS[format][0], 64)
    row = INTEGERS[format]
    padded = row.padded(cols)
    parts = sum(padded // shared * np.dtype(dtype).itemsize for dtype, shared in row.parts().values())
    return round_up(TILE_ROWS * (padded * sum(row.planes) // 8 + parts), 64)


def packed_bytes(format: str, rows: int, cols: int) -> int:
    return round_up(rows, TILE_ROWS) // TILE_ROWS * tile_bytes(format, cols)


def plane(data: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of one plane of a tile -> codes [16, columns]."""
    vectors = data.reshape(-1, TILE_ROWS, 4)  # [vector, row, j]
    parts = [(vectors >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)]
    return np.stack(parts, axis=2).transpose(1, 0, 2, 3).reshape(TILE_ROWS, -1)  # [row, (vector, i, j)]


def unpack_tile(format: str, data: np.ndarray, cols: int) -> np.ndarray:
    if format in FLOATS:
        size, dtype = FLOATS[format]
        elements = data[: TILE_ROWS * cols * size].view(dtype)
        if format == "bf16":
            elements = (elements.astype("<u4") << 16).view("<f4")
        return elements.reshape(cols, TILE_ROWS).T.astype(np.float64)
    row = INTEGERS[format]
    padded = row.padded(cols)
    codes, at, shift = np.zeros((TILE_ROWS, padded), np.int64), 0, 0
    for bits in row.planes:
        length = TILE_ROWS * padded * bits // 8
        codes += plane(data[at : at + length], bits).astype(np.int64) << shift
        at, shift = at + length, shift + bits
    parts: dict[str, np.ndarray] = {}  # [16, padded]
    for name, (dtype, shared) in row.parts().items():
        length = TILE_ROWS * (padded // shared) * np.dtype(dtype).itemsize
        parts[name] = data[at : at + length].view(dtype).reshape(-1, TILE_ROWS).T.repeat(shared, axis=1)
        at += length
    scales = parts["scales"].astype(np.float64)
    if row.scale == "e8m0":
        scales = 2.0 ** (scales - 128)
    elif row.scale == "u4":
        scales = scales * (parts["group_scales"] & 15)
    elif row.scale == "i8":
        scales = scales * parts["group_scales"]
    if row.zero.startswith("min"):
        minima = parts["zeros"].astype(np.float64)
        if row.zero == "min_u4":
            minima = minima * (parts["group_scales"] >> 4)
        elif row.zero == "min_u8":
            minima = minima * parts["group_minima"]
        # Each product and the difference are rounded to f32, as the weight is.
        weights = (scales * codes).astype(np.float32) - minima.astype(np.float32)
        return np.asarray(weights.astype(np.float64))[:, :cols]
    values = np.array(row.codebook)[codes] if row.codebook else codes - (1 << (sum(row.planes) - 1))
    if row.zero == "u8":
        values = codes - parts["zeros"]
    return np.asarray(scales * values)[:, :cols]


def unpack(format: str, data: np.ndarray, rows: int, cols: int) -> np.ndarray:
    tiles = data.reshape(-1, tile_bytes(format, cols))
    return np.concatenate([unpack_tile(format, tile, cols) for tile in tiles])[:rows]


@dataclass
class Weight:
    format: str
    values: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if self.format in INTEGERS:
            x = as_int8(x)
        return np.asarray(x @ self.values.T)


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


def feed_forward(
    x: np.ndarray,
    gate: Callable[[np.ndarray], np.ndarray],
    up: Callable[[np.ndarray], np.ndarray],
    down: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    g = gate(x)
    return down(g * sigmoid(g) * up(x))


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
    def expert(self, layer: int, expert: int, inter: int) -> list[Weight]:
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
        assert at == offset + length
        return weights

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Tokens of one sequence from its start -> [n, vocab]."""
        embedding = self.matrix("embedding")
        x = embedding.values[tokens] * self.recipe["embedding"]["scale"]
        for i, index in enumerate(self.recipe["layers"]):
            block, prefix = self.recipe["blocks"][index], f"layers.{i}."
            h = rms_norm(x, self.vector(prefix + "attention_norm"), block["norm_eps"])
            mixer = block["mixer"]
            if mixer["kind"] == "attention":
                mixed = self.attention(h, block, prefix + "attention.")
            else:
                mixed = MIXERS[mixer["kind"]](self, h, mixer, prefix)
            x = x + block["residual_scale"] * mixed
            h = rms_norm(x, self.vector(prefix + "ffn_norm"), block["norm_eps"])
            mix = self.moe if block["ffn"]["kind"] == "moe" else self.dense
            x = x + block["residual_scale"] * mix(h, block["ffn"], i)
        x = rms_norm(x, self.vector("final_norm"), self.recipe["final_norm_eps"])
        output = embedding if self.recipe["output"]["tied"] else self.matrix("output")
        logits: np.ndarray = output(x) * self.recipe["output"]["scale"]
        return logits

    def attention(self, x: np.ndarray, block: dict[str, Any], prefix: str) -> np.ndarray:
        mixer = block["mixer"]
        n, head = len(x), mixer["head_dim"]
        parts = {}
        for name in "qkv":
            y = self.matrix(prefix + name)(x)
            if mixer["qkv_bias"]:
                y = y + self.vector(f"{prefix}{name}_bias")
            if mixer["qk_norm"] == "row" and name != "v":
                y = rms_norm(y, self.vector(f"{prefix}{name}_norm"), block["norm_eps"])
            y = y.reshape(n, -1, head)
            if mixer["qk_norm"] == "head" and name != "v":
                y = rms_norm(y, self.vector(f"{prefix}{name}_norm"), block["norm_eps"])
            if mixer["clip_qkv"] is not None:
                y = np.clip(y, -mixer["clip_qkv"], mixer["clip_qkv"])
            parts[name] = y if name == "v" else rotate(y, mixer["rope"])
        group = mixer["num_heads"] // mixer["num_kv_heads"]
        k, v = (parts[name].repeat(group, axis=1) for name in "kv")
        scores = np.einsum("qhd,khd->hqk", parts["q"], k) * mixer["scale"]
        q_at, k_at = np.arange(n)[:, None], np.arange(n)[None, :]
        seen = k_at <= q_at
        if mixer["window"] is not None:
            seen &= k_at > q_at - mixer["window"]
        attended = np.einsum("hqk,khd->qhd", softmax(np.where(seen, scores, -np.inf)), v)
        attended = attended.reshape(n, -1)
        if mixer.get("output_gate") == "sigmoid":
            attended = attended * sigmoid(self.matrix(prefix + "gate")(x))
        out = self.matrix(prefix + "o")(attended)
        return out + self.vector(prefix + "o_bias") if mixer["output_bias"] else out

    def dense(self, x: np.ndarray, ffn: dict[str, Any], layer: int) -> np.ndarray:
        return feed_forward(
            x, *(self.matrix(f"layers.{layer}.ffn.{part}") for part in ("gate", "up", "down"))
        )

    def route(self, x: np.ndarray, ffn: dict[str, Any], layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Experts [n, num_experts_per_tok] and their weights."""
        router, prefix = ffn["router"], f"layers.{layer}.router"
        logits = self.matrix(prefix)(x)
        if router.get("bias") == "logits":
            logits = logits + self.vector(prefix + ".bias")
        scores = softmax(logits) if router["scoring"] == "softmax" else sigmoid(logits)
        values = scores + self.vector(prefix + ".bias") if router.get("bias") == "selection" else scores
        if router.get("groups") is not None:
            values = best_groups(values, router["groups"])
        chosen = np.argsort(-values, axis=-1, kind="stable")[:, : ffn["num_experts_per_tok"]]
        gates = np.take_along_axis(scores, chosen, axis=-1)
        if router["normalize"]:
            total = gates.sum(-1, keepdims=True) + router.get("norm_epsilon", 0)
            gates = gates / np.maximum(total, router.get("norm_minimum", 0))
        return chosen, gates * router["scale"]

    def moe(self, x: np.ndarray, ffn: dict[str, Any], layer: int) -> np.ndarray:
        chosen, gates = self.route(x, ffn, layer)
        out = np.zeros_like(x)
        for e in np.unique(chosen):
            rows, slots = np.nonzero(chosen == e)
            expert = self.expert(layer, int(e), ffn["moe_intermediate_size"])
            out[rows] += gates[rows, slots, None] * feed_forward(x[rows], *expert)
        if ffn["shared"] is not None:
            shared = feed_forward(
                x, *(self.matrix(f"layers.{layer}.shared.{p}") for p in ("gate", "up", "down"))
            )
            if ffn["shared"]["gate"] == "sigmoid":
                shared *= sigmoid(self.matrix(f"layers.{layer}.shared.router")(x))
            out += shared
        return out


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
