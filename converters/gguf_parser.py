"""The header of a GGUF file, read forwards: every count and length is held against the bytes that remain before it is believed."""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgert.errors import CorruptError, UnsupportedError

from .files import InputFile
from .tensor import BlockTensor, BlockType, TensorInfo, block_types

MAX_KEYS = 1 << 14
MAX_KEY_BYTES = 1 << 10
MAX_TENSORS = 1 << 16
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_STRINGS = 1 << 21  # in all arrays of a file; the largest vocabularies and their merges are 2^20
MAX_ALIGNMENT = 1 << 16
_DEFAULT_ALIGNMENT = 32
_MAX_SIZE = 2**63 - 1
_WINDOW_BYTES = 256 << 10

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LENGTH = struct.Struct("<Q")
# The value types of metadata by number: name, and how one element is stored.
SCALARS = {
    0: ("uint8", "<B"), 1: ("int8", "<b"), 2: ("uint16", "<H"), 3: ("int16", "<h"), 4: ("uint32", "<I"),
    5: ("int32", "<i"), 6: ("float32", "<f"), 7: ("bool", "<B"), 10: ("uint64", "<Q"), 11: ("int64", "<q"),
    12: ("float64", "<d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# ggml's tensor types; those that no weight format holds are named so that they can be refused by name.
TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

GgufTensor = TensorInfo | BlockTensor


@dataclass(frozen=True, slots=True)
class Field:
    """One value of the metadata. `value` is a number or a flag; None for text and arrays, which are read later."""

    key: str
    kind: str  # "uint32", "string", "string array", ...
    offset: int  # of the value, behind its type
    count: int = 1  # of elements, or bytes of a string
    value: int | float | bool | None = None


class Cursor:
    """Reads a file forwards through a small window; nothing is read that the file does not hold."""

    def __init__(self, path: Path, file: InputFile, position: int) -> None:
        self.path = path
        self._file = file
        self._begin = position
        self._window = b""
        self._at = 0

    @property
    def position(self) -> int:
        return self._begin + self._at

    @property
    def remaining(self) -> int:
        return self._file.bytes - self.position

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        at = self.position if position is None else position
        raise CorruptError(f"{self.path}: byte {at}: {message}") from None

    def unpack(self, code: str, what: str) -> Any:
        size = struct.calcsize(code)
        self._hold(size, what)
        (value,) = struct.unpack_from(code, self._window, self._at)
        self._at += size
        return value

    def count(self, what: str, each: int, maximum: int) -> int:
        """A count of things of at least `each` bytes."""
        found: int = self.unpack("<Q", what)
        if found > self.remaining // each or found > maximum:
            self.fail(
                f"{what} is {found}; at most {maximum} are allowed, and {self.remaining} bytes remain for them",
                self.position - 8,
            )
        return found

    def length(self, what: str) -> int:
        self._hold(8, what)
        found: int = _LENGTH.unpack_from(self._window, self._at)[0]
        self._at += 8
        if found > self.remaining:
            self.fail(f"{what}: length {found}, but {self.remaining} bytes remain", self.position - 8)
        return found

    def text(self, what: str, max_bytes: int) -> str:
        length = self.length(what)
        begin = self.position
        if length > max_bytes:
            self.fail(f"{what}: {length} bytes; at most {max_bytes} are allowed", begin - 8)
        self._hold(length, what)
        raw = self._window[self._at : self._at + length]
        self._at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what}: not UTF-8", begin + error.start)

    def texts(self, what: str, count: int) -> Iterator[str]:
        for _ in range(count):
            yield self.text(what, _WINDOW_BYTES)

    def skip(self, length: int) -> None:
        """`length` is at most what remains."""
        self._at += length
        if self._at > len(self._window):
            self._begin, self._at, self._window = self._begin + self._at, 0, b""

    def _hold(self, size: int, what: str) -> None:
        if self._at + size <= len(self._window):
            return
        if size > self.remaining:
            self.fail(f"{what}: needs {size} bytes, but {max(0, self.remaining)} remain; truncated?")
        self._begin, self._at = self.position, 0
        self._window = bytes(self._file.read(self._begin, min(max(size, _WINDOW_BYTES), self.remaining)))


class Parser(Cursor):
    def __init__(self, path: Path, file: InputFile) -> None:
        super().__init__(path, file, 0)
        self._strings = 0
        self._blocks = block_types()

    def header(self) -> tuple[int, int]:
        """Counts of tensors and of keys."""
        if self.remaining < 4 or self._file.read(0, 4) != _MAGIC:
            self.fail("does not begin with GGUF; this is not a GGUF file")
        self.unpack("<I", "magic")
        version: int = self.unpack("<I", "version")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise UnsupportedError(
                f"{self.path}: byte 4: this is a big-endian GGUF file; only little-endian ones are read"
            )
        if version not in _VERSIONS:
            raise UnsupportedError(
                f"{self.path}: byte 4: GGUF version {version}; versions 2 and 3 are read"
                + ("; llama.cpp of 2023 can rewrite it" if version == 1 else "")
            )
        tensor_count = self.count("the number of tensors", 32, MAX_TENSORS)
        return tensor_count, self.count("the number of metadata keys", 13, MAX_KEYS)

    def fields(self, count: int) -> dict[str, Field]:
        fields: dict[str, Field] = {}
        for _ in range(count):
            begin = self.position
            key = self.text("a metadata key", MAX_KEY_BYTES)
            if key in fields:
                self.fail(f"the metadata key {key!r} appears twice", begin)
            fields[key] = self._field(key)
        return fields

    def _field(self, key: str) -> Field:
        kind: int = self.unpack("<I", f"{key}: value type")
        offset = self.position
        if kind in SCALARS:
            name, code = SCALARS[kind]
            value = self.unpack(code, key)
            if name == "bool":
                if value > 1:
                    self.fail(f"{key}: a bool of {value}; 0 and 1 are allowed", offset)
                value = bool(value)
            return Field(key, name, offset, value=value)
        if kind == _STRING:
            length = self.length(key)
            self.skip(length)
            return Field(key, "string", offset, length)
        if kind != _ARRAY:
            self.fail(f"{key}: value type {kind}; 0 to 12 are known", offset - 4)
        return self._array(key)

    def _array(self, key: str) -> Field:
        kind: int = self.unpack("<I", f"{key}: element type")
        if kind == _ARRAY:
            self.fail(
                f"{key}: an array of arrays; arrays of numbers or strings are allowed", self.position - 4
            )
        if kind == _STRING:
            count = self.count(f"{key}: the number of strings", 8, MAX_STRINGS - self._strings)
            self._strings += count
            offset = self.position
            for _ in range(count):
                self.skip(self.length(key))
            return Field(key, "string array", offset, count)
        if kind not in SCALARS:
            self.fail(f"{key}: element type {kind}; 0 to 12 are known", self.position - 4)
        name, code = SCALARS[kind]
        size = struct.calcsize(code)
        count = self.count(f"{key}: the number of elements", size, _MAX_SIZE)
        offset = self.position
        self.skip(count * size)
        return Field(key, f"{name} array", offset, count)

    def alignment(self, field: Field | None) -> int:
        if field is None:
            return _DEFAULT_ALIGNMENT
        value = field.value
        if type(value) is not int or value < 8 or value > MAX_ALIGNMENT or value & (value - 1):
            found = field.kind if value is None else value
            self.fail(
                f"general.alignment: {found}; a power of two from 8 to {MAX_ALIGNMENT} is allowed",
                field.offset,
            )
        return value

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        infos = []
        for _ in range(count):
            begin = self.position
            info = self._info(alignment)
            if info[0] in tensors:
                self.fail(f"tensor {info[0]!r} appears twice", begin)
            tensors[info[0]] = _NO_TENSOR
            infos.append(info)
        data = -(-self.position // alignment) * alignment
        end = data
        for name, kind, shape, offset, place in sorted(infos, key=lambda info: info[3]):
            size = math.prod(shape[:-1]) * self._row_bytes(kind, shape[-1])
            if data + offset != end:
                problem = "overlaps the tensor before it" if data + offset < end else "leaves a gap before it"
                self.fail(
                    f"tensor {name!r}: its data begins at byte {data + offset} and {problem}, which ends at byte {end}",
                    place,
                )
            if end + size > self._file.bytes:
                self.fail(
                    f"tensor {name!r}: its data ends at byte {end + size}, past the file's {self._file.bytes} bytes; "
                    "truncated?",
                    place,
                )
            tensors[name] = self._tensor(name, kind, shape, end)
            end = -(-(end + size) // alignment) * alignment
        return tensors

    def _info(self, alignment: int) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape (columns last), offset in the data and where the dimensions are stated."""
        name = self.text("a tensor's name", MAX_NAME_BYTES)
        begin = self.position
        dimensions: int = self.unpack("<I", f"tensor {name!r}: number of dimensions")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self.fail(f"tensor {name!r}: {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed", begin)
        shape = tuple(self.unpack("<Q", f"tensor {name!r}: a dimension") for _ in range(dimensions))[::-1]
        if not all(shape) or math.prod(shape) > _MAX_SIZE // 8:
            self.fail(
                f"tensor {name!r}: shape {list(shape)}; at least 1 each, and 2^60 in all, is allowed", begin
            )
        number: int = self.unpack("<I", f"tensor {name!r}: type")
        kind = TENSOR_TYPES.get(number)
        if kind is None or (kind not in _FLOAT_BYTES and kind not in self._blocks):
            known = ", ".join([*_FLOAT_BYTES, *self._blocks])
            raise UnsupportedError(
                f"{self.path}: byte {self.position - 4}: tensor {name!r}: type {number}"
                f"{'' if kind is None else f' ({kind})'} is not read by this version; {known} are"
            )
        block = self._blocks.get(kind)
        if block is not None and shape[-1] % block.elements:
            self.fail(
                f"tensor {name!r}: rows of {shape[-1]} weights are no multiple of the {block.elements} of {kind}'s "
                "blocks",
                begin,
            )
        offset: int = self.unpack("<Q", f"tensor {name!r}: offset")
        if offset % alignment or offset > _MAX_SIZE:
            self.fail(
                f"tensor {name!r}: offset {offset}; a multiple of the alignment, {alignment}, is needed",
                self.position - 8,
            )
        return name, kind, shape, offset, begin

    def _row_bytes(self, kind: str, cols: int) -> int:
        block: BlockType | None = self._blocks.get(kind)
        return cols * _FLOAT_BYTES[kind] if block is None else cols // block.elements * block.bytes

    def _tensor(self, name: str, kind: str, shape: tuple[int, ...], begin: int) -> GgufTensor:
        block = self._blocks.get(kind)
        if block is not None:
            return BlockTensor(name, block, shape, begin, self.path)
        size = math.prod(shape) * _FLOAT_BYTES[kind]
        return TensorInfo(name, kind, shape, begin, begin + size, self.path, stored_format=kind.lower())


_NO_TENSOR = TensorInfo("", "F32", (0,), 0, 0, Path())  # stands for one whose data is not placed yet
