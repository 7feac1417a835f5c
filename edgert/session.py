"""Sessions: a sequence that is kept between replies, and the file that keeps it between processes.

The file holds the tokens and what the model made of them, so that it goes on where it was without running them again. It is of one
bundle, one set of adapters and one KV format; docs/serving.md writes the format down.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgert import _native
from edgert.converters.output import sync_directory
from edgert.converters.strict_json import parse_json_object
from edgert.errors import CorruptError, InvalidArgumentError, NotFoundError, StorageError, UnsupportedError

if TYPE_CHECKING:
    from edgert.prompts import Prompts

MAGIC = b"EDGERTSN"
FORMAT_VERSION = 1
_HEAD = struct.Struct("<8sII")  # magic, format version, bytes of the header
_SUM = struct.Struct("<Q")
_BLOCK_TOKENS = 16
_MAX_HEADER_BYTES = 16 << 20


@dataclass
class Session:
    """What a model holds of a text: `tokens`, of which those that ran need not run again.

    A reply is given with stream(…, session=…); one at a time. `note` is the caller's, and is kept with it: JSON. close()
    frees its memory.
    """

    sequence: _native.Sequence
    tokens: list[int] = field(default_factory=list)
    note: dict[str, Any] = field(default_factory=dict)
    prompts: "Prompts | None" = None  # of its adapters; None: the model's own

    def go_to(self, prompt: Sequence[int]) -> None:
        """Keep what `prompt` begins with, but for its last token; the rest of it is to be run."""
        known = self.tokens[: self.sequence.length]
        same = next((i for i, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b), None)
        length = min(len(known), len(prompt)) if same is None else same
        length = min(length, len(prompt) - 1)
        if length < self.sequence.length:
            self.sequence.rewind(length)
        self.tokens = list(prompt)

    def close(self) -> None:
        self.sequence.close()
        self.tokens = []

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save(session: Session, path: str | os.PathLike[str], key: Mapping[str, Any]) -> None:
    """Write it beside `path`, sync and swap it in, readable by its owner alone. Raises StorageError."""
    place = Path(os.path.abspath(path))
    beside = place.parent / f".{place.name}.new"
    try:
        with suppress(FileNotFoundError):
            beside.unlink()  # of a run that was killed
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for section in _sections(session, key):
                file.write(section)
                file.write(_SUM.pack(int(_native.xxh64(section), 16)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, place)
        sync_directory(place.parent)
    except OSError as error:
        raise StorageError(f"{place}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def restore(sequence: _native.Sequence, path: str | os.PathLike[str], key: Mapping[str, Any]) -> Session:
    """Read what save() wrote into an empty sequence.

    Raises NotFoundError, CorruptError for damage, UnsupportedError for a newer format, InvalidArgumentError where it is of another
    bundle, other adapters or another KV format, BudgetError where it does not fit. After an error the sequence is empty.
    """
    place = Path(path)
    try:
        with open(place, "rb") as file:
            return _Reader(file, str(place)).read(sequence, key)
    except FileNotFoundError:
        raise NotFoundError(f"{place}: there is no such session") from None
    except OSError as error:
        raise StorageError(f"{place}: cannot be read: {error.strerror}") from error
    except BaseException:
        sequence.close()
        raise


def _sections(session: Session, key: Mapping[str, Any]) -> Iterator[bytes]:
    sequence = session.sequence
    length = sequence.saved_length()
    header = {**key, "tokens": len(session.tokens), "length": length, "note": session.note}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    if len(text) > _MAX_HEADER_BYTES:
        raise InvalidArgumentError(
            f"session: its note has {len(text)} bytes, allowed are {_MAX_HEADER_BYTES}"
        )
    yield _HEAD.pack(MAGIC, FORMAT_VERSION, len(text)) + text
    yield struct.pack(f"<{len(session.tokens)}i", *session.tokens)
    for index in range(_blocks(length)):
        yield sequence.saved_block(index)
    yield sequence.saved_state() if length else b""


def _blocks(length: int) -> int:
    return -(-length // _BLOCK_TOKENS)


class _Reader:
    """Every part is checked, sizes first, before anything is made of it."""

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file = file
        self._where = where

    def read(self, sequence: _native.Sequence, key: Mapping[str, Any]) -> Session:
        header = self._header()
        for name, wanted in key.items():
            if header.get(name) != wanted:
                raise InvalidArgumentError(
                    f"{self._where}: the session is of another model or other settings: {name} is {header.get(name)!r:.60}, "
                    f"here it is {wanted!r:.60}"
                )
        count, length, note = self._counts(header)
        state_bytes = key["state_bytes"] if length else 0
        blocks = _blocks(length)
        self._check_rest(4 * count + blocks * key["kv_block_bytes"] + state_bytes + (2 + blocks) * _SUM.size)
        tokens = list(struct.unpack(f"<{count}i", self._section(4 * count)))
        if any(not 0 <= token < key["vocab_size"] for token in tokens):
            raise CorruptError(f"{self._where}: holds a token outside the vocabulary of {key['vocab_size']}")
        if length:
            sequence.begin_restore(tokens[:length])
        for index in range(blocks):
            sequence.restore_block(index, self._section(key["kv_block_bytes"]))
        state = self._section(state_bytes)
        if length:
            sequence.restore_state(state)
            sequence.end_restore(length)
        return Session(sequence, tokens, note)

    def _header(self) -> dict[str, Any]:
        start = self._exactly(_HEAD.size)
        magic, version, size = _HEAD.unpack(start)
        if magic != MAGIC:
            raise CorruptError(f"{self._where}: is no session: it begins with {magic!r}")
        if version != FORMAT_VERSION:
            raise UnsupportedError(
                f"{self._where}: session format {version}; this version of edgert reads {FORMAT_VERSION}"
            )
        if size > _MAX_HEADER_BYTES:
            raise CorruptError(f"{self._where}: a header of {size} bytes, allowed are {_MAX_HEADER_BYTES}")
        text = self._exactly(size)
        self._check_sum(start + text)
        return parse_json_object(text, self._where)

    def _counts(self, header: Mapping[str, Any]) -> tuple[int, int, dict[str, Any]]:
        count, length, note = header.get("tokens"), header.get("length"), header.get("note")
        if type(count) is not int or type(length) is not int or not 0 <= length <= count < 1 << 31:
            raise CorruptError(f"{self._where}: {length!r:.40} of {count!r:.40} tokens")
        if not isinstance(note, dict):
            raise CorruptError(f"{self._where}: note: allowed is an object")
        return count, length, note

    def _check_rest(self, wanted: int) -> None:
        rest = os.fstat(self._file.fileno()).st_size - self._file.tell()
        if rest != wanted:
            raise CorruptError(f"{self._where}: {rest} bytes follow the header, {wanted} should")

    def _section(self, size: int) -> bytes:
        content = self._exactly(size)
        self._check_sum(content)
        return content

    def _check_sum(self, content: bytes) -> None:
        at = self._file.tell()
        (stated,) = _SUM.unpack(self._exactly(_SUM.size))
        if stated != int(_native.xxh64(content), 16):
            raise CorruptError(
                f"{self._where}: the checksum at byte {at} is not that of the {len(content)} bytes before it"
            )

    def _exactly(self, size: int) -> bytes:
        at = self._file.tell()
        content = self._file.read(size)
        if len(content) != size:
            raise CorruptError(
                f"{self._where}: ends at byte {at + len(content)}, in what is {size} bytes from byte {at}"
            )
        return content
