"""Matrices that a checkpoint holds as codes with scales: carried over where a weight format holds both exactly.

    weight = scale * (code - zero)      or, of an affine kind,      weight = scale * code + bias

with one scale, and zero or bias, for `group` consecutive columns of a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from edgert import _native
from edgert.errors import CorruptError

from ..tensor import CarryingReader, TensorInfo, TensorReader
from .bits import Bytes, Floats
from .parts import BYTES, Parts

Row = Mapping[str, Any]  # of the format table

_SCANNED_WEIGHTS = 16 << 20  # whose scales are looked at together
_DEQUANTISED_WEIGHTS = 1 << 20  # at a time


@dataclass(frozen=True)
class Grid:
    """What scales a run of rows: `scales` [rows, groups], and zeros or biases of the same shape."""

    scales: Floats
    zeros: Bytes | None = None
    biases: Floats | None = None


@dataclass(frozen=True)
class PartedTensor(ABC):
    """A tensor that is made of parts of the checkpoint, the first of which holds most of it. See Tensor."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorInfo, ...]

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1]))

    @property
    def row_bytes(self) -> int:
        size = sum(int(np.prod(part.shape)) * BYTES[part.dtype] for part in self.parts)
        return -(-size // self.rows)

    @property
    def stored_format(self) -> str | None:
        return None

    @property
    def why_not_kept(self) -> str | None:
        """Why there is no stored format, where there could have been one."""
        return None

    def check(self) -> None:
        """The parts were checked when they were put together."""
        return

    def address(self, row: int, column: int) -> str:
        part = self.parts[0]
        return f"in bytes {part.begin} to {part.end}"

    def open(self) -> TensorReader:
        return _Reader(self)

    @abstractmethod
    def dequantize(self, parts: Parts, first_row: int, rows: int, step: int) -> Floats:
        """The weights of `rows` rows, each `step` after the one before, f32 [rows, cols], rounded once."""


class CarriedTensor(PartedTensor):
    """One that may have a stored format."""

    def open(self) -> CarryingReader:
        return _CarryingReader(self)

    @abstractmethod
    def carry(self, parts: Parts, first_row: int, rows: int, destination: bytearray, step: int) -> None:
        """See CarryingReader."""


class CodedTensor(CarriedTensor):
    """A matrix of codes under a grid of scales."""

    @property
    @abstractmethod
    def bits(self) -> int: ...
    @property
    @abstractmethod
    def group(self) -> int:
        """Columns that share a scale; the last group may have fewer."""

    @property
    def affine(self) -> bool:
        """Whether there are biases instead of zeros."""
        return False

    @abstractmethod
    def codes(self, parts: Parts, first_row: int, rows: int) -> Bytes:
        """Codes of these rows, [rows, cols]."""

    @abstractmethod
    def grid(self, parts: Parts, first_row: int, rows: int) -> Grid: ...

    def order(self, parts: Parts) -> npt.NDArray[np.int64] | None:
        """The group of every column, where it is not `column // group`."""
        return None

    @cached_property
    def _choice(self) -> tuple[str | None, str | None]:
        """The format that holds this tensor in the fewest bits, or why there is none."""
        rows = [row for row in _native.formats() if _has_place(row, self.bits, self.group, self.shape[-1])]
        rows.sort(key=lambda row: float(row["bits_per_weight"]))
        with Parts() as parts:
            if self.order(parts) is not None:
                return None, "act-order: columns out of the order of their groups"
            if not rows or not self._is_sure(rows[0]):
                for grid in self._grids(parts):
                    rows = [row for row in rows if _holds(row, grid)]
        if not rows:
            return (
                None,
                f"{self.bits}-bit codes in groups of {self.group} under scales that no weight format holds",
            )
        return rows[0]["name"], None

    def _is_sure(self, row: Row) -> bool:
        """Whether the format holds whatever scales and zeros there may be."""
        wide = any(part.dtype in ("BF16", "F32") for part in self.parts)
        return not wide and row["zero"] == ("min_f16" if self.affine else "u8")

    @property
    def stored_format(self) -> str | None:
        return self._choice[0]

    @property
    def why_not_kept(self) -> str | None:
        return self._choice[1]

    def _grids(self, parts: Parts) -> Iterator[Grid]:
        step = max(1, _SCANNED_WEIGHTS // self.shape[-1])
        for first in range(0, self.rows, step):
            rows = min(step, self.rows - first)
            grid = self.grid(parts, first, rows)
            if not exact_in_f16(grid.scales).all():
                grid = self._settled(self.codes(parts, first, rows), grid)
            yield grid

    def dequantize(self, parts: Parts, first_row: int, rows: int, step: int) -> Floats:
        cols = self.shape[-1]
        groups = self.order(parts)
        if groups is None:
            groups = np.arange(cols) // self.group
        codes, grid = self._every(parts, first_row, rows, step)
        out = np.empty((rows, cols), np.float32)
        height = max(1, _DEQUANTISED_WEIGHTS // cols)
        for row in range(0, rows, height):
            here = slice(row, row + height)
            weights = codes[here].astype(np.float32)
            if grid.zeros is not None:
                weights -= grid.zeros[here].astype(np.float32)[:, groups]
            weights *= grid.scales[here][:, groups]
            if grid.biases is not None:
                weights += grid.biases[here][:, groups]
            out[here] = weights
        return out

    def _settled(self, codes: Bytes, grid: Grid) -> Grid:
        """The same weights with a scale of 0 where it is not exact in f16 and scales nothing: MLX gives groups of zeros
        one of 1e-7."""
        starts = np.arange(0, self.shape[-1], self.group)
        centred = codes == (
            0 if grid.zeros is None else np.repeat(grid.zeros, self.group, axis=1)[:, : codes.shape[1]]
        )
        idle = np.logical_and.reduceat(centred, starts, axis=1)
        return replace(grid, scales=np.where(idle & ~exact_in_f16(grid.scales), np.float32(0), grid.scales))

    def _every(self, parts: Parts, first_row: int, rows: int, step: int) -> tuple[Bytes, Grid]:
        """Codes and grid of every `step`-th row."""
        span = (rows - 1) * step + 1
        codes, grid = self.codes(parts, first_row, span), self.grid(parts, first_row, span)
        if step == 1:
            return codes, grid
        zeros = None if grid.zeros is None else grid.zeros[::step]
        return codes[::step], Grid(
            grid.scales[::step], zeros, None if grid.biases is None else grid.biases[::step]
        )

    def carry(self, parts: Parts, first_row: int, rows: int, destination: bytearray, step: int) -> None:
        row = next(row for row in _native.formats() if row["name"] == self.stored_format)
        codes, grid = self._every(parts, first_row, rows, step)
        if not exact_in_f16(grid.scales).all():
            grid = self._settled(codes, grid)
        cols = self.shape[-1]
        groups = np.arange(-(-cols // row["group"])) * row["group"] // self.group

        def spread(values: npt.NDArray[Any]) -> memoryview:
            """One value for each group of the format; a group of the checkpoint is a whole number of them."""
            return np.ascontiguousarray(values[:, groups]).data

        offsets = None
        if row["zero"] == "u8" and grid.zeros is not None:
            offsets = spread(grid.zeros)
        elif row["zero"] == "min_f16" and grid.biases is not None:
            offsets = spread(-grid.biases)
        _native.pack_codes(
            row["name"],
            np.ascontiguousarray(codes).data,
            spread(grid.scales),
            offsets,
            rows,
            cols,
            destination=destination,
            threads=1,
        )


def _has_place(row: Row, bits: int, group: int, cols: int) -> bool:
    """Whether a row of the format table has codes, scales and groups of this kind."""
    plain = row["scale"] == "f16" and row["codebook"] == "none" and row["block"] == row["group"]
    return bool(plain and row["bits"] == bits and (group % row["group"] == 0 or group >= cols))


def _holds(row: Row, grid: Grid) -> bool:
    """Whether the format represents every scale, zero and bias exactly."""
    if not exact_in_f16(grid.scales).all():
        return False
    if grid.biases is not None:
        return row["zero"] == "min_f16" and bool(exact_in_f16(grid.biases).all())
    middle = 1 << (row["bits"] - 1)
    return row["zero"] == "u8" or (row["zero"] == "none" and bool((grid.zeros == middle).all()))


def exact_in_f16(values: Floats) -> npt.NDArray[np.bool_]:
    with np.errstate(over="ignore"):
        exact: npt.NDArray[np.bool_] = values.astype(np.float16).astype(np.float32) == values
    return exact


def column_order(parts: Parts, g_idx: TensorInfo, groups: int, group: int) -> npt.NDArray[np.int64] | None:
    """What `g_idx` I32 [cols] says, or None where it says `column // group`. Raises CorruptError for another group."""
    order = parts.run(g_idx, 0, g_idx.end - g_idx.begin).view("<i4").astype(np.int64)
    if order.min() < 0 or order.max() >= groups:
        raise CorruptError(
            f"{g_idx.path}: tensor {g_idx.name!r}: holds {order.min()} to {order.max()}; "
            f"groups 0 to {groups - 1} are allowed"
        )
    return None if np.array_equal(order, np.arange(order.size) // group) else order


class _Reader:
    def __init__(self, tensor: PartedTensor) -> None:
        self._tensor = tensor
        self._parts = Parts()

    def __enter__(self) -> Self:
        self._parts.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._parts.__exit__(*exception)

    def floats(self, first_row: int, rows: int, step: int = 1) -> tuple[bytes | bytearray, str]:
        return self._tensor.dequantize(self._parts, first_row, rows, step).tobytes(), "f32"


class _CarryingReader(_Reader):
    def __init__(self, tensor: CarriedTensor) -> None:
        super().__init__(tensor)
        self._carried = tensor

    def carry(self, first_row: int, rows: int, destination: bytearray, step: int = 1) -> None:
        self._carried.carry(self._parts, first_row, rows, destination, step)
