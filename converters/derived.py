"""Tensors computed from a checkpoint's own: rows in another order, heads transposed, a function of each element."""

import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .pack import TILE_ROWS
from .tensor import CarryingReader, Tensor, TensorReader


@dataclass(frozen=True, slots=True)
class _Derived:
    """Says of itself what `stored` does."""

    stored: Tensor

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def row_bytes(self) -> int:
        return self.stored.row_bytes

    @property
    def stored_format(self) -> str | None:
        return None

    def check(self) -> None:
        self.stored.check()


class _Reader:
    def __init__(self, stored: Tensor) -> None:
        self._stored = stored.open()

    def __enter__(self) -> Self:
        self._stored.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stored.__exit__(*exception)


# --- rows in another order ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PickedRows(_Derived):
    """`rows` rows of every `period`, from `first` on: those of one part where a tensor holds parts by turns."""

    first: int
    rows: int
    period: int

    @property
    def shape(self) -> tuple[int, ...]:
        stored = self.stored.shape
        count = 1
        for size in stored[:-1]:
            count *= size
        return count // self.period * self.rows, stored[-1]

    @property
    def stored_format(self) -> str | None:
        return self.stored.stored_format if self.rows % TILE_ROWS == 0 else None

    def address(self, row: int, column: int) -> str:
        return self.stored.address(row // self.rows * self.period + self.first + row % self.rows, column)

    def open(self) -> TensorReader:
        return _PickedReader(self)


class _PickedReader(_Reader):
    def __init__(self, tensor: PickedRows) -> None:
        super().__init__(tensor.stored)
        self._tensor = tensor

    def floats(self, first_row: int, rows: int, step: int = 1) -> tuple[bytes | bytearray, str]:
        parts = [self._stored.floats(first, count) for first, count in self._pieces(first_row, rows, step)]
        return b"".join(raw for raw, _ in parts), parts[0][1]

    def carry(self, first_row: int, rows: int, destination: bytearray, step: int = 1) -> None:
        packed_row = len(destination) // (-(-rows // TILE_ROWS) * TILE_ROWS)
        offset = 0
        stored = self._stored
        assert isinstance(stored, CarryingReader)  # where there is a stored format
        for first, count in self._pieces(first_row, rows, step):
            piece = bytearray(-(-count // TILE_ROWS) * TILE_ROWS * packed_row)
            stored.carry(first, count, piece)
            destination[offset : offset + len(piece)] = piece
            offset += len(piece)

    def _pieces(self, first_row: int, rows: int, step: int) -> Iterator[tuple[int, int]]:
        """Runs of rows of the stored tensor."""
        tensor = self._tensor
        row, end = first_row, first_row + (rows - 1) * step + 1
        while row < end:
            turn, within = divmod(row, tensor.rows)
            count = min(tensor.rows - within, end - row) if step == 1 else 1
            yield turn * tensor.period + tensor.first + within, count
            row += count if step == 1 else step


# --- heads transposed ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TransposedHeads(_Derived):
    """Of a tensor whose heads have `period` rows each: each head's first `inputs` rows, transposed; [heads * columns,
    inputs]."""

    inputs: int
    period: int

    @property
    def outputs(self) -> int:
        return self.stored.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[0] // self.period * self.outputs, self.inputs

    @property
    def row_bytes(self) -> int:
        return self.stored.row_bytes * self.inputs // self.outputs

    def address(self, row: int, column: int) -> str:
        head, output = divmod(row, self.outputs)
        return self.stored.address(head * self.period + column, output)

    def open(self) -> TensorReader:
        return _TransposedHeadsReader(self)


class _TransposedHeadsReader(_Reader):
    def __init__(self, tensor: TransposedHeads) -> None:
        super().__init__(tensor.stored)
        self._tensor = tensor
        self._head = -1
        self._dtype = ""
        self._elements = memoryview(b"")

    def floats(self, first_row: int, rows: int, step: int = 1) -> tuple[bytes | bytearray, str]:
        parts = [self._row(row) for row in range(first_row, first_row + rows * step, step)]
        return b"".join(parts), self._dtype

    def _row(self, row: int) -> bytes:
        head, output = divmod(row, self._tensor.outputs)
        if head != self._head:
            raw, self._dtype = self._stored.floats(head * self._tensor.period, self._tensor.inputs)
            self._elements = memoryview(raw).cast("B").cast("I" if self._dtype == "f32" else "H")
            self._head = head
        return self._elements[output :: self._tensor.outputs].tobytes()


# --- a function of each element -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mapped(_Derived):
    """Each element by a function of its own, rounded to f32. For vectors: it is slow."""

    function: Callable[[float], float]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def address(self, row: int, column: int) -> str:
        return self.stored.address(row, column)

    def open(self) -> TensorReader:
        return _MappedReader(self)


class _MappedReader(_Reader):
    def __init__(self, tensor: Mapped) -> None:
        super().__init__(tensor.stored)
        self._function = tensor.function

    def floats(self, first_row: int, rows: int, step: int = 1) -> tuple[bytes | bytearray, str]:
        raw, dtype = self._stored.floats(first_row, rows, step)
        return array("f", map(self._function, _elements(raw, dtype))).tobytes(), "f32"


def _elements(raw: bytes | bytearray, dtype: str) -> tuple[float, ...]:
    if dtype == "bf16":
        wide = array("I", (bits << 16 for bits in memoryview(raw).cast("B").cast("H")))
        raw, dtype = wide.tobytes(), "f32"
    size, code = (4, "f") if dtype == "f32" else (2, "e")
    return struct.unpack(f"<{len(raw) // size}{code}", raw)
