"""Records of a control loop: JSON lines that can be replayed bit for bit.

The first line holds the settings; each further one the signals of a window (or that memory was short between two), the
decisions, the knobs from then on, and what a reader wants to see of the store.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgert.control import json_lines
from edgert.controlling.brain import Brain
from edgert.errors import CorruptError, NotFoundError

FORMAT = "edgert-control"
VERSION = 1
Line = dict[str, Any]


class Record:
    """Writes lines as they come; a line is in the file when write() returns."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self._file = Path(path).open("w", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        self.write({"format": FORMAT, "version": VERSION, "settings": dict(settings), "about": dict(about)})

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(plain(line), separators=(",", ":"), allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


def read(path: str | Path) -> tuple[Line, Iterator[Line]]:
    """(head, lines). NotFoundError; CorruptError with the line."""
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"{path}: there is no such file")
    lines = json_lines(path)
    head = next(lines, {})
    if head.get("format") != FORMAT or head.get("version") != VERSION:
        raise CorruptError(f"{path}, line 1: not the head of a control record, version {VERSION}")
    return head, lines


def replay(path: str | Path) -> int:
    """Make every decision of a record again from its signals. The number of lines, all equal to the last bit.

    CorruptError names the first line that differs and what.
    """
    head, lines = read(path)
    count = 0
    try:
        brain = Brain.of(head["settings"])
        for count, line in enumerate(lines, 1):
            if line.get("kind") == "urgent":
                made = brain.urgent(line["t"], line["load"])
            else:
                made = brain.window(line["signals"])
            for name, found in (("decisions", plain(made)), ("knobs", plain(brain.knobs))):
                if found != line.get(name):
                    raise CorruptError(
                        f"{path}, line {count + 1}: {name} are {line.get(name)!r:.300}, replayed {found!r:.300}"
                    )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CorruptError):
            raise
        raise CorruptError(
            f"{path}, line {count + 1}: not a line of a control record: {error!r:.200}"
        ) from error
    return count


def plain(value: Any) -> Any:
    """What JSON can say: NaN and infinities become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
