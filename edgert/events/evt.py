"""EVT 2.0 and 3.0, Prophesee's raw formats: a header of lines with %, then words of 32 or 16 bits, little endian.

What stands before the first TIME_HIGH has no time yet and is left out, as are triggers and other words.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgert.errors import CorruptError, InvalidArgumentError, UnsupportedError
from edgert.events.stream import (
    CHUNK_BYTES,
    Events,
    Unwrapped,
    check_inside,
    check_size,
    events_of,
    header_lines,
)

MAGIC = b"% "
_Words = npt.NDArray[Any]


def read(
    file: BinaryIO, path: Path, size: tuple[int, int] | None = None
) -> tuple[tuple[int, int], Iterator[Events]]:
    lines = header_lines(file, path, b"%", b"% end")
    version, found = _described(" ".join(lines), path)
    size = size or found
    if size is None:
        raise UnsupportedError(
            f"{path}: the header does not say the sensor's size; give it as size=(width, height)"
        )
    return size, _chunks(file, path, size, _Evt2() if version == 2 else _Evt3(), 4 if version == 2 else 2)


def _described(header: str, path: Path) -> tuple[int, tuple[int, int] | None]:
    version = re.search(r"% (?:evt (\d)\.\d|format EVT(\d))", header)
    number = int(version[1] or version[2]) if version else 0
    if number not in (2, 3):
        raise UnsupportedError(
            f"{path}: found {version[0] if version else 'no version'}, read are EVT 2 and EVT 3"
        )
    geometry = re.search(r"% geometry (\d{1,6})x(\d{1,6})", header)
    if geometry:
        return number, check_size(int(geometry[1]), int(geometry[2]), path)
    height, width = (re.search(rf"[;\s]{name}=(\d{{1,6}})", header) for name in ("height", "width"))
    return number, check_size(int(width[1]), int(height[1]), path) if width and height else None


def _chunks(file: BinaryIO, path: Path, size: tuple[int, int], decode: Any, width: int) -> Iterator[Events]:
    while True:
        offset = file.tell()
        data = file.read(CHUNK_BYTES)
        if not data:
            return
        if len(data) % width:
            raise CorruptError(
                f"{path}, byte {offset + len(data) // width * width}: the file ends within a word"
            )
        events = decode(np.frombuffer(data, f"<u{width}"))
        check_inside(events, size, path, offset)
        yield events


class _Latest:
    """For each word the value of the latest word of a kind, across chunks."""

    def __init__(self, before: int) -> None:
        self._before = before

    def __call__(
        self, places: npt.NDArray[np.intp], values: npt.NDArray[np.int64], n: int
    ) -> npt.NDArray[np.int64]:
        known = np.concatenate([[self._before], values])
        self._before = int(known[-1])
        marks = np.zeros(n, np.intp)
        marks[places] = 1
        return known[np.cumsum(marks)].astype(np.int64)


class _Evt2:
    def __init__(self) -> None:
        self._clock = Unwrapped(1 << 28)
        self._high = _Latest(-1)

    def __call__(self, words: _Words) -> Events:
        kind = words >> 28
        highs = np.flatnonzero(kind == 8)
        high = self._high(highs, self._clock(words[highs] & 0xFFF_FFFF), len(words))
        at = np.flatnonzero((kind <= 1) & (high >= 0))
        cd = words[at]
        return events_of(high[at] << 6 | (cd >> 22 & 0x3F), cd >> 11 & 0x7FF, cd & 0x7FF, kind[at] == 1)


class _Evt3:
    def __init__(self) -> None:
        self._clock = Unwrapped(1 << 12)
        self._high, self._low, self._row = _Latest(-1), _Latest(0), _Latest(0)
        self._base, self._reached = _Latest(0), 0

    def __call__(self, words: _Words) -> Events:
        n, kind, value = len(words), words >> 12, (words & 0xFFF).astype(np.int64)
        highs = np.flatnonzero(kind == 8)
        high = self._high(highs, self._clock(value[highs]), n)
        lows, rows = np.flatnonzero(kind == 6), np.flatnonzero(kind == 0)
        low, row = self._low(lows, value[lows], n), self._row(rows, value[rows] & 0x7FF, n)
        # A vector word covers 12 or 8 columns from where the one before it ended, counted from the last base word.
        vector = (kind == 4) | (kind == 5)
        columns = np.where(kind == 4, 12, np.where(kind == 5, 8, 0)).astype(np.int64)
        covered = self._reached + np.cumsum(columns) - columns
        bases = np.flatnonzero(kind == 3)
        base = self._base(bases, (value[bases] & 0x7FF) - covered[bases] << 1 | value[bases] >> 11, n)
        self._reached = int(covered[-1] + columns[-1]) if n else self._reached
        singles = np.flatnonzero((kind == 2) & (high >= 0))
        vectors = np.flatnonzero(vector & (high >= 0))
        valid = value[vectors, None] >> np.arange(12) & 1 == 1
        valid[kind[vectors] == 5, 8:] = False
        which, bit = np.nonzero(valid)
        at = np.concatenate([singles, vectors[which]])
        x = np.concatenate(
            [value[singles] & 0x7FF, (base[vectors] >> 1)[which] + covered[vectors][which] + bit]
        )
        on = np.concatenate([value[singles] >> 11 & 1, (base[vectors] & 1)[which]])
        order = np.argsort(at, kind="stable")
        at = at[order]
        return events_of(high[at] << 12 | low[at], x[order], row[at], on[order] == 1)


def write(path: str | Path, events: Events, size: tuple[int, int], version: int = 3) -> None:
    """The formats hold a clock that wraps around: the first time is kept less a multiple of 2^24 us (2^34 of EVT 2).

    InvalidArgumentError for events out of order in time and for a silence of more than 19 hours.
    """
    t = events["t"].astype(np.int64)
    if len(t) and (t[0] < 0 or (np.diff(t) < 0).any()):
        raise InvalidArgumentError("t: EVT holds times from 0 on that do not go back")
    if len(t) and np.diff(t).max(initial=0) > 1 << 36:
        raise InvalidArgumentError("t: found more than 2^36 us between two events, which EVT counts through")
    head = f"% evt {version}.0\n% format EVT{version};height={size[1]};width={size[0]}\n% geometry {size[0]}x{size[1]}\n% end\n"
    x, y, on = (events[name].astype(np.int64) for name in ("x", "y", "on"))
    bits = 28 if version == 2 else 12  # of TIME_HIGH
    high = t >> (6 if version == 2 else 12)
    time_high = 8 << bits | high & ((1 << bits) - 1)
    if version == 2:
        columns = [(time_high, high), (on << 28 | (t & 0x3F) << 22 | x << 11 | y, None)]
    else:
        columns = [
            (time_high, high),
            (6 << 12 | t & 0xFFF, t),
            (y, y),
            (2 << 12 | on << 11 | x, None),
        ]
    # A word stands where it says something new; in a new time the row is said again.
    needed = [np.ones(len(t), bool) if key is None else np.diff(key, prepend=-1) != 0 for _, key in columns]
    chosen = np.stack(needed, axis=1)
    words = np.stack([word for word, _ in columns], axis=1)[chosen]
    starts = np.cumsum(chosen.sum(axis=1)) - chosen.sum(axis=1)
    words = np.insert(words, *_ticks(high, bits, starts, 1 << 26 if version == 2 else 1))
    Path(path).write_bytes(head.encode() + words.astype(f"<u{4 if version == 2 else 2}").tobytes())


def _ticks(high: _Words, bits: int, starts: _Words, apart: int) -> tuple[_Words, _Words]:
    """(places, words): TIME_HIGH in between, so that no turn of the clock goes by unseen. Of EVT 3 every one, as a sensor
    does: readers take a step back for a turn only near the clock's end."""
    more = np.maximum(np.diff(high, prepend=high[:1]) - 1, 0) // apart
    which = np.repeat(np.arange(len(high)), more)
    order = np.arange(len(which)) - np.repeat(np.cumsum(more) - more, more) + 1
    values = high[which - 1] + order * apart
    return starts[which], 8 << bits | values & ((1 << bits) - 1)
