"""A strict safetensors reader.

The header is parsed entry by entry, so that what a file can make this process allocate is bounded by
MAX_HEADER_BYTES and MAX_TENSORS whatever it holds. Data is read by offset into the caller's buffers.
"""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from edgert.errors import CorruptError, UnsupportedError

from .files import InputFile
from .tensor import TensorInfo

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 17
MAX_DIMENSIONS = 8
_MAX_ENTRY_BYTES = 4096
_MAX_SIZE = 2**63 - 1

DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "C64": 64, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(rb'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrtu])*+"')
_ENTRY = re.compile(rb"\{[^{}]*+\}")
_LFS = b"version https://git-lfs.github.com/spec/"


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of a safetensors file in the order of their data; see read_header_and_metadata()."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file in the order of their data, and what `__metadata__` says.

    Raises CorruptError for every malformed header and for data that overlaps, leaves gaps or disagrees with
    the size of the file; UnsupportedError for an unknown dtype.
    """
    with InputFile(path) as file:
        start = bytes(file.read(0, min(file.bytes, len(_LFS))))
        if start == _LFS:
            raise CorruptError(
                f"{path}: is a git-LFS pointer, not the weights; fetch them with `git lfs pull`"
            )
        if file.bytes < 8:
            raise CorruptError(
                f"{path}: {file.bytes} bytes; a safetensors file begins with an 8-byte header length"
            )
        length = int.from_bytes(start[:8], "little")
        if length > file.bytes - 8:
            raise CorruptError(
                f"{path}: byte 0: header length {length}, but only {file.bytes - 8} bytes follow; "
                "truncated, or not a safetensors file"
            )
        if length > MAX_HEADER_BYTES:
            raise CorruptError(
                f"{path}: byte 0: header length {length}; at most {MAX_HEADER_BYTES} is allowed"
            )
        header = bytes(file.read(8, length))
        parser = _HeaderParser(path, header)
        tensors = parser.parse()
        tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
        _check_coverage(path, tensors, 8 + length, file.bytes)
    return tensors, parser.metadata


class _HeaderParser:
    def __init__(self, path: Path, header: bytes) -> None:
        self.path = path
        self.header = header
        self.position = 0
        self.metadata: dict[str, str] = {}

    def parse(self) -> list[TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        metadata_seen = False
        self.expect(b"{")
        while not self.peek(b"}") or tensors or metadata_seen:
            name = self.string("a tensor name")
            self.expect(b":")
            if name == "__metadata__":
                if metadata_seen:
                    self.fail("__metadata__ appears twice")
                metadata_seen = True
                self.read_metadata()
            else:
                if name in tensors:
                    self.fail(f"tensor {name!r} appears twice")
                if len(tensors) == MAX_TENSORS:
                    self.fail(f"more than {MAX_TENSORS} tensors")
                tensors[name] = self.tensor(name)
            if not self.peek(b","):
                break
            self.expect(b",")
        self.expect(b"}")
        if self.header[self.position :].strip(b" \t\r\n"):
            self.fail("something follows the header's closing brace")
        return list(tensors.values())

    def tensor(self, name: str) -> TensorInfo:
        match = _ENTRY.match(self.header, self.position)
        if match is None or len(match.group()) > _MAX_ENTRY_BYTES or match.group().count(b"[") != 2:
            self.fail(f"tensor {name!r}: not an object of dtype, shape and data_offsets")
        try:
            pairs = json.loads(
                match.group().decode("utf-8"),
                object_pairs_hook=list,
                parse_float=_refuse_float,
                parse_constant=_refuse_float,
            )
        except (ValueError, RecursionError) as error:
            self.fail(f"tensor {name!r}: {error}")
        entry = dict(pairs)
        if len(pairs) != 3 or entry.keys() != {"dtype", "shape", "data_offsets"}:
            self.fail(
                f"tensor {name!r}: keys {[key for key, _ in pairs]}; dtype, shape and data_offsets are needed"
            )
        shape = self.integers(name, "shape", entry["shape"])
        offsets = self.integers(name, "data_offsets", entry["data_offsets"])
        bits = DTYPE_BITS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if bits is None:
            raise UnsupportedError(
                f"{self.path}: tensor {name!r}: dtype {entry['dtype']!r}; known are {', '.join(DTYPE_BITS)}"
            )
        self.check_size(name, shape, bits, offsets)
        self.position = match.end()
        base = 8 + len(self.header)
        return TensorInfo(name, entry["dtype"], shape, base + offsets[0], base + offsets[1], self.path)

    def integers(self, name: str, field: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or any(type(item) is not int for item in value):
            self.fail(f"tensor {name!r}: {field} {str(value)[:80]} is not a list of integers")
        for item in value:
            if not 0 <= item <= _MAX_SIZE:
                self.fail(f"tensor {name!r}: {field} holds {str(item)[:40]}; 0 to 2^63-1 is allowed")
        return tuple(value)

    def check_size(self, name: str, shape: tuple[int, ...], bits: int, offsets: tuple[int, ...]) -> None:
        if len(shape) > MAX_DIMENSIONS:
            self.fail(f"tensor {name!r}: {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            self.fail(f"tensor {name!r}: data_offsets {list(offsets)[:4]} are not a begin and a later end")
        size = bits
        for dimension in shape:
            size *= dimension
        if size > _MAX_SIZE:
            self.fail(f"tensor {name!r}: shape {list(shape)} overflows 64 bits")
        if size != 8 * (offsets[1] - offsets[0]):
            self.fail(
                f"tensor {name!r}: {offsets[1] - offsets[0]} bytes of data at {list(offsets)}, "
                f"but shape {list(shape)} of {bits} bits an element needs {size / 8:g}"
            )

    def read_metadata(self) -> None:
        self.expect(b"{")
        if not self.peek(b"}"):
            while True:
                key = self.string("a metadata key", most=MAX_HEADER_BYTES)
                self.expect(b":")
                self.metadata[key] = self.string("a metadata value (they are strings)", most=MAX_HEADER_BYTES)
                if not self.peek(b","):
                    break
                self.expect(b",")
        self.expect(b"}")

    def string(self, what: str, *, most: int = _MAX_ENTRY_BYTES) -> str:
        self.skip_space()
        match = _STRING.match(self.header, self.position)
        if match is None:
            self.fail(f"expected {what}")
        if len(match.group()) > most:
            self.fail(f"{what} of {len(match.group())} bytes; at most {most} are allowed")
        try:
            text = str(json.loads(match.group().decode("utf-8")))
            text.encode("utf-8")  # a lone surrogate escape decodes, but is no text
        except ValueError as error:
            self.fail(f"{what}: {error}")
        self.position = match.end()
        self.skip_space()
        return text

    def skip_space(self) -> None:
        match = _SPACE.match(self.header, self.position)
        if match is not None:
            self.position = match.end()

    def peek(self, character: bytes) -> bool:
        self.skip_space()
        return self.header.startswith(character, self.position)

    def expect(self, character: bytes) -> None:
        if not self.peek(character):
            self.fail(
                f"expected {character.decode()!r}, found {self.header[self.position : self.position + 1]!r}"
            )
        self.position += 1
        self.skip_space()

    def fail(self, message: str) -> NoReturn:
        raise CorruptError(f"{self.path}: header, byte {8 + self.position}: {message}") from None


def _refuse_float(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is not an integer")


def _check_coverage(path: Path, tensors: list[TensorInfo], data_begin: int, file_bytes: int) -> None:
    end = data_begin
    for tensor in tensors:
        if tensor.begin != end:
            problem = "overlaps the tensor before it" if tensor.begin < end else "leaves a gap before it"
            raise CorruptError(
                f"{path}: tensor {tensor.name!r}: its data begins at byte {tensor.begin} and {problem}, "
                f"which ends at byte {end}"
            )
        end = tensor.end
        if end > file_bytes:
            raise CorruptError(
                f"{path}: tensor {tensor.name!r}: its data ends at byte {end}, "
                f"past the file's {file_bytes} bytes; truncated?"
            )
    if end != file_bytes:
        raise CorruptError(f"{path}: {file_bytes - end} bytes at byte {end} belong to no tensor")
