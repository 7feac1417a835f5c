"""Records of a control loop: JSON lines that can be replayed bit for bit.

The first line holds the settings, and the state that the laws go on from where this is not the run's first part; each further
one the signals of a window (or that memory was short between two), the decisions, the knobs from then on, and what a reader
wants to see of the store. A record is bounded: when FILE has its share of the size it becomes FILE.1, this FILE.2 and so on,
and the last one goes. At every moment each of them is whole.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from edgert.control import json_lines
from edgert.controlling.bounds import LOG_SIZE
from edgert.controlling.brain import Brain
from edgert.errors import CorruptError, NotFoundError

FORMAT = "edgert-control"
VERSION = 1
OLDER = 3  # parts beside the one that is written
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
DEFAULT_BYTES: int = LOG_SIZE.default
Line = dict[str, Any]


class Record:
    """Writes lines as they come; a line is in the file when write() returns. OSError as files raise it.

    `most_bytes` bounds FILE and its older parts together. What FILE held before becomes the first of these.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
        most_bytes: int = DEFAULT_BYTES,
    ) -> None:
        self._path, self._most_bytes, self._bytes = Path(path), most_bytes // (OLDER + 1), 0
        self._head = {"format": FORMAT, "version": VERSION, "settings": dict(settings), "about": dict(about)}
        self._file: IO[str] = self._begin(None)

    def write(self, line: Mapping[str, Any], state: Callable[[], Mapping[str, Any]]) -> None:
        """`state`: what the laws go on from after this line."""
        self._bytes += self._file.write(_text(line))
        if self._bytes >= self._most_bytes:
            self._file.close()
            self._file = self._begin(state())

    def close(self) -> None:
        self._file.close()

    def _begin(self, state: Mapping[str, Any] | None) -> IO[str]:
        """A new part, in place of FILE at once with its head; the older ones have moved up."""
        if self._path.exists() and not self._path.is_file():  # a pipe, a terminal
            self._most_bytes = sys.maxsize
            file = self._path.open("w", encoding="utf-8", buffering=1)
            file.write(_text({**self._head, "state": state}))
            return file
        beside = self._path.with_name(f"{self._path.name}.part")
        file = beside.open("w", encoding="utf-8", buffering=1)
        try:
            self._bytes = file.write(_text({**self._head, "state": state}))
            parts = [self._path, *older(self._path)]
            for index in range(OLDER, 1, -1):
                if parts[index - 1].exists():
                    parts[index - 1].replace(parts[index])
            if self._path.is_file():
                self._path.replace(parts[1])
            beside.replace(self._path)
        except BaseException:
            file.close()
            beside.unlink(missing_ok=True)
            raise
        return file


def older(path: Path) -> list[Path]:
    """Where the earlier parts of a record are, the latest first."""
    return [path.with_name(f"{path.name}.{number}") for number in range(1, OLDER + 1)]


def _text(line: Mapping[str, Any]) -> str:
    try:
        return _ENCODER.encode(line) + "\n"
    except (TypeError, ValueError):  # what JSON cannot say
        return _ENCODER.encode(plain(line)) + "\n"


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
        if head.get("state") is not None:
            brain.restore(head["state"])
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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
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
