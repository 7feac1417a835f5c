"""What an ONNX file is made of, read without running anything: inputs, outputs, operators, files beside it.

The protobuf is walked field by field: weights are stepped over, so the memory this takes does not depend on the file's
size, and depth, fields and text are bounded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from edgert.errors import CorruptError, UnsupportedError

from .files import InputFile

MAX_FIELDS = 1 << 22
_MAX_DEPTH = 16
_MAX_TEXT_BYTES = 4096
_WINDOW_BYTES = 64 << 10
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# What onnxruntime brings itself; any other domain is a library of code that would have to come with the model.
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})

# onnx.TensorProto.DataType
TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of the graph. A dimension is a number, or None where it may vary."""

    name: str
    type: str
    shape: tuple[int | None, ...]

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "type": self.type, "shape": list(self.shape)}


@dataclass
class OnnxFile:
    """`external` are the files that hold weights, as the model names them."""

    path: Path
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    external: set[str] = field(default_factory=set)
    domains: set[str] = field(default_factory=set)

    def port(self, name: str) -> Port | None:
        return next((port for port in (*self.inputs, *self.outputs) if port.name == name), None)


def read_onnx(path: Path) -> OnnxFile:
    """Raises CorruptError for what is no ONNX model or names weights outside its directory (CVE-2022-25882), and
    UnsupportedError for operators of a custom library; each names place and name."""
    with InputFile(path) as file:
        return _Walker(path, file).model()


class _Walker:
    def __init__(self, path: Path, file: InputFile) -> None:
        self._path = path
        self._file = file
        self._window = b""
        self._window_begin = 0
        self._fields = 0
        self._result = OnnxFile(path)

    def model(self) -> OnnxFile:
        graphs = 0
        for number, kind, value in self._message(0, self._file.bytes):
            if number == 7 and kind == _BYTES:
                graphs += 1
                self._graph(value, 1, outermost=True)
            elif number == 8 and kind == _BYTES:
                self._opset(value)
            elif number == 25 and kind == _BYTES:  # a function: nodes (7) of its own
                for inner, inner_kind, node in self._message(*value):
                    if inner == 7 and inner_kind == _BYTES:
                        self._node(node, 2)
        if graphs != 1:
            self._fail(0, f"found {graphs} graphs; this is not an ONNX model")
        foreign = sorted(self._result.domains - DOMAINS)
        if foreign:
            raise UnsupportedError(
                f"{self._path}: operators of {foreign[0]!r}, which only a library of its own code could run; nothing runs from "
                "a model file"
            )
        if not self._result.outputs:
            self._fail(0, "the graph has no output; this is not an ONNX model")
        return self._result

    def _graph(self, span: tuple[int, int], depth: int, *, outermost: bool = False) -> None:
        inside: dict[int, Callable[[tuple[int, int]], object]] = {
            1: lambda part: self._node(part, depth + 1),
            5: self._tensor,
            15: self._sparse,
        }
        weights: set[str] = set()
        for number, kind, value in self._message(*span, depth):
            if kind != _BYTES:
                continue
            if number == 5 and outermost:
                weights.add(self._tensor(value))
            elif number in inside:
                inside[number](value)
            elif outermost and number in (11, 12):
                (self._result.inputs if number == 11 else self._result.outputs).append(self._port(value))
        if outermost:  # old files list the weights among the inputs
            self._result.inputs = [port for port in self._result.inputs if port.name not in weights]

    def _node(self, span: tuple[int, int], depth: int) -> None:
        for number, kind, value in self._message(*span, depth):
            if number == 7 and kind == _BYTES:
                self._result.domains.add(self._text(value))
            elif number == 5 and kind == _BYTES:
                self._attribute(value, depth + 1)

    def _attribute(self, span: tuple[int, int], depth: int) -> None:
        for number, kind, value in self._message(*span, depth):
            if kind != _BYTES:
                continue
            if number in (5, 10):
                self._tensor(value)
            elif number in (6, 11):
                self._graph(value, depth + 1)
            elif number in (22, 23):
                self._sparse(value)

    def _sparse(self, span: tuple[int, int]) -> None:
        for number, kind, value in self._message(*span):
            if number in (1, 2) and kind == _BYTES:
                self._tensor(value)

    def _tensor(self, span: tuple[int, int]) -> str:
        """Its name; weights kept in a file beside are noted."""
        name = ""
        for number, kind, value in self._message(*span):
            if number == 8 and kind == _BYTES:
                name = self._text(value)
            elif number == 13 and kind == _BYTES:
                entry = {n: self._text(v) for n, k, v in self._message(*value) if n in (1, 2) and k == _BYTES}
                if entry.get(1) == "location":
                    self._result.external.add(self._location(entry.get(2, ""), value[0]))
        return name

    def _location(self, name: str, offset: int) -> str:
        if not name or name in (".", "..") or any(character in name for character in "/\\\0") or ":" in name:
            raise CorruptError(
                f"{self._path}: byte {offset}: external data in {name[:200]!r}; the plain name of a file beside the model is "
                "allowed"
            )
        return name

    def _opset(self, span: tuple[int, int]) -> None:
        for number, kind, value in self._message(*span):
            if number == 1 and kind == _BYTES:
                self._text(value)  # an opset that no node uses brings no code

    def _port(self, span: tuple[int, int]) -> Port:
        name, type_name = "", ""
        shape: tuple[int | None, ...] = ()
        for number, kind, value in self._message(*span):
            if number == 1 and kind == _BYTES:
                name = self._text(value)
            elif number == 2 and kind == _BYTES:
                for inner, inner_kind, tensor in self._message(*value):
                    if inner == 1 and inner_kind == _BYTES:
                        type_name, shape = self._tensor_type(tensor)
        return Port(name, type_name, shape)

    def _tensor_type(self, span: tuple[int, int]) -> tuple[str, tuple[int | None, ...]]:
        type_name = ""
        shape: list[int | None] = []
        for number, kind, value in self._message(*span):
            if number == 1 and kind == _VARINT:
                type_name = TYPES.get(value, f"type {value}")
            elif number == 2 and kind == _BYTES:
                for inner, inner_kind, dimension in self._message(*value):
                    if inner == 1 and inner_kind == _BYTES:
                        fixed = [v for n, k, v in self._message(*dimension) if n == 1 and k == _VARINT]
                        shape.append(fixed[-1] if fixed else None)
        return type_name, tuple(shape)

    # --- protobuf -----------------------------------------------------------------------------------

    def _message(self, begin: int, end: int, depth: int = 0) -> Iterator[tuple[int, int, Any]]:
        """Yield number, wire type and value of each field; of bytes, where they begin and end."""
        if depth > _MAX_DEPTH:
            self._fail(begin, f"nested deeper than {_MAX_DEPTH} levels")
        position = begin
        while position < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                self._fail(position, f"more than {MAX_FIELDS} fields")
            start = position
            tag, position = self._varint(position, end)
            number, kind = tag >> 3, tag & 7
            value: Any = None
            if kind == _VARINT:
                value, position = self._varint(position, end)
            elif kind == _BYTES:
                length, position = self._varint(position, end)
                if length > end - position:
                    self._fail(start, f"{length} bytes stated, {end - position} are left; truncated?")
                value = (position, position + length)
                position += length
            elif kind in (_FIXED64, _FIXED32):
                position += 8 if kind == _FIXED64 else 4
            else:
                self._fail(start, f"wire type {kind}; this is not an ONNX model")
            if position > end:
                self._fail(start, "a field passes the end of its message; truncated?")
            yield number, kind, value

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = 0
        for index in range(10):
            if position >= end:
                self._fail(position, "a number passes the end of its message; truncated?")
            byte = self._byte(position)
            position += 1
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value, position
        return self._fail(position, "a number without an end; this is not an ONNX model")

    def _byte(self, position: int) -> int:
        if not 0 <= position - self._window_begin < len(self._window):
            length = min(_WINDOW_BYTES, self._file.bytes - position)
            self._window, self._window_begin = bytes(self._file.read(position, length)), position
        return self._window[position - self._window_begin]

    def _text(self, span: tuple[int, int]) -> str:
        begin, end = span
        if end - begin > _MAX_TEXT_BYTES:
            self._fail(begin, f"a name of {end - begin} bytes; at most {_MAX_TEXT_BYTES} are allowed")
        try:
            return self._file.read(begin, end - begin).decode()
        except UnicodeDecodeError:
            self._fail(begin, "a name that is not UTF-8")

    def _fail(self, offset: int, message: str) -> NoReturn:
        raise CorruptError(f"{self._path}: byte {offset}: {message}")
