"""From rows of a checkpoint to packed bytes in a file: read, pack and write by slabs.

Threads: functions without state; the extents of one conversion are packed on several threads at once.
"""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgert import _native
from edgert.errors import CancelledError, CorruptError, InvalidArgumentError

from .decoder import WEIGHT_DTYPES, Source
from .files import InputFile

TILE_ROWS = 16
SLAB_BYTES = 4 << 20  # of source or of packed data, whichever is larger


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix (or vector, which stays plain f32) to be packed."""

    name: str
    source: Source
    format: str
    is_vector: bool = False
    remainder_offset: int | None = None

    @property
    def bytes(self) -> int:
        if self.is_vector:
            return 4 * self.source.cols
        return _native.packed_bytes(self.format, self.source.rows, self.source.cols)


@dataclass(frozen=True, slots=True)
class Error:
    """Sums over a part: squared error, squared weight, and the largest error."""

    squared: float
    squared_weight: float
    largest: float


@dataclass(frozen=True, slots=True)
class Packed:
    checksum: str
    errors: tuple[Error, ...]
    remainder_checksums: tuple[str | None, ...]


def pack_extent(
    parts: Sequence[Part],
    file: int,
    offset: int,
    remainder_file: int | None,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> Packed:
    """Pack `parts` one after the other at `offset` of the open `file`.

    `advance` is told of source bytes done. Raises CorruptError naming tensor and position for a weight that
    is not finite, CancelledError once `stop` is set.
    """
    checksum = _native.Xxh64()
    errors = []
    remainder_checksums: list[str | None] = []
    for part in parts:
        with InputFile(part.source.tensor.path) as input_file:
            packer = _PartPacker(part, input_file, remainder_file)
            for first_row, rows in slabs(part):
                if stop.is_set():
                    raise CancelledError("the conversion was cancelled")
                packed = packer.pack(first_row, rows)
                checksum.update(packed)
                write_at(file, offset, packed)
                offset += len(packed)
                advance(rows * part.source.row_bytes)
        errors.append(packer.error())
        remainder_checksums.append(packer.remainder_checksum())
    return Packed(checksum.hexdigest(), tuple(errors), tuple(remainder_checksums))


class _PartPacker:
    def __init__(self, part: Part, input_file: InputFile, remainder_file: int | None) -> None:
        self._part = part
        self._input = input_file
        self._remainder_file = remainder_file if part.remainder_offset is not None else None
        self._remainder_hash = _native.Xxh64()
        self._sums = [0.0, 0.0, 0.0]

    def pack(self, first_row: int, rows: int) -> memoryview:
        source = self._part.source
        raw = bytearray(rows * source.row_bytes)
        self._input.read_into(source.begin + first_row * source.row_bytes, memoryview(raw))
        # A column of f32 packs to itself, padded: so vectors take the way of the matrices.
        shape = (source.cols, 1) if self._part.is_vector else (rows, source.cols)
        packed = bytearray(_native.packed_bytes(self._part.format, *shape))
        remainder = None if self._remainder_file is None else bytearray(rows * source.cols)
        try:
            squared, weight, largest = _native.pack(
                self._part.format,
                raw,
                WEIGHT_DTYPES[source.tensor.dtype],
                *shape,
                destination=packed,
                remainder=remainder,
                threads=1,
            )
        except InvalidArgumentError as error:
            raise self._explain(error, raw, first_row) from None
        self._sums[0] += squared
        self._sums[1] += weight
        self._sums[2] = max(self._sums[2], largest)
        if remainder is not None and self._remainder_file is not None:
            self._remainder_hash.update(remainder)
            assert self._part.remainder_offset is not None
            write_at(self._remainder_file, self._part.remainder_offset + first_row * source.cols, remainder)
        return memoryview(packed)[: self._part.bytes] if self._part.is_vector else memoryview(packed)

    def error(self) -> Error:
        return Error(*self._sums)

    def remainder_checksum(self) -> str | None:
        return None if self._remainder_file is None else self._remainder_hash.hexdigest()

    def _explain(self, error: InvalidArgumentError, raw: bytearray, first_row: int) -> CorruptError:
        """Name the tensor and where in it the weight is; the native message counts from the slab."""
        source = self._part.source
        position = _first_not_finite(raw, WEIGHT_DTYPES[source.tensor.dtype])
        where = f"{source.tensor.path}: tensor {source.tensor.name!r}"
        if position is None:
            return CorruptError(f"{where}: rows from {source.first_row + first_row} on: {error}")
        element = (source.first_row + first_row) * source.cols + position
        width = source.row_bytes // source.cols
        return CorruptError(
            f"{where}: element {element} (row {element // source.cols}, column {element % source.cols}), "
            f"byte {source.tensor.begin + element * width}: NaN or infinity; a weight is a finite number"
        )


def slabs(part: Part) -> list[tuple[int, int]]:
    """(first row, rows) of each piece to handle at a time: whole tiles, and at least one."""
    source = part.source
    if part.is_vector:
        return [(0, 1)]
    tile = max(TILE_ROWS * source.row_bytes, _native.packed_bytes(part.format, TILE_ROWS, source.cols))
    step = max(1, SLAB_BYTES // tile) * TILE_ROWS
    return [(first, min(step, source.rows - first)) for first in range(0, source.rows, step)]


def write_at(file: int, offset: int, data: bytearray | memoryview) -> None:
    """All of `data`, at `offset` of the open `file`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _first_not_finite(raw: bytearray, dtype: str) -> int | None:
    exponent = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[dtype]
    elements = memoryview(raw).cast("I" if dtype == "f32" else "H")
    return next((index for index, bits in enumerate(elements) if bits & exponent == exponent), None)
