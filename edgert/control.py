"""Records of a controller's decisions: JSON lines that can be replayed bit for bit.

The first line holds the law and its settings, each further one the decision on a window.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgert._native import Controller
from edgert.errors import CorruptError, NotFoundError

FORMAT = "edgert-decisions"
VERSION = 1
_SAMPLE = ("value", "t", "age", "quality", "urgent")
_LONGEST_LINE = 1 << 20

Decision = dict[str, Any]


class Record:
    """Writes decisions to a file as they are made; a context manager."""

    def __init__(self, path: str | Path, kind: str, settings: Mapping[str, Any]) -> None:
        self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self.write({"format": FORMAT, "version": VERSION, "kind": kind, "settings": dict(settings)})

    def write(self, decision: Mapping[str, Any]) -> None:
        json.dump(_writable(decision), self._file, separators=(",", ":"), allow_nan=False)
        self._file.write("\n")

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read(path: str | Path) -> tuple[str, dict[str, Any], Iterator[Decision]]:
    """(kind, settings, decisions). NotFoundError; CorruptError with the line."""
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"{path}: there is no such file")
    lines = json_lines(path)
    head = next(lines, {})
    if head.get("format") != FORMAT or head.get("version") != VERSION:
        raise CorruptError(f"{path}, line 1: not the head of a record of decisions, version {VERSION}")
    if not isinstance(head.get("kind"), str) or not isinstance(head.get("settings"), dict):
        raise CorruptError(f"{path}, line 1: found no kind and settings")
    return head["kind"], head["settings"], lines


def replay(path: str | Path) -> int:
    """Make every decision of a record again from its sample. The number of decisions, all equal to the last bit.

    CorruptError names the first line that differs and the field.
    """
    kind, settings, decisions = read(path)
    try:
        controller = Controller(kind, **settings)
    except TypeError as error:
        raise CorruptError(f"{path}, line 1: {error}") from error
    count = 0
    for count, recorded in enumerate(decisions, 1):
        if any(name not in recorded for name in _SAMPLE):
            raise CorruptError(f"{path}, line {count + 1}: a decision has {', '.join(_SAMPLE)}")
        value, t, age, quality, urgent = (recorded[name] for name in _SAMPLE)
        try:
            made = controller.step(float(value), float(t), age=float(age), quality=quality, urgent=urgent)
        except (TypeError, ValueError) as error:
            raise CorruptError(f"{path}, line {count + 1}: {error}") from error
        made = _writable(made)
        for name in made:
            if made[name] != recorded.get(name):
                raise CorruptError(
                    f"{path}, line {count + 1}: {name} is {recorded.get(name)!r}, replayed {made[name]!r}"
                )
    return count


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. CorruptError with the line."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
            if len(line) > _LONGEST_LINE:
                raise CorruptError(f"{path}, line {number}: longer than {_LONGEST_LINE} bytes")
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CorruptError(f"{path}, line {number}: not JSON") from error
            if not isinstance(entry, dict):
                raise CorruptError(f"{path}, line {number}: not an object")
            yield entry


def _writable(entry: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they are written as words."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else _deep(value)
        for name, value in entry.items()
    }


def _deep(value: Any) -> Any:
    return _writable(value) if isinstance(value, Mapping) else value
