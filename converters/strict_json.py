"""JSON from outside: size, depth and number of values are bounded before anything is built."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from edgert.errors import CorruptError

from .files import read_small_file

# A string (skipped, whatever it holds) or one bracket.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]|[\]}]', re.DOTALL)
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json_object(
    path: Path, *, max_bytes: int, max_depth: int = 64, max_values: int = 1 << 16
) -> dict[str, Any]:
    """The object in a JSON file.

    Raises CorruptError naming file and place for what is too large, too deep, not UTF-8, not JSON, not an
    object, has a key twice, or holds NaN, Infinity or a lone surrogate.
    """
    raw = bytes(read_small_file(path, max_bytes))
    return parse_json_object(raw, str(path), max_depth=max_depth, max_values=max_values)


def parse_json_object(
    raw: bytes, where: str, *, max_depth: int = 64, max_values: int = 1 << 16
) -> dict[str, Any]:
    """parse_json() of what has to be an object."""
    value = parse_json(raw, where, max_depth=max_depth, max_values=max_values)
    if not isinstance(value, dict):
        raise CorruptError(f"{where}: holds a JSON {type(value).__name__}; an object is needed")
    return value


def parse_json(raw: bytes, where: str, *, max_depth: int = 64, max_values: int = 1 << 16) -> Any:
    """Parse bounded JSON; `where` opens the messages. Raises CorruptError."""
    _check_shape(raw, where, max_depth, max_values)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptError(f"{where}: byte {error.start}: not UTF-8") from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise CorruptError(f"{where}: the key {twice!r} appears twice in one object")
        return result

    def no_constant(name: str) -> NoReturn:
        raise CorruptError(f"{where}: {name} is not a JSON number")

    def finite(number: str) -> float:
        value = float(number)
        if math.isinf(value):
            raise CorruptError(f"{where}: {number:.40} is beyond the range of numbers")
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
        if _ESCAPED_SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise CorruptError(f"{where}: character {error.pos}: {error.msg}") from None
    except UnicodeEncodeError:
        raise CorruptError(f"{where}: a string holds a lone surrogate") from None
    except ValueError as error:  # an integer of thousands of digits
        raise CorruptError(f"{where}: {error}") from None


def _check_shape(raw: bytes, where: str, max_depth: int, max_values: int) -> None:
    values = 1 + raw.count(b",") + raw.count(b"[") + raw.count(b"{")  # an upper bound: strings count too
    if values > max_values:
        raise CorruptError(f"{where}: about {values} values; at most {max_values} are allowed here")
    depth = 0
    for token in _TOKEN.finditer(raw):
        first = token.group()[0]
        if first in b"[{":
            depth += 1
            if depth > max_depth:
                raise CorruptError(f"{where}: byte {token.start()}: nested deeper than {max_depth} levels")
        elif first in b"]}":
            depth -= 1
