"""TOML files as dataclasses, read strictly: what is missing, unknown, of another type or out of range is refused with the
file and the key.

A field's type is str, int, float, bool, a date and time, another such dataclass, or a tuple of str or of dataclasses;
number() and choice() say what it may hold.
"""

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from edgert.errors import InvalidArgumentError

_MAX_FILE_BYTES = 1 << 16
T = TypeVar("T")


def number(low: float, high: float, **options: Any) -> Any:
    """A field for a number from `low` to `high`; int or float as its type says."""
    return field(metadata={"low": low, "high": high}, **options)


def choice(*words: str) -> Any:
    """A field for one of `words`."""
    return field(metadata={"choices": words})


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a file of at most 64 KiB. Raises InvalidArgumentError naming the file."""
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise InvalidArgumentError(f"{path}: is larger than {_MAX_FILE_BYTES} bytes")
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgumentError(f"{path}: not TOML: {error}") from None


def section(cls: type[T], table: Mapping[str, Any], file: str, prefix: str = "") -> T:
    """Build dataclass `cls` from a table; `prefix` is where the table stands in `file`."""
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    types = get_type_hints(cls)
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(known)}"
            raise InvalidArgumentError(f"{file}: key {prefix}{key} is unknown; {hint}")
    values = {}
    for key, item in known.items():
        if key in table:
            values[key] = _value(types[key], item, table[key], file, prefix + key)
        elif item.default is MISSING:
            raise InvalidArgumentError(f"{file}: key {prefix}{key} is missing")
    return cls(**values)


def _value(kind: Any, item: Field[Any], value: Any, file: str, key: str) -> Any:
    def refuse(allowed: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"{file}: key {key}: found {value!r:.60}, allowed is {allowed}")

    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise refuse("a table")
        return section(kind, value, file, key + ".")  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        return _items(get_args(kind)[0], value, file, key, refuse)
    if kind is str:
        choices = item.metadata.get("choices")
        if not isinstance(value, str) or not value or (choices and value not in choices):
            raise refuse("one of " + ", ".join(choices) if choices else "a text")
        return value
    if kind is datetime:
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise refuse("a date and time with its zone")
        return value
    low, high = item.metadata["low"], item.metadata["high"]
    numbers = (int, float) if kind in (float, float | None) else (int,)
    if isinstance(value, bool) or not isinstance(value, numbers) or not low <= value <= high:
        raise refuse(f"{'a whole number' if numbers == (int,) else 'a number'} from {low} to {high:.10g}")
    return value


def _items(kind: Any, value: Any, file: str, key: str, refuse: Any) -> tuple[Any, ...]:
    if kind is str:
        if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
            raise refuse("a list of words")
        return tuple(value)
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise refuse("a list of tables")
    return tuple(section(kind, row, file, f"{key}[{index}].") for index, row in enumerate(value))


def dumps(value: Any, prefix: str = "") -> str:
    """A dataclass as TOML that section() reads back: plain values first, then tables; None is left out."""
    plain, tables = [], []
    for item in fields(value):
        name, content = item.name, getattr(value, item.name)
        if is_dataclass(content):
            tables.append(f"\n[{prefix}{name}]\n{dumps(content, f'{prefix}{name}.')}")
        elif isinstance(content, tuple) and content and is_dataclass(content[0]):
            tables += [f"\n[[{prefix}{name}]]\n{dumps(row, f'{prefix}{name}.')}" for row in content]
        elif content is not None:
            plain.append(f"{name} = {_plain(content)}\n")
    return "".join(plain + tables)


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    if isinstance(value, float):
        return f"{value:.6g}" if "." in f"{value:.6g}" or "e" in f"{value:.6g}" else f"{value:.6g}.0"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
