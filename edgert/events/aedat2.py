"""AEDAT 2.0, jAER's format: a header of lines with #, then big-endian pairs of address and microseconds.

DAVIS: bit 31 marks a sample of the frame or the IMU, bit 10 other records; y in bits 22 to 30, counted from below, x in
12 to 21, polarity in 11. Frames and IMU are skipped. The counter of 32 bits wraps around.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgert.errors import CorruptError, InvalidArgumentError, UnsupportedError
from edgert.events.stream import CHUNK_BYTES, Events, Unwrapped, check_inside, events_of, header_lines

MAGIC = b"#!AER-DAT2.0"
CHIPS = {"davis346": (346, 260), "davis240": (240, 180), "davis208": (208, 192), "davis128": (128, 128)}
_END = b"#end of ascii header"  # jAER's, in newer files; a record can begin with the byte of # too
_RECORD = np.dtype([("address", ">u4"), ("t", ">u4")])


def read(file: BinaryIO, path: Path) -> tuple[tuple[int, int], Iterator[Events]]:
    size = _size(header_lines(file, path, b"#", _END), path)
    return size, _chunks(file, path, size)


def _chunks(file: BinaryIO, path: Path, size: tuple[int, int]) -> Iterator[Events]:
    clock = Unwrapped(1 << 32)
    while True:
        offset = file.tell()
        data = file.read(CHUNK_BYTES)
        if not data:
            return
        if len(data) % 8:
            raise CorruptError(f"{path}, byte {offset + len(data) // 8 * 8}: the file ends within a record")
        records = np.frombuffer(data, _RECORD)
        times, address = clock(records["t"]), records["address"].astype(np.uint32)
        dvs = address & 0x8000_0400 == 0
        address = address[dvs]
        rows = address >> 22 & 0x1FF
        if (rows >= size[1]).any():
            raise CorruptError(
                f"{path}, after byte {offset}: found row {int(rows.max())} of a sensor of {size[1]} rows"
            )
        events = events_of(times[dvs], address >> 12 & 0x3FF, size[1] - 1 - rows, address >> 11 & 1 == 1)
        check_inside(events, size, path, offset)
        yield events


def _size(header: list[str], path: Path) -> tuple[int, int]:
    # The chip's own lines only: jAER's preferences, further down, name every chip.
    named = " ".join(line.lower() for line in header if "AEChip:" in line or "HardwareInterface:" in line)
    for chip, size in CHIPS.items():
        if chip in named.replace("davis ", "davis"):
            return size
    raise UnsupportedError(f"{path}: found no chip in the header that is one of {', '.join(CHIPS)}")


def write(path: str | Path, events: Events, size: tuple[int, int]) -> None:
    """InvalidArgumentError for a size that no DAVIS has and for times beyond 32 bits."""
    chip = next((chip for chip, known in CHIPS.items() if known == size), None)
    if chip is None:
        raise InvalidArgumentError(f"size: found {size}, AEDAT 2 knows {list(CHIPS.values())}")
    if len(events) and not (events["t"].min() >= 0 and events["t"].max() < 1 << 32):
        raise InvalidArgumentError("t: AEDAT 2 holds 0 to 2^32 - 1 microseconds")
    records = np.zeros(len(events), _RECORD)
    rows = size[1] - 1 - events["y"].astype(np.uint32)
    records["address"] = (
        rows << 22 | events["x"].astype(np.uint32) << 12 | events["on"].astype(np.uint32) << 11
    )
    records["t"] = events["t"]
    head = f"#!AER-DAT2.0\r\n# AEChip: eu.seebetter.ini.chips.davis.{chip.capitalize()}\r\n#End Of ASCII Header\r\n"
    Path(path).write_bytes(head.encode() + records.tobytes())
