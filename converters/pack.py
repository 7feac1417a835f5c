"""From rows of a checkpoint to packed bytes in a file: read, pack and write by slabs.

Threads: functions without state; the extents of one conversion are packed on several threads at once.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgert import _native
from edgert.errors import CancelledError, CorruptError, InvalidArgumentError, UnsupportedError

from .decoder import Source
from .moments import Factorised, InputMoments
from .tensor import FLOAT_FORMATS, CarryingReader, TensorReader

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
    moments: InputMoments | None = None  # which its errors are weighed by

    @property
    def carried(self) -> bool:
        """Whether codes are taken over as they are, rather than weights packed."""
        return self.format == self.source.tensor.stored_format and self.format not in FLOAT_FORMATS

    @property
    def is_exact(self) -> bool:
        """Whether no code is chosen."""
        return self.is_vector or self.carried or self.format in FLOAT_FORMATS

    @property
    def bytes(self) -> int:
        if self.is_vector:
            return 4 * self.source.rows * self.source.cols
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
    split_checksums: tuple[str, str] | None = None  # of base and refinement, where an expert is split


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
    factorised = Factorised()
    for part in parts:
        with part.source.tensor.open() as reader:
            moments = None if part.is_exact else factorised(part.moments, part.source.cols)
            packer = _PartPacker(part, reader, remainder_file, moments)
            for first_row, rows in slabs(part):
                if stop.is_set():
                    raise CancelledError("the conversion was cancelled")
                packed = packer.pack(first_row, rows)
                checksum.update(packed)
                write_at(file, offset, packed)
                offset += len(packed)
                advance(rows * part.source.tensor.row_bytes)
        errors.append(packer.error())
        remainder_checksums.append(packer.remainder_checksum())
    return Packed(checksum.hexdigest(), tuple(errors), tuple(remainder_checksums))


def split_shape(parts: Sequence[Part]) -> tuple[list[str], int, int, bool]:
    """An expert's formats, hidden_size and intermediate_size, and whether it has biases."""
    gate = parts[0].source
    return [part.format for part in parts[:3]], gate.cols, gate.rows, len(parts) > 3


def pack_split_extent(
    parts: Sequence[Part],
    file: int,
    offset: int,
    remainder_file: int | None,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> Packed:
    """pack_extent() of an expert that is stored as base and refinement. Raises UnsupportedError where that would not make
    the very bytes of the whole again."""
    shape = split_shape(parts)
    sizes = _native.split_sizes(*shape)
    assert sizes is not None  # or it would not have been planned as such
    destination = bytearray(sizes[1])
    with tempfile.TemporaryFile() as beside:
        packed = pack_extent(parts, beside.fileno(), 0, remainder_file, advance, stop)
        beside.seek(0)
        whole = beside.read()
    try:
        checksum, *others = _native.split_expert(*shape, packed=whole, destination=destination)
    except UnsupportedError as error:
        name = parts[0].name.rpartition(".")[0]
        raise UnsupportedError(f"{name}: {error}: convert without split_experts") from None
    write_at(file, offset, destination)
    base, refinement = others
    return replace(packed, checksum=checksum, split_checksums=(base, refinement))


class _PartPacker:
    def __init__(
        self, part: Part, reader: TensorReader, remainder_file: int | None, moments: _native.Moments | None
    ) -> None:
        self._part = part
        self._moments = moments
        self._reader = reader
        self._remainder_file = remainder_file if part.remainder_offset is not None else None
        self._remainder_hash = _native.Xxh64()
        self._sums = [0.0, 0.0, 0.0]

    def pack(self, first_row: int, rows: int) -> memoryview:
        """`first_row` counts from the part's."""
        # A column of f32 packs to itself, padded: so vectors take the way of the matrices.
        cols = self._part.source.cols
        shape = (rows * cols, 1) if self._part.is_vector else (rows, cols)
        packed = bytearray(_native.packed_bytes(self._part.format, *shape))
        if self._part.carried:
            self._carry(first_row, rows, packed)
        else:
            self._quantize(first_row, rows, shape, packed)
        return memoryview(packed)[: self._part.bytes] if self._part.is_vector else memoryview(packed)

    def _carry(self, first_row: int, rows: int, packed: bytearray) -> None:
        source, reader = self._part.source, self._reader
        assert isinstance(reader, CarryingReader)  # where there is a stored format
        try:
            reader.carry(self._row(first_row), rows, packed, source.step)
        except InvalidArgumentError as error:
            raise self._explain(error, *self._floats(first_row, rows), first_row) from None

    def _quantize(self, first_row: int, rows: int, shape: tuple[int, int], packed: bytearray) -> None:
        raw, dtype = self._floats(first_row, rows)
        cols = self._part.source.cols
        remainder = None if self._remainder_file is None else bytearray(rows * cols)
        try:
            squared, weight, largest, *_ = _native.pack(
                self._part.format,
                raw,
                dtype,
                *shape,
                destination=packed,
                remainder=remainder,
                moments=self._moments,
                threads=1,
            )
        except InvalidArgumentError as error:
            raise self._explain(error, raw, dtype, first_row) from None
        self._sums[0] += squared
        self._sums[1] += weight
        self._sums[2] = max(self._sums[2], largest)
        if remainder is not None and self._remainder_file is not None:
            self._remainder_hash.update(remainder)
            assert self._part.remainder_offset is not None
            write_at(self._remainder_file, self._part.remainder_offset + first_row * cols, remainder)

    def _row(self, row: int) -> int:
        """In the tensor."""
        return self._part.source.first_row + row * self._part.source.step

    def _floats(self, first_row: int, rows: int) -> tuple[bytes | bytearray, str]:
        return self._reader.floats(self._row(first_row), rows, self._part.source.step)

    def error(self) -> Error:
        return Error(*self._sums)

    def remainder_checksum(self) -> str | None:
        return None if self._remainder_file is None else self._remainder_hash.hexdigest()

    def _explain(
        self, error: InvalidArgumentError, raw: bytes | bytearray, dtype: str, first_row: int
    ) -> CorruptError:
        """Name the tensor and where in it the weight is; the native message counts from the slab."""
        tensor, cols = self._part.source.tensor, self._part.source.cols
        position = _first_not_finite(raw, dtype)
        where = f"{tensor.path}: tensor {tensor.name!r}"
        if position is None:
            return CorruptError(f"{where}: rows from {self._row(first_row)} on: {error}")
        row, column = self._row(first_row + position // cols), position % cols
        return CorruptError(
            f"{where}: element {row * cols + column} (row {row}, column {column}), "
            f"{tensor.address(row, column)}: NaN or infinity; a weight is a finite number"
        )


def slabs(part: Part) -> list[tuple[int, int]]:
    """(first row, rows) of each piece to handle at a time: whole tiles, and at least one."""
    source = part.source
    if part.is_vector:
        return [(0, source.rows)]
    tile = max(TILE_ROWS * source.tensor.row_bytes, _native.packed_bytes(part.format, TILE_ROWS, source.cols))
    if not part.carried:
        tile = max(tile, TILE_ROWS * source.cols * 4)  # f32 in between
    step = max(1, SLAB_BYTES // tile) * TILE_ROWS
    return [(first, min(step, source.rows - first)) for first in range(0, source.rows, step)]


def write_at(file: int, offset: int, data: bytearray | memoryview) -> None:
    """All of `data`, at `offset` of the open `file`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _first_not_finite(raw: bytes | bytearray, dtype: str) -> int | None:
    exponent = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[dtype]
    elements = memoryview(raw).cast("I" if dtype == "f32" else "H")
    return next((index for index, bits in enumerate(elements) if bits & exponent == exponent), None)
