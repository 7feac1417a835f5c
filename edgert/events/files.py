"""Event files, opened by what they begin with."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from edgert.errors import InvalidArgumentError, NotFoundError, UnsupportedError
from edgert.events import aedat2, aedat4, es, evt
from edgert.events.stream import EVENT, Events

FORMATS = ("aedat2", "aedat4", "evt2", "evt3", "es")


@dataclass(frozen=True)
class EventFile:
    """An iterator over chunks of events (EVENT), each at most about a megabyte of the file, in file order; a context
    manager that closes the file."""

    path: Path
    size: tuple[int, int]  # width, height
    chunks: Iterator[Events]
    _file: BinaryIO

    def __iter__(self) -> Iterator[Events]:
        return self.chunks

    def read(self) -> Events:
        """All that is left, in one array."""
        parts = list(self.chunks)
        return np.concatenate(parts) if parts else np.empty(0, EVENT)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_events(path: str | Path, *, size: tuple[int, int] | None = None) -> EventFile:
    """Open an AEDAT 2, AEDAT 4, EVT 2, EVT 3 or .es file; `size` (width, height) for EVT files whose header lacks it.

    Raises NotFoundError, UnsupportedError for other formats and versions, CorruptError with the place, here and while
    iterating. Nothing that a file says is believed unchecked, and memory stays bounded.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"{path}: there is no such file")
    file = path.open("rb")
    try:
        start = file.read(16)
        file.seek(0)
        if start.startswith(aedat4.MAGIC):
            found, chunks = aedat4.read(file, path)
        elif start.startswith(aedat2.MAGIC):
            found, chunks = aedat2.read(file, path)
        elif start.startswith(es.MAGIC):
            found, chunks = es.read(file, path)
        elif start.startswith(evt.MAGIC):
            found, chunks = evt.read(file, path, size)
        else:
            raise UnsupportedError(
                f"{path}: begins with {start!r}; read are AEDAT 2 and 4, EVT 2 and 3, and .es"
            )
    except BaseException:
        file.close()
        raise
    return EventFile(path, found, chunks, file)


def save_events(path: str | Path, events: Events, size: tuple[int, int], format: str | None = None) -> None:
    """Write events (EVENT) of a sensor of `size` (width, height). The format follows from the suffix where not given:
    .aedat4, .aedat (2), .raw (EVT 3), .es."""
    suffixes = {".aedat4": "aedat4", ".aedat": "aedat2", ".raw": "evt3", ".es": "es"}
    chosen = format or suffixes.get(Path(path).suffix, "")
    if chosen == "aedat2":
        aedat2.write(path, events, size)
    elif chosen == "aedat4":
        aedat4.write(path, events, size)
    elif chosen in ("evt2", "evt3"):
        evt.write(path, events, size, version=int(chosen[-1]))
    elif chosen == "es":
        es.write(path, events, size)
    else:
        raise InvalidArgumentError(
            f"format: found {chosen or Path(path).suffix!r}, allowed is {', '.join(FORMATS)}"
        )
