"""The parts that a quantised tensor lies in: found by name, checked by dtype and shape, read by rows or columns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from edgert.errors import CorruptError

from ..files import InputFile
from ..tensor import Tensor, TensorInfo
from .bits import Bytes, Floats, floats_of

BYTES = {"F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "F8_E8M0": 1, "F8_E4M3": 1}
WORDS = ("I32", "U32")
SCALES = ("F16", "BF16", "F32")


def check_part(part: TensorInfo, dtypes: Sequence[str], shape: tuple[int, ...], because: str) -> None:
    """Raises CorruptError where the part is not as the others demand; `because` says who demands it."""
    if part.dtype not in dtypes:
        raise CorruptError(
            f"{part.path}: tensor {part.name!r}: dtype {part.dtype}; {', '.join(dtypes)} is allowed here"
        )
    if part.shape != shape:
        raise CorruptError(
            f"{part.path}: tensor {part.name!r}: shape {list(part.shape)}; {because} demands {list(shape)}"
        )


def check_matrix(part: TensorInfo) -> None:
    """Raises CorruptError where the part is not two-dimensional, or is empty."""
    if len(part.shape) != 2 or 0 in part.shape:
        raise CorruptError(
            f"{part.path}: tensor {part.name!r}: shape {list(part.shape)}; a matrix [rows, columns] is needed"
        )


def need_part(tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    """Raises CorruptError where it is missing."""
    if name not in tensors:
        path = next(iter(tensors.values())).path
        raise CorruptError(
            f"{path.parent}: tensor {name!r} is missing; the other parts of its layer are there"
        )
    return tensors[name]


def add_tensor(found: dict[str, Tensor], tensor: Tensor) -> None:
    """Raises CorruptError where the checkpoint has one of that name as well."""
    if tensor.name in found:
        raise CorruptError(f"{tensor.path}: tensor {tensor.name!r} is there twice: plain and quantised")
    found[tensor.name] = tensor


class Parts:
    """Reads parts, each file opened once. A context manager; for one thread."""

    def __init__(self) -> None:
        self._files: dict[Path, InputFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()

    def rows(self, part: TensorInfo, first_row: int, rows: int) -> Bytes:
        """The bytes of these rows, [rows, bytes]; every dimension but the last counts as rows."""
        width = part.shape[-1] * BYTES[part.dtype]
        return self.run(part, first_row * width, rows * width).reshape(rows, width)

    def run(self, part: TensorInfo, begin: int, count: int) -> Bytes:
        """Bytes of the part's data from `begin` on."""
        return np.frombuffer(self._file(part).read(part.begin + begin, count), np.uint8)

    def columns(self, part: TensorInfo, first: int, count: int) -> Bytes:
        """The bytes of these columns of a matrix, [all rows, bytes]."""
        rows, cols = part.shape
        if count == cols:
            return self.rows(part, 0, rows)
        size = BYTES[part.dtype]
        raw = bytearray(rows * count * size)
        view, file = memoryview(raw), self._file(part)
        for row in range(rows):
            begin = part.begin + (row * cols + first) * size
            file.read_into(begin, view[row * count * size : (row + 1) * count * size])
        return np.frombuffer(raw, np.uint8).reshape(rows, count * size)

    def floats(self, part: TensorInfo, first_row: int, rows: int) -> Floats:
        """These rows of scales, f32 [rows, columns]. Raises CorruptError for one that is not finite."""
        raw = self.rows(part, first_row, rows)
        return self._finite(part, floats_of(raw, part.dtype).reshape(rows, -1), first_row)

    def float_columns(self, part: TensorInfo, first: int, count: int) -> Floats:
        """These columns of scales, f32 [all rows, columns]. Raises CorruptError for one that is not finite."""
        raw = self.columns(part, first, count)
        return self._finite(part, floats_of(raw, part.dtype).reshape(-1, count), 0, first)

    def _finite(self, part: TensorInfo, values: Floats, first_row: int, first_col: int = 0) -> Floats:
        if not np.isfinite(values).all():
            row, col = np.argwhere(~np.isfinite(values))[0]
            raise CorruptError(
                f"{part.path}: tensor {part.name!r}: row {first_row + row}, column {first_col + col}: "
                "NaN or infinity; a scale is a finite number"
            )
        return values

    def _file(self, part: TensorInfo) -> InputFile:
        if part.path not in self._files:
            self._files[part.path] = InputFile(part.path)
        return self._files[part.path]
