"""GGUF files, versions 2 and 3, in one file or split.

Text and arrays of the metadata stay in the file until they are asked for, so what a file can make this process allocate does
not depend on what it claims.
"""

import os
import re
import struct
from pathlib import Path
from typing import Any, NoReturn

from edgert.errors import CorruptError, NotFoundError

from .files import InputFile
from .gguf_parser import MAX_STRINGS, MAX_TENSORS, SCALARS, Cursor, Field, GgufTensor, Parser

MAX_PARTS = 1 << 10


class GgufFile:
    """One GGUF file: its metadata and where its tensors are.

    Raises NotFoundError, StorageError, CorruptError for every malformed file, UnsupportedError for a version, byte order or
    tensor type that is not read; each names the place. `fields` and `tensors` are in the order of the file.
    """

    def __init__(self, path: Path, *, metadata_only: bool = False) -> None:
        """`metadata_only`: no tensors, so that none of a type that is not read matters."""
        self.path = path
        self._real = Path(os.path.realpath(path))  # whoever named the file may have named a link to it
        with InputFile(self._real) as file:
            self.bytes = file.bytes
            parser = Parser(self._real, file)
            tensor_count, key_count = parser.header()
            self.fields = parser.fields(key_count)
            alignment = parser.alignment(self.fields.get("general.alignment"))
            self.tensors = {} if metadata_only else parser.tensors(tensor_count, alignment)

    def __contains__(self, key: str) -> bool:
        return key in self.fields

    def integer(self, key: str) -> int | None:
        value: int | None = self._scalar(key, int, "an integer")
        return value

    def number(self, key: str) -> float | None:
        value = self._scalar(key, (int, float), "a number")
        return None if value is None else float(value)

    def flag(self, key: str) -> bool | None:
        value: bool | None = self._scalar(key, bool, "a bool")
        return value

    def text(self, key: str, max_bytes: int) -> str | None:
        """Raises CorruptError for what is no text, not UTF-8 or longer than `max_bytes`."""
        field = self.fields.get(key)
        if field is None:
            return None
        if field.kind != "string":
            self.fail(field, f"found {field.kind}, a string is needed")
        with InputFile(self._real) as file:
            return Cursor(self.path, file, field.offset).text(key, max_bytes)

    def texts(self, key: str) -> list[str] | None:
        """An array of strings."""
        field = self.fields.get(key)
        if field is None:
            return None
        if field.kind != "string array":
            self.fail(field, f"found {field.kind}, an array of strings is needed")
        with InputFile(self._real) as file:
            return list(Cursor(self.path, file, field.offset).texts(key, field.count))

    def numbers(self, key: str, max_count: int = MAX_STRINGS) -> tuple[Any, ...] | None:
        """An array of numbers or flags; a single one counts as an array of one."""
        field = self.fields.get(key)
        if field is None:
            return None
        if field.value is not None:
            return (field.value,)
        kind = field.kind.removesuffix(" array")
        formats = dict(SCALARS.values())
        if kind not in formats or field.kind == "string":
            self.fail(field, f"found {field.kind}, an array of numbers is needed")
        if field.count > max_count:
            self.fail(field, f"found {field.count} elements, at most {max_count} are allowed")
        code = formats[kind][1]
        with InputFile(self._real) as file:
            raw = file.read(field.offset, field.count * struct.calcsize(code))
        return struct.unpack(f"<{field.count}{code}", raw)

    def where(self, key: str) -> str:
        """Key and place, for messages."""
        field = self.fields.get(key)
        return key if field is None else f"{key} (byte {field.offset})"

    def fail(self, field: Field, message: str) -> NoReturn:
        raise CorruptError(f"{self.path}: {field.key}, byte {field.offset}: {message}")

    def _scalar(self, key: str, kind: type | tuple[type, ...], needed: str) -> Any:
        field = self.fields.get(key)
        if field is None:
            return None
        if not isinstance(field.value, kind) or (isinstance(field.value, bool) and kind is not bool):
            self.fail(field, f"found {field.kind}, {needed} is needed")
        return field.value


# --- split files ----------------------------------------------------------------------------------------

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def part_paths(path: Path) -> list[Path]:
    """All files of a model by the name of one of them: the parts that it counts, or itself. Raises NotFoundError for
    one that is missing."""
    named = _PART.fullmatch(path.name)
    count = 1 if named is None else int(named[3])
    paths = [path]
    if named is not None and 1 < count <= MAX_PARTS:
        paths = [path.with_name(f"{named[1]}-{number + 1:05}-of-{count:05}.gguf") for number in range(count)]
    for place in paths:
        if not place.exists():
            part = (
                "" if place == path else f"; {path.name} is one of {count} parts. Is the download complete?"
            )
            raise NotFoundError(f"{place}: missing{part}")
    return paths


def read_parts(path: Path) -> list[GgufFile]:
    """The file and, where it is one part of several, all of them in order; the first one has the model's metadata.

    Raises what GgufFile raises, and NotFoundError or CorruptError for a part that is missing, doubled or another's.
    """
    first = GgufFile(path)
    count = first.integer("split.count") or 1
    if count == 1:
        return [first]
    named = _PART.fullmatch(path.name)
    if not 1 < count <= MAX_PARTS:
        raise CorruptError(f"{path}: {first.where('split.count')}: {count}; 1 to {MAX_PARTS} is allowed")
    if named is None or int(named[3]) != count:
        raise CorruptError(
            f"{path}: {first.where('split.count')}: is part of {count} files, so it has to be called "
            f"NAME-00001-of-{count:05}.gguf"
        )
    parts = []
    for number, place in enumerate(part_paths(path)):
        part = first if place == path else GgufFile(place)
        if part.integer("split.no") != number or part.integer("split.count") != count:
            raise CorruptError(
                f"{place}: split.no, split.count: part {part.integer('split.no')} of {part.integer('split.count')}, "
                f"counted from 0; its name says part {number} of {count}"
            )
        parts.append(part)
    return parts


def merged_tensors(parts: list[GgufFile]) -> dict[str, GgufTensor]:
    """The tensors of all parts. Raises CorruptError for one that is in two, and for a wrong number of them."""
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CorruptError(f"{part.path}: tensor {name!r} is also in {tensors[name].path.name}")
            tensors[name] = tensor
        if len(tensors) > MAX_TENSORS:
            raise CorruptError(f"{part.path}: more than {MAX_TENSORS} tensors")
    stated = parts[0].integer("split.tensors.count")
    if stated is not None and stated != len(tensors):
        raise CorruptError(
            f"{parts[0].path}: {parts[0].where('split.tensors.count')}: {stated}, but the parts hold {len(tensors)}"
        )
    return tensors
