"""What every reader yields: numpy structured arrays of events, in file order.

t: microseconds; x from the left, y from the top; on: brighter.
"""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgert.errors import CorruptError

EVENT = np.dtype([("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("on", "?")])
Events = npt.NDArray[Any]  # of EVENT

CHUNK_BYTES = 1 << 20  # that a reader takes at once
LONGEST_HEADER = 16 << 20  # jAER writes its whole preferences into it
LARGEST_SIDE = 1 << 14  # pixels
_NO_TEXT = frozenset(range(32)) - frozenset(b"\t\r\n")


def events_of(t: Any, x: Any, y: Any, on: Any) -> Events:
    """Columns as EVENT."""
    out = np.empty(len(t), EVENT)
    out["t"], out["x"], out["y"], out["on"] = t, x, y, on
    return out


def check_inside(events: Events, size: tuple[int, int], path: Path, offset: int) -> None:
    """CorruptError for an event outside of a sensor of `size` (width, height)."""
    outside = (events["x"] >= size[0]) | (events["y"] >= size[1])
    if outside.any():
        bad = events[int(np.argmax(outside))]
        raise CorruptError(
            f"{path}, after byte {offset}: found an event at ({bad['x']}, {bad['y']}), "
            f"the sensor has {size[0]} x {size[1]} pixels"
        )


def check_size(width: int, height: int, path: Path) -> tuple[int, int]:
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE):
        raise CorruptError(
            f"{path}: found a sensor of {width} x {height} pixels, allowed is up to {LARGEST_SIDE}"
        )
    return width, height


def header_lines(file: BinaryIO, path: Path, mark: bytes, end: bytes) -> list[str]:
    """Lines of text from the start that begin with `mark`, up to and with `end` where it comes; the file stands after them.

    Where no `end` says so, what begins with `mark` and is no text is data already.
    """
    lines: list[str] = []
    while True:
        at = file.tell()
        line = file.readline(LONGEST_HEADER)
        if not line.startswith(mark) or not _NO_TEXT.isdisjoint(line):
            file.seek(at)
            return lines
        if not line.endswith(b"\n") or file.tell() > LONGEST_HEADER:
            raise CorruptError(
                f"{path}, byte {at}: a header line without an end, or more than {LONGEST_HEADER} bytes"
            )
        lines.append(line.decode("latin-1").rstrip("\r\n"))
        if lines[-1].lower() == end.decode():
            return lines


class Unwrapped:
    """Times of a counter that wraps around, made to grow; state goes on from chunk to chunk."""

    def __init__(self, period: int) -> None:
        self._period = period
        self._last: int | None = None
        self._base = 0

    def __call__(self, raw: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        values = raw.astype(np.int64)
        if not len(values):
            return values
        before = values[0] if self._last is None else self._last
        steps = np.diff(values, prepend=before)
        bases = self._base + np.cumsum(steps < -(self._period // 2)) * self._period
        self._last, self._base = int(values[-1]), int(bases[-1])
        return values + bases
