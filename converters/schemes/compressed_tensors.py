"""What compressed-tensors (llm-compressor) saves: integers packed or plain, 8-bit floats, MXFP4.

Of a linear layer X [out, in]:
    pack-quantized    X.weight_packed I32 [out, in * bits / 32], lowest bits first, codes as signed numbers plus
                      2^(bits - 1); X.weight_shape; X.weight_scale [out, groups]; where it is not symmetric
                      X.weight_zero_point I32 [out * bits / 32, groups], packed down the columns; with actorder
                      "group" X.weight_g_idx, the group of each input
    int-quantized     X.weight I8, X.weight_scale, X.weight_zero_point I8
    float-quantized   X.weight F8_E4M3, X.weight_scale
    mxfp4-pack-quantized  X.weight_packed U8 [out, in / 2], X.weight_scale U8, E8M0

Which layer is quantised, and how, is seen from its tensors; config_groups say what there may be. Scales of activations
and of the KV cache have no part in the weights and are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgert.errors import CorruptError

from ..config import Config
from ..tensor import Tensor, TensorInfo
from .bits import Bytes, unpack_bits
from .coded import CodedTensor, Grid, column_order
from .fp8 import fp8_tensor
from .mxfp4 import Mxfp4Tensor
from .parts import SCALES, Parts, add_tensor, check_matrix, check_part, need_part

KEYS_WITHOUT_EFFECT = frozenset({
    "quant_method", "ignore", "kv_cache_scheme", "quantization_status", "global_compression_ratio", "version",
})  # fmt: skip

_FORMATS = (
    "pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mxfp4-pack-quantized",
    "mixed-precision", "dense",
)  # fmt: skip
_BITS = (2, 4, 8)
_MAX_GROUP = 1 << 20
_SIGN = np.uint8(0x80)  # turns a signed byte into its code: 128 more
_MAX_SIDE = 1 << 24
_LEFT_OUT = (
    ".input_scale",
    ".input_zero_point",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".input_global_scale",
)


@dataclass(frozen=True)
class _Weights:
    """How the weights of one of config_groups are quantised."""

    bits: int
    group: int  # 0: a scale for a row, or for all
    block: tuple[int, ...]


@dataclass(frozen=True)
class _IntegerTensor(CodedTensor):
    """Parts: codes, scales, and what else there is of the two below."""

    code_bits: int
    group_size: int
    zeros: TensorInfo | None
    g_idx: TensorInfo | None

    @property
    def bits(self) -> int:
        return self.code_bits

    @property
    def group(self) -> int:
        return self.group_size

    def codes(self, parts: Parts, first_row: int, rows: int) -> Bytes:
        raw = parts.rows(self.parts[0], first_row, rows)
        return raw ^ _SIGN if self.parts[0].dtype == "I8" else unpack_bits(raw, self.bits, self.shape[-1])

    def grid(self, parts: Parts, first_row: int, rows: int) -> Grid:
        scales = self.parts[1]
        if scales.shape[0] == 1:
            values = np.repeat(parts.floats(scales, 0, 1), rows, axis=0)
        else:
            values = parts.floats(scales, first_row, rows)
        return Grid(values, self._zeros(parts, first_row, rows, values.shape))

    def _zeros(self, parts: Parts, first_row: int, rows: int, shape: tuple[int, ...]) -> Bytes:
        if self.zeros is None:
            return np.full(shape, 1 << (self.bits - 1), np.uint8)
        if self.zeros.dtype == "I8":
            if self.zeros.shape[0] == 1:
                return np.repeat(parts.rows(self.zeros, 0, 1) ^ _SIGN, rows, axis=0)
            return parts.rows(self.zeros, first_row, rows) ^ _SIGN
        words = parts.rows(self.zeros, 0, self.zeros.shape[0]).view("<u4")
        packed = np.ascontiguousarray(words.T).view(np.uint8)
        zeros = unpack_bits(packed, self.bits, self.shape[0])
        return np.ascontiguousarray(zeros[:, first_row : first_row + rows].T)

    def order(self, parts: Parts) -> npt.NDArray[np.int64] | None:
        return (
            None
            if self.g_idx is None
            else column_order(parts, self.g_idx, self.parts[1].shape[-1], self.group)
        )


def read(settings: Config, tensors: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """See read_scheme()."""
    settings.choice("format", "pack-quantized", _FORMATS)
    for key in ("sparsity_config", "transform_config"):
        value = settings.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            settings.fail(
                key, f"{str(value)[:80]}; sparse or transformed weights are not read by this version"
            )
    kinds = _config_groups(settings)
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(_LEFT_OUT)}
    result: dict[str, Tensor] = dict(found)
    with Parts() as parts:
        for name, stored in found.items():
            layer, dot, part = name.rpartition(".")
            if part != "weight_packed" and (part != "weight" or stored.dtype not in ("I8", "F8_E4M3")):
                continue
            tensor, used = _layer(layer + dot, found, kinds, parts)
            for taken in used:
                del result[taken]
            add_tensor(result, tensor)
    return result


def _config_groups(settings: Config) -> list[_Weights]:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        settings.fail("config_groups", f"{str(groups)[:80]}; an object of named groups is needed")
    kinds = []
    for name, group in groups.items():
        where = f"{settings.where}: config_groups: {str(name)[:80]}"
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise CorruptError(f"{where}: weights: an object is needed")
        weights = Config(group["weights"], f"{where}: weights")
        bits = weights.integer("num_bits", 8, minimum=2, maximum=8)
        weights.choice("type", "int", ("int", "float"))
        if weights.get("dynamic") not in (None, False):
            weights.fail("dynamic", "true; weights are quantised once")
        grouped = weights.get("group_size") not in (None, -1)
        length = weights.integer("group_size", minimum=1, maximum=_MAX_GROUP) if grouped else 0
        kinds.append(_Weights(bits, length, tuple(weights.integers("block_structure", maximum=_MAX_GROUP))))
    return kinds


def _layer(
    layer: str, tensors: Mapping[str, TensorInfo], kinds: Sequence[_Weights], parts: Parts
) -> tuple[Tensor, set[str]]:
    """The weight of a layer, and the names of the parts that make it."""
    name, scales = layer + "weight", need_part(tensors, layer + "weight_scale")
    weight = tensors[layer + "weight_packed"] if layer + "weight_packed" in tensors else tensors[name]
    used = {
        layer + part
        for part in (
            "weight",
            "weight_packed",
            "weight_scale",
            "weight_shape",
            "weight_zero_point",
            "weight_g_idx",
        )
        if layer + part in tensors
    }
    if weight.dtype == "F8_E4M3":
        blocks = {kind.block for kind in kinds if kind.block}
        return fp8_tensor(weight, scales, blocks.pop() if len(blocks) == 1 else ()), used
    check_matrix(weight)
    if weight.dtype == "U8":
        rows, size = weight.shape
        check_part(scales, ("U8",), (rows, size // 16), f"tensor {weight.name!r}")
        check_part(weight, ("U8",), (rows, scales.shape[1] * 16), "MXFP4")
        return Mxfp4Tensor(name, (rows, 2 * size), (weight, scales)), used
    if len(scales.shape) == 1:
        scales = replace(scales, shape=(scales.shape[0], 1))
    check_matrix(scales)
    return _integers(name, layer, weight, scales, tensors, kinds, parts), used


def _integers(
    name: str,
    layer: str,
    weight: TensorInfo,
    scales: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    kinds: Sequence[_Weights],
    parts: Parts,
) -> _IntegerTensor:
    plain = weight.dtype == "I8"
    rows, cols = weight.shape if plain else _declared_shape(need_part(tensors, layer + "weight_shape"), parts)
    fitting = {
        (8 if plain else kind.bits, kind.group or cols)
        for kind in kinds
        if (plain or (kind.bits in _BITS and weight.shape[1] == -(-cols * kind.bits // 32)))
        and scales.shape[1] == -(-cols // (kind.group or cols))
    }
    if len(fitting) != 1:
        raise CorruptError(
            f"{weight.path}: tensor {weight.name!r}: shape {list(weight.shape)} with scales {list(scales.shape)} for a "
            f"weight {[rows, cols]} fits {len(fitting)} of config_groups; exactly one is allowed, of "
            f"{', '.join(map(str, _BITS))} bits"
        )
    bits, group = fitting.pop()
    groups = -(-cols // group)
    because = f"{bits} bits in groups of {group} for a weight {[rows, cols]}"
    check_part(
        weight, ("I8",) if plain else ("I32",), (rows, cols if plain else -(-cols * bits // 32)), because
    )
    check_part(scales, SCALES, (1 if scales.shape[0] == 1 else rows, groups), because)
    zeros, g_idx = tensors.get(layer + "weight_zero_point"), tensors.get(layer + "weight_g_idx")
    if zeros is not None and zeros.dtype == "I8":
        if len(zeros.shape) == 1:
            zeros = replace(zeros, shape=(zeros.shape[0], 1))
        check_part(zeros, ("I8",), scales.shape, because)
    elif zeros is not None:
        check_part(zeros, ("I32",), (-(-rows * bits // 32), groups), because)
    if g_idx is not None:
        check_part(g_idx, ("I32",), (cols,), because)
    used = tuple(part for part in (weight, scales, zeros, g_idx) if part is not None)
    return _IntegerTensor(name, (rows, cols), used, bits, group, zeros, g_idx)


def _declared_shape(part: TensorInfo, parts: Parts) -> tuple[int, int]:
    check_part(part, ("I64", "I32"), (2,), "a matrix")
    rows, cols = (
        parts.run(part, 0, part.end - part.begin).view("<i8" if part.dtype == "I64" else "<i4").tolist()
    )
    if not (0 < rows <= _MAX_SIDE and 0 < cols <= _MAX_SIDE):
        raise CorruptError(
            f"{part.path}: tensor {part.name!r}: holds {[rows, cols]}; 1 to {_MAX_SIDE} are allowed"
        )
    return rows, cols
