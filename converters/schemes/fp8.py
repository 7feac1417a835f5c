"""Weights in F8_E4M3 under f32 or bf16 scales, as DeepSeek-V3 has them.

X [out, in] F8_E4M3 and X_scale_inv, one scale for each block of weight_block_size; the last blocks of rows and
columns may be smaller. Without weight_block_size, one scale for all. No weight format holds them: they are multiplied
out, rounding once to f32. Activations are not quantised by their scales here, so those are left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgert.errors import CorruptError

from ..config import Config
from ..tensor import Tensor, TensorInfo
from .bits import Floats, floats_of_e4m3
from .coded import PartedTensor
from .parts import SCALES, Parts, check_part, need_part

KEYS_WITHOUT_EFFECT = frozenset({
    "quant_method", "activation_scheme", "modules_to_not_convert", "modules_to_convert", "scale_fmt", "dequantize",
    "kv_cache_scheme", "ignored_layers", "activation_scale_ub",
})  # fmt: skip

_MAX_BLOCK = 1 << 20
_ACTIVATION_SCALES = (".activation_scale", ".input_scale")


@dataclass(frozen=True)
class Fp8Tensor(PartedTensor):
    """Parts: weights, and scales as a matrix. A scale counts for a block of rows and columns."""

    block_rows: int
    block_cols: int

    @property
    def why_not_kept(self) -> str:
        return "8-bit floats, which no weight format holds"

    def dequantize(self, parts: Parts, first_row: int, rows: int, step: int) -> Floats:
        weight, scale = self.parts
        cols = self.shape[-1]
        matrix = self.shape[-2]  # rows of one matrix; fused experts have several, each with its own blocks
        blocks = -(-matrix // self.block_rows)
        span = (rows - 1) * step + 1
        index = np.arange(first_row, first_row + span, step)
        block = index // matrix * blocks + index % matrix // self.block_rows
        scales = parts.floats(scale, int(block[0]), int(block[-1] - block[0]) + 1)
        out = floats_of_e4m3(parts.rows(weight, first_row, span)[::step])
        for row in range(rows):
            out[row] *= np.repeat(scales[block[row] - block[0]], self.block_cols)[:cols]
        return out


def read(settings: Config, tensors: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """See read_scheme()."""
    settings.choice("fmt", "e4m3", ("e4m3", "float8_e4m3fn"))
    block = settings.integers("weight_block_size", maximum=_MAX_BLOCK)
    if block and (len(block) != 2 or 0 in block):
        settings.fail("weight_block_size", f"{str(block)[:80]}; two lengths, of rows and columns, are needed")
    settings.choice("expert_dtype", "fp8", ("fp8",))
    found: dict[str, Tensor] = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith(_ACTIVATION_SCALES):
            del found[name]
        if weight.dtype != "F8_E4M3":
            continue
        scale = name + "_scale" if name + "_scale" in tensors else name + "_scale_inv"
        scales = need_part(tensors, scale)
        del found[scale]
        found[name] = fp8_tensor(weight, scales, block)
    return found


def fp8_tensor(weight: TensorInfo, scales: TensorInfo, block: Sequence[int]) -> Fp8Tensor:
    """`block`: rows and columns that share a scale; empty where the shape of the scales alone says it.

    Raises CorruptError where shape or dtype of the scales are not for this weight.
    """
    if len(weight.shape) < 2 or 0 in weight.shape:
        raise CorruptError(
            f"{weight.path}: tensor {weight.name!r}: shape {list(weight.shape)}; a matrix is needed"
        )
    *experts, rows, cols = weight.shape
    because = f"tensor {weight.name!r} of shape {list(weight.shape)}"
    if block and scales.shape not in ((), (1,)):
        block_rows, block_cols = block
    elif scales.shape == (*experts, rows, 1):  # a scale a row
        block_rows, block_cols = 1, cols
    else:
        block_rows, block_cols = rows, cols
        scales = (
            replace(scales, shape=(*experts, 1, 1))
            if math.prod(scales.shape) == math.prod(experts)
            else scales
        )
    grid = (*experts, -(-rows // block_rows), -(-cols // block_cols))
    check_part(scales, (*SCALES, "F8_E8M0"), grid, because)
    scales = replace(scales, shape=(math.prod(grid[:-1]), grid[-1]))
    return Fp8Tensor(weight.name, weight.shape, (weight, scales), block_rows, block_cols)
