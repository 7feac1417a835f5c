"""Weight tensors as checkpoints hold them: plain floats here; each kind of quantised checkpoint adds its own.

A tensor's last dimension is its columns; all others count as rows. Tensors are descriptions without state; what reads
one is made by open() and used by one thread.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

from edgert import _native
from edgert.errors import UnsupportedError

from .files import InputFile

FLOAT_FORMATS = ("f32", "f16", "bf16")
_FLOATS = {"F32": ("f32", 4), "F16": ("f16", 2), "BF16": ("bf16", 2)}


class TensorReader(Protocol):
    """Reads rows of one tensor; a context manager that holds its files open."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...
    def floats(self, first_row: int, rows: int, step: int = 1) -> tuple[bytes | bytearray, str]:
        """The weights of `rows` rows, each `step` after the one before, row-major, and their element type: f32, f16 or
        bf16."""


@runtime_checkable
class CarryingReader(TensorReader, Protocol):
    """Of a tensor whose stored_format is none of floats."""

    def carry(self, first_row: int, rows: int, destination: bytearray, step: int = 1) -> None:
        """The same rows packed in that format, code for code. Raises InvalidArgumentError where it cannot hold them."""


class Tensor(Protocol):
    """What a conversion needs of a tensor."""

    @property
    def name(self) -> str:
        """As the checkpoint calls it."""

    @property
    def path(self) -> Path:
        """The file that holds it, or most of it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def row_bytes(self) -> int:
        """What a row takes in the checkpoint, rounded up."""

    @property
    def stored_format(self) -> str | None:
        """The weight format that holds the checkpoint's own values exactly, and that a conversion keeps unless told
        otherwise; None where it chooses."""

    def check(self) -> None:
        """Raises UnsupportedError where this version cannot read the elements."""

    def address(self, row: int, column: int) -> str:
        """Where a weight is in the file, for messages: "byte 1234"."""

    def open(self) -> TensorReader: ...


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of plain elements: its bytes are [begin, end) of the file, row-major, little-endian.

    `dtype` as safetensors spells it; floats alone are weights. `stored_format`: see Tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    path: Path
    stored_format: str | None = None

    @property
    def element_bytes(self) -> int:
        return _FLOATS[self.dtype][1]

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] * self.element_bytes

    def check(self) -> None:
        if self.dtype not in _FLOATS:
            raise UnsupportedError(
                f"{self.path}: tensor {self.name!r}: weights of dtype {self.dtype} are not read by this "
                f"version; {', '.join(_FLOATS)} are"
            )

    def address(self, row: int, column: int) -> str:
        return f"byte {self.begin + row * self.row_bytes + column * self.element_bytes}"

    def open(self) -> TensorReader:
        return _FloatReader(self)


class _PlainReader:
    """Holds the tensor's file open."""

    def __init__(self, path: Path) -> None:
        self._file = InputFile(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class _FloatReader(_PlainReader):
    def __init__(self, tensor: TensorInfo) -> None:
        super().__init__(tensor.path)
        self._tensor = tensor

    def floats(self, first_row: int, rows: int, step: int = 1) -> tuple[bytes | bytearray, str]:
        row_bytes = self._tensor.row_bytes
        raw = _read_rows(self._file, self._tensor.begin + first_row * row_bytes, row_bytes, rows, step)
        return raw, _FLOATS[self._tensor.dtype][0]


def _read_rows(file: InputFile, offset: int, row_bytes: int, rows: int, step: int) -> bytes | bytearray:
    """`rows` rows from `offset` on, each `step` after the one before."""
    raw = file.read(offset, ((rows - 1) * step + 1) * row_bytes)
    if step == 1:
        return raw
    view = memoryview(raw)
    return b"".join(view[at : at + row_bytes] for at in range(0, len(raw), step * row_bytes))


@dataclass(frozen=True, slots=True)
class TransposedTensor:
    """Matrices [.., outputs, inputs] of which the checkpoint has [.., inputs, outputs]: its columns are rows here."""

    stored: TensorInfo

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, inputs, outputs = self.stored.shape
        return *outer, outputs, inputs

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] * self.stored.element_bytes

    @property
    def stored_format(self) -> str | None:
        return self.stored.stored_format

    def check(self) -> None:
        self.stored.check()

    def offset(self, row: int, column: int) -> int:
        outputs, inputs = self.shape[-2:]
        matrix, output = divmod(row, outputs)
        element = (matrix * inputs + column) * outputs + output
        return self.stored.begin + element * self.stored.element_bytes

    def address(self, row: int, column: int) -> str:
        return f"byte {self.offset(row, column)}"

    def open(self) -> TensorReader:
        return _TransposedReader(self)


class _TransposedReader(_PlainReader):
    def __init__(self, tensor: TransposedTensor) -> None:
        super().__init__(tensor.path)
        self._tensor = tensor

    def floats(self, first_row: int, rows: int, step: int = 1) -> tuple[bytes | bytearray, str]:
        """REQUIRES rows of one matrix."""
        dtype, element_bytes = _FLOATS[self._tensor.stored.dtype]
        inputs = self._tensor.shape[-1]
        span = (rows - 1) * step + 1  # elements of a stored row
        raw = memoryview(bytearray(inputs * span * element_bytes))
        for column in range(inputs):
            part = raw[column * span * element_bytes :][: span * element_bytes]
            self._file.read_into(self._tensor.offset(first_row, column), part)
        elements = raw.cast("I" if element_bytes == 4 else "H")
        return b"".join(elements[row::span].tobytes() for row in range(0, span, step)), dtype


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """A tensor of ggml's quantised blocks, row by row; `block` is a row of _native.block_types()."""

    name: str
    block: "BlockType"
    shape: tuple[int, ...]
    begin: int
    path: Path

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.block.elements * self.block.bytes

    @property
    def stored_format(self) -> str:
        return self.block.format

    def check(self) -> None:
        """Every block type of the table is read."""

    def address(self, row: int, column: int) -> str:
        block = self.begin + row * self.row_bytes + column // self.block.elements * self.block.bytes
        return f"the {self.block.name} block at byte {block}"

    def open(self) -> TensorReader:
        return _BlockReader(self)


@dataclass(frozen=True, slots=True)
class BlockType:
    """How ggml stores a run of `elements` weights in `bytes`, and the weight format that carries them over."""

    name: str
    elements: int
    bytes: int
    format: str


def block_types() -> dict[str, BlockType]:
    """Those that this version carries over, by their names in ggml."""
    return {row["name"]: BlockType(**row) for row in _native.block_types()}


class _BlockReader:
    def __init__(self, tensor: BlockTensor) -> None:
        self._tensor = tensor
        self._file = InputFile(tensor.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def floats(self, first_row: int, rows: int, step: int = 1) -> tuple[bytes | bytearray, str]:
        raw = self._read(first_row, rows, step)
        return _native.dequantize(self._tensor.block.name, raw, rows, self._tensor.shape[-1]), "f32"

    def carry(self, first_row: int, rows: int, destination: bytearray, step: int = 1) -> None:
        raw = self._read(first_row, rows, step)
        _native.repack(
            self._tensor.block.name, raw, rows, self._tensor.shape[-1], destination=destination, threads=1
        )

    def _read(self, first_row: int, rows: int, step: int) -> bytes | bytearray:
        row_bytes = self._tensor.row_bytes
        return _read_rows(self._file, self._tensor.begin + first_row * row_bytes, row_bytes, rows, step)
