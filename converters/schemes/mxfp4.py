"""MXFP4: 4-bit floats E2M1 under one power of two for 32 columns.

gpt-oss keeps its experts so: X_blocks U8 [experts, rows, groups, 16], two codes a byte and the lower bits first;
X_scales U8 [experts, rows, groups], E8M0.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgert import _native
from edgert.errors import CorruptError

from ..config import Config
from ..tensor import Tensor, TensorInfo
from .bits import FP4, Bytes, Floats, powers_of_two, unpack_bits
from .coded import CarriedTensor
from .parts import Parts, add_tensor, check_part, need_part

KEYS_WITHOUT_EFFECT = frozenset({"quant_method", "modules_to_not_convert", "dequantize"})

GROUP = 32
_FORMAT = "mxfp4"


@dataclass(frozen=True)
class Mxfp4Tensor(CarriedTensor):
    """Parts: codes, a row's in a run of cols / 2 bytes, and scales U8, a row's in cols / 32."""

    @property
    def stored_format(self) -> str:
        return _FORMAT

    def dequantize(self, parts: Parts, first_row: int, rows: int, step: int) -> Floats:
        codes, exponents = self._read(parts, first_row, rows, step)
        weights = FP4[codes].reshape(rows, -1, GROUP)
        weights *= powers_of_two(exponents).reshape(rows, -1, 1)
        return weights.reshape(rows, -1)

    def carry(self, parts: Parts, first_row: int, rows: int, destination: bytearray, step: int) -> None:
        codes, exponents = self._read(parts, first_row, rows, step)
        _native.pack_codes(
            _FORMAT,
            codes.data,
            exponents.data,
            None,
            rows,
            self.shape[-1],
            destination=destination,
            threads=1,
        )

    def _read(self, parts: Parts, first_row: int, rows: int, step: int) -> tuple[Bytes, Bytes]:
        cols = self.shape[-1]
        span = (rows - 1) * step + 1
        packed = parts.run(self.parts[0], first_row * cols // 2, span * cols // 2).reshape(span, -1)[::step]
        exponents = parts.run(self.parts[1], first_row * cols // GROUP, span * cols // GROUP)
        exponents = np.ascontiguousarray(exponents.reshape(span, -1)[::step])
        if (exponents == 255).any():
            row, group = divmod(int(np.argmax(exponents == 255)), cols // GROUP)
            raise CorruptError(
                f"{self.parts[1].path}: tensor {self.parts[1].name!r}: row {first_row + row * step}, group {group}: "
                "255, a NaN; a scale is a finite number"
            )
        return unpack_bits(packed, 4, cols), exponents


def read(settings: Config, tensors: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """See read_scheme()."""
    del settings  # nothing in them changes what the tensors mean
    found: dict[str, Tensor] = dict(tensors)
    for name in tensors:
        stem = name.removesuffix("_blocks")
        if stem == name:
            continue
        blocks, scales = tensors[name], need_part(tensors, stem + "_scales")
        if len(blocks.shape) < 3 or 0 in blocks.shape:
            raise CorruptError(
                f"{blocks.path}: tensor {name!r}: shape {list(blocks.shape)}; [.., rows, groups, 16] is needed"
            )
        *rows, groups, _ = blocks.shape
        check_part(blocks, ("U8",), (*rows, groups, GROUP // 2), "MXFP4")
        check_part(scales, ("U8",), (*rows, groups), f"tensor {name!r}")
        for part in (blocks, scales):
            del found[part.name]
        add_tensor(found, Mxfp4Tensor(stem, (*rows, groups * GROUP), (blocks, scales)))
    return found
