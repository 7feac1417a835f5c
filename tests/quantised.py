"""Small checkpoints that are quantised already, packed bit by bit from the published definitions.

Each scheme gives the parts of one linear layer and the f32 weights that they stand for; `quantised_checkpoint` puts a
model of them together beside the checkpoint of those weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import TINY_CONFIG, encode, qwen3_moe_shapes, random_weights, write_tokenizer, write_weights

Array = np.ndarray[Any, Any]
Part = tuple[str, Array]  # dtype as safetensors spells it, and elements
Parts = dict[str, Part]

# Sizes that hold groups of 32, 64 and 128 columns, and tiles of 16 rows that are not full.
CONFIG: dict[str, Any] = TINY_CONFIG | {
    "hidden_size": 128, "moe_intermediate_size": 192, "num_hidden_layers": 2, "num_experts": 4,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 40, "vocab_size": 320,
}  # fmt: skip

_NUMPY = {
    "F32": "<f4", "I32": "<i4", "U32": "<u4", "U8": "u1", "I8": "i1", "I64": "<i8", "F8_E4M3": "u1", "F8_E8M0": "u1",
}  # fmt: skip


def write_parts(path: Path, parts: Mapping[str, Part]) -> None:
    """A safetensors file of any element types. Floats are given as f32; F8 as bytes."""
    header: dict[str, Any] = {}
    data, offset = [], 0
    for name, (dtype, array) in parts.items():
        raw = encode(array, dtype) if dtype in ("F16", "BF16") else array.astype(_NUMPY[dtype]).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        data.append(raw)
        offset += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def stream(codes: Array, bits: int) -> Array:
    """Rows of codes as rows of 32-bit words: one code after the other from the lowest bit on."""
    digits = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    raw = np.packbits(digits.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    raw = np.pad(raw, [(0, 0)] * (raw.ndim - 1) + [(0, -raw.shape[-1] % 4)])
    return raw.view("<u4")


def held(values: Array, dtype: str) -> Array:
    """f32 values rounded to what `dtype` holds."""
    raw = encode(values.astype(np.float32), dtype)
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(values.shape)
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32).reshape(values.shape)


def groups_of(weight: Array, group: int) -> Array:
    """[rows, groups, group]; the last group filled up with zeros."""
    rows, cols = weight.shape
    return np.pad(weight, ((0, 0), (0, -cols % group))).reshape(rows, -1, group)


def together(grouped: Array, cols: int) -> Array:
    return grouped.reshape(grouped.shape[0], -1)[:, :cols]


@dataclass(frozen=True)
class Coded:
    """codes [rows, cols]; scales and zeros [rows, groups]; weights are what they stand for."""

    codes: Array
    scales: Array
    zeros: Array
    weights: Array


def integers(
    weight: Array, bits: int, group: int, dtype: str, *, symmetric: bool, least_zero: int = 0
) -> Coded:
    """Round to the nearest of scale * (code - zero)."""
    top = (1 << bits) - 1
    grouped = groups_of(weight, group)
    if symmetric:
        zeros = np.full(grouped.shape[:2], (top + 1) // 2)
        scales = held(np.abs(grouped).max(axis=2) / (top // 2 + 0.5), dtype)
    else:
        low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
        scales = held((high - low) / top, dtype)
        zeros = np.clip(np.rint(-low / scales), least_zero, top).astype(int)
    codes = np.clip(np.rint(grouped / scales[..., None]) + zeros[..., None], 0, top).astype(int)
    weights = (scales[..., None] * (codes - zeros[..., None])).astype(np.float32)
    cols = weight.shape[1]
    return Coded(together(codes, cols), scales, zeros, together(weights, cols))


@dataclass(frozen=True)
class Scheme:
    """`pack` makes the parts of layer X by the endings of their names, and the weights that they stand for."""

    name: str
    settings: Mapping[str, Any]
    pack: Callable[[Array], tuple[Parts, Array]]
    format: str | None  # that the weights are carried over in; None: dequantised
    key: str = "quantization_config"
    extra: Mapping[str, Any] = field(default_factory=dict)
    stacked: bool = False  # routed experts lie together under MLX's name
    everything: bool = False  # embedding, output and router are quantised too
    others: Mapping[str, Callable[[Array], tuple[Parts, Array]]] = field(
        default_factory=dict
    )  # by part of the name


def gptq(
    bits: int, group: int, *, symmetric: bool, version: int = 1, order: bool = False
) -> Callable[[Array], tuple[Parts, Array]]:
    def pack(weight: Array) -> tuple[Parts, Array]:
        cols = weight.shape[1]
        size = cols if group == -1 else group
        shuffled = np.random.default_rng(cols).permutation(cols) if order else np.arange(cols)
        coded = integers(
            weight[:, shuffled], bits, size, "F16", symmetric=symmetric, least_zero=1 if version == 1 else 0
        )
        back = np.argsort(shuffled)
        stored = coded.zeros.T - (1 if version == 1 else 0)
        parts = {
            "qweight": ("I32", stream(coded.codes[:, back], bits).T.view("<i4")),
            "qzeros": ("I32", stream(stored, bits).view("<i4")),
            "scales": ("F16", coded.scales.T),
            "g_idx": ("I32", (np.arange(cols) // size)[back]),
        }
        return parts, coded.weights[:, back]

    return pack


def awq(group: int) -> Callable[[Array], tuple[Parts, Array]]:
    def words(codes: Array) -> Array:
        interleaved = codes.reshape(codes.shape[0], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return stream(interleaved.reshape(codes.shape), 4).view("<i4")

    def pack(weight: Array) -> tuple[Parts, Array]:
        coded = integers(weight, 4, group, "F16", symmetric=False)
        parts = {
            "qweight": ("I32", words(coded.codes.T)),
            "qzeros": ("I32", words(coded.zeros.T)),
            "scales": ("F16", coded.scales.T),
        }
        return parts, coded.weights

    return pack


def mlx(bits: int, group: int, dtype: str = "F16") -> Callable[[Array], tuple[Parts, Array]]:
    """Scales are negative where the largest magnitude of a group is positive. Layers whose columns are no whole groups stay
    as they are."""

    def pack(weight: Array) -> tuple[Parts, Array]:
        if weight.shape[1] % group:
            return {"weight": ("F32", weight)}, weight
        top = (1 << bits) - 1
        grouped = groups_of(weight, group)
        low, high = grouped.min(axis=2), grouped.max(axis=2)
        falls = np.abs(low) <= np.abs(high)
        steps = np.maximum((high - low) / top, 1e-7)
        scales = held(np.where(falls, -steps, steps), dtype)
        biases = held(np.where(falls, high, low), dtype)
        codes = np.clip(np.rint((grouped - biases[..., None]) / scales[..., None]), 0, top).astype(np.uint8)
        product = scales[..., None] * codes.astype(np.float32)
        weights = product + biases[..., None]
        parts = {
            "weight": ("U32", stream(codes.reshape(weight.shape), bits)),
            "scales": (dtype, scales),
            "biases": (dtype, biases),
        }
        return parts, weights.reshape(weight.shape)

    return pack


def packed_integers(
    bits: int, group: int, dtype: str, *, symmetric: bool
) -> Callable[[Array], tuple[Parts, Array]]:
    """compressed-tensors, pack-quantized. group -1: a scale for every row."""

    def pack(weight: Array) -> tuple[Parts, Array]:
        coded = integers(weight, bits, weight.shape[1] if group == -1 else group, dtype, symmetric=symmetric)
        parts = {
            "weight_packed": ("I32", stream(coded.codes, bits).view("<i4")),
            "weight_scale": (dtype, coded.scales),
            "weight_shape": ("I64", np.array(weight.shape)),
        }
        if not symmetric:
            parts["weight_zero_point"] = ("I32", stream(coded.zeros.T, bits).view("<i4").T)
        return parts, coded.weights

    return pack


def plain_int8(weight: Array) -> tuple[Parts, Array]:
    coded = integers(weight, 8, weight.shape[1], "F16", symmetric=True)
    return {"weight": ("I8", coded.codes - 128), "weight_scale": ("F16", coded.scales)}, coded.weights


E4M3 = np.array(
    [(-1) ** (c >> 7) * ((c & 7) / 8 + (c & 120 > 0)) * 2.0 ** (max(c >> 3 & 15, 1) - 7) for c in range(256)],
    np.float32,
)
E4M3[[0x7F, 0xFF]] = np.nan


def fp8(
    block: tuple[int, int] | None, suffix: str, dtype: str = "F32"
) -> Callable[[Array], tuple[Parts, Array]]:
    """block None: a scale for the matrix; (1, 0): one for every row."""

    def pack(weight: Array) -> tuple[Parts, Array]:
        rows, cols = weight.shape
        high, wide = (rows, cols) if block is None else (block[0], block[1] or cols)
        scales = np.zeros((-(-rows // high), -(-cols // wide)), np.float32)
        codes = np.zeros(weight.shape, np.uint8)
        weights = np.zeros(weight.shape, np.float32)
        finite = np.flatnonzero(np.isfinite(E4M3))
        for i, j in np.ndindex(*scales.shape):
            here = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            scales[i, j] = held(np.array(np.abs(weight[here]).max() / 448), dtype)
            nearest = np.abs((weight[here] / scales[i, j])[..., None] - E4M3[finite]).argmin(axis=-1)
            codes[here] = finite[nearest]
            weights[here] = E4M3[codes[here]] * scales[i, j]
        shaped = scales.reshape(()) if block is None else scales
        return {"weight": ("F8_E4M3", codes), suffix: (dtype, shaped)}, weights

    return pack


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def mxfp4_codes(weight: Array) -> tuple[Array, Array, Array]:
    """Codes [rows, cols], E8M0 scales [rows, groups] and weights."""
    grouped = groups_of(weight, 32)
    exponents = np.floor(np.log2(np.abs(grouped).max(axis=2))).astype(int) - 2 + 127
    scales = np.exp2(exponents - 127.0).astype(np.float32)
    codes = np.abs((grouped / scales[..., None])[..., None] - E2M1).argmin(axis=-1)
    weights = (E2M1[codes] * scales[..., None]).astype(np.float32)
    return codes.reshape(weight.shape), exponents, weights.reshape(weight.shape)


def mlx_mxfp4(weight: Array) -> tuple[Parts, Array]:
    codes, exponents, weights = mxfp4_codes(weight)
    return {"weight": ("U32", stream(codes, 4)), "scales": ("U8", exponents)}, weights


# --- a model of such layers -----------------------------------------------------------------------------


def quantised_parts(scheme: Scheme, *, plain: str = "F32") -> tuple[Parts, dict[str, Array]]:
    """Every tensor of a checkpoint, and the weights that they stand for. Norms, router, embedding and output are
    floats of type `plain`."""
    weights = random_weights(qwen3_moe_shapes(CONFIG), 0)
    parts: Parts = {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight") or (scheme.everything and weight.ndim == 2):
            pack = next((other for part, other in scheme.others.items() if part in name), scheme.pack)
            packed, weights[name] = pack(weight)
            layer = name.removesuffix("weight")
            parts |= {layer + ending: part for ending, part in packed.items()}
        else:
            parts[name] = (plain, weight)
            weights[name] = held(weight, plain)
    return (stack_experts(parts) if scheme.stacked else parts), weights


def stack_experts(parts: Parts) -> Parts:
    stacks: dict[str, list[Part]] = {}
    for name, part in parts.items():
        stacks.setdefault(re.sub(r"[.]experts[.][0-9]+[.]", ".switch_mlp.", name), []).append(part)
    return {
        name: (stack[0][0], np.stack([array for _, array in stack])) if "switch_mlp" in name else stack[0]
        for name, stack in stacks.items()
    }


def write_quantised(directory: Path, parts: Parts, scheme: Scheme) -> Path:
    directory.mkdir(parents=True)
    config = CONFIG | {scheme.key: dict(scheme.settings)} | dict(scheme.extra)
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory, CONFIG["vocab_size"])
    write_parts(directory / "model.safetensors", parts)
    return directory


def quantised_checkpoint(directory: Path, scheme: Scheme) -> tuple[Path, Path]:
    """The checkpoint, and beside it the unquantised one of the same weights."""
    parts, weights = quantised_parts(scheme)
    plain = directory / "plain"
    plain.mkdir(parents=True)
    (plain / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(plain, CONFIG["vocab_size"])
    write_weights(plain, weights)
    return write_quantised(directory / "quantised", parts, scheme), plain
