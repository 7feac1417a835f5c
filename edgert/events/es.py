"""Event Stream (.es), version 2, of a DVS: a head, then events of five bytes.

The first byte holds the time since the event before, in microseconds, and the polarity; 255 says 127 microseconds more,
254 nothing.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgert.errors import CorruptError, InvalidArgumentError, UnsupportedError
from edgert.events.stream import CHUNK_BYTES, Events, check_inside, check_size, events_of

MAGIC = b"Event Stream"
_BODY = np.dtype([("head", "u1"), ("x", "<u2"), ("y", "<u2")])


def read(file: BinaryIO, path: Path) -> tuple[tuple[int, int], Iterator[Events]]:
    file.seek(len(MAGIC))
    head = file.read(4)
    if len(head) < 4 or head[0] != 2:
        raise UnsupportedError(f"{path}: found version {list(head[:3])}, read is 2")
    if head[3] != 1:
        kinds = {0: "generic", 2: "ATIS", 4: "colour"}
        raise UnsupportedError(f"{path}: found events of kind {kinds.get(head[3], head[3])}, read is DVS")
    size = file.read(4)
    if len(size) < 4:
        raise CorruptError(f"{path}: the file ends within its head")
    width, height = struct.unpack("<HH", size)
    checked = check_size(width, height, path)
    return checked, _chunks(file, path, checked)


def _chunks(file: BinaryIO, path: Path, size: tuple[int, int]) -> Iterator[Events]:
    time, rest = 0, b""
    while True:
        offset = file.tell() - len(rest)
        data = file.read(CHUNK_BYTES)
        if not data:
            if rest:
                raise CorruptError(f"{path}, byte {offset}: the file ends within an event")
            return
        events, time, rest = _decoded(rest + data, time)
        check_inside(events, size, path, offset)
        yield events


def _decoded(data: bytes, time: int) -> tuple[Events, int, bytes]:
    """(events, the time of the last, what is left of an event)."""
    raw, at = np.frombuffer(data, np.uint8), 0
    runs, added, gap = [], [], 0
    while at < len(raw):
        if raw[at] >= 254:
            gap += 127 if raw[at] == 255 else 0
            at += 1
            continue
        heads = raw[at::5]
        special = np.flatnonzero(heads[:64] >= 254)  # most runs are short or very long
        special = special if len(special) or len(heads) <= 64 else np.flatnonzero(heads >= 254)
        count = min(int(special[0]) if len(special) else len(heads), (len(raw) - at) // 5)
        if count == 0:
            break
        run = np.frombuffer(data, _BODY, count, at)
        runs.append(run)
        added.append((len(run), gap))
        gap, at = 0, at + 5 * count
    body = np.concatenate(runs) if runs else np.empty(0, _BODY)
    steps = (body["head"] >> 1).astype(np.int64)
    firsts = np.cumsum([0, *(length for length, _ in added)], dtype=np.int64)[:-1]
    steps[firsts] += np.array([gap_before for _, gap_before in added], np.int64)
    times = time + np.cumsum(steps)
    last = int(times[-1]) if len(times) else time
    return events_of(times, body["x"], body["y"], body["head"] & 1 == 1), last + gap, data[at:]


def write(path: str | Path, events: Events, size: tuple[int, int]) -> None:
    """InvalidArgumentError for events out of order in time."""
    steps = np.diff(events["t"], prepend=0)
    if len(steps) and steps.min() < 0:
        raise InvalidArgumentError("t: .es holds times from 0 on that do not go back")
    body = np.zeros(len(events), _BODY)
    body["head"] = (steps % 127) << 1 | events["on"]
    body["x"], body["y"] = events["x"], events["y"]
    gaps = steps // 127
    starts = np.cumsum(gaps + 5) - 5
    out = np.full(int(gaps.sum()) + 5 * len(events), 255, np.uint8)
    out[starts[:, None] + np.arange(5)] = body.view(np.uint8).reshape(-1, 5)
    Path(path).write_bytes(MAGIC + bytes([2, 0, 0, 1]) + struct.pack("<HH", *size) + out.tobytes())
