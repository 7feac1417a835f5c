"""AEDAT 4, the format of DV: a flatbuffer header with XML inside, then packets of flatbuffers, compressed or not.

Read are the streams of type EVTS; frames, IMU and triggers are skipped. Packets are bounded before and after they are
decompressed, offsets are checked before they are followed, and XML with entities is refused.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np

from edgert.errors import CorruptError, UnsupportedError
from edgert.events.stream import EVENT, Events, check_inside, check_size, events_of

MAGIC = b"#!AER-DAT4.0\r\n"
_EVENT = np.dtype({"names": ["t", "x", "y", "on"], "formats": ["<i8", "<i2", "<i2", "u1"], "offsets": [0, 8, 10, 12], "itemsize": 16})  # fmt: skip
_LARGEST_PACKET = 64 << 20  # bytes, as stored
_LARGEST_PAYLOAD = 256 << 20  # bytes, decompressed
_LONGEST_XML = 4 << 20


def read(file: BinaryIO, path: Path) -> tuple[tuple[int, int], Iterator[Events]]:
    file.seek(len(MAGIC))
    header = _Table.root(_sized(file, path, _LONGEST_XML + 1024), b"IOHE", f"{path}, header")
    compression = header.integer(0, "<i", 0)
    table_at = header.integer(1, "<q", -1)
    streams = _streams(header.text(2), path)
    if not streams:
        raise UnsupportedError(f"{path}, header: found no stream of type EVTS, which alone is read")
    stream, size = next(iter(streams.items()))
    return size, _chunks(file, path, stream, size, compression, table_at)


def _chunks(
    file: BinaryIO, path: Path, stream: int, size: tuple[int, int], compression: int, end: int
) -> Iterator[Events]:
    decompress = _decompressor(compression, path)
    while end < 0 or file.tell() < end:
        offset = file.tell()
        head = file.read(8)
        if not head:
            return
        if len(head) < 8:
            raise CorruptError(f"{path}, byte {offset}: the file ends within a packet's head")
        number, length = struct.unpack("<ii", head)
        if not 0 <= length <= _LARGEST_PACKET:
            raise CorruptError(
                f"{path}, byte {offset}: found a packet of {length} bytes, allowed is {_LARGEST_PACKET}"
            )
        if number != stream:
            file.seek(length, 1)
            continue
        data = file.read(length)
        if len(data) < length:
            raise CorruptError(
                f"{path}, byte {offset}: the file ends within a packet, found {len(data)} of {length} bytes"
            )
        events = _packet(decompress(data, offset), f"{path}, packet at byte {offset}")
        check_inside(events, size, path, offset)
        yield events


def _packet(payload: bytes, where: str) -> Events:
    if len(payload) < 4:
        raise CorruptError(f"{where}: {len(payload)} bytes are no packet")
    (length,) = struct.unpack_from("<I", payload)
    if length != len(payload) - 4:
        raise CorruptError(f"{where}: found a payload of {len(payload) - 4} bytes that says {length}")
    raw = _Table.root(payload[4:], b"EVTS", where).structs(0, _EVENT)
    if len(raw) and min(int(raw["x"].min()), int(raw["y"].min())) < 0:
        raise CorruptError(f"{where}: found a negative coordinate")
    return events_of(raw["t"], raw["x"], raw["y"], raw["on"] != 0)


class _Table:
    """A flatbuffer's table. Every read is within the buffer or a CorruptError."""

    def __init__(self, buffer: bytes, at: int, where: str) -> None:
        self._buffer, self._at, self._where = buffer, at, where
        vtable = at - self._unpack("<i", at)
        self._fields = [
            self._unpack("<H", vtable + 4 + 2 * i)
            for i in range(min(16, max(0, self._unpack("<H", vtable) - 4) // 2))
        ]

    @classmethod
    def root(cls, buffer: bytes, identifier: bytes, where: str) -> "_Table":
        if buffer[4:8] != identifier:
            raise CorruptError(f"{where}: found {buffer[4:8]!r}, needed is {identifier!r}")
        return cls(buffer, struct.unpack_from("<I", buffer)[0], where)

    def integer(self, field: int, kind: str, default: int) -> int:
        offset = self._offset(field)
        return default if offset is None else self._unpack(kind, offset)

    def text(self, field: int) -> bytes:
        offset = self._offset(field)
        if offset is None:
            return b""
        start = offset + self._unpack("<I", offset)
        length = self._unpack("<I", start)
        self._need(start + 4, length)
        return self._buffer[start + 4 : start + 4 + length]

    def structs(self, field: int, dtype: np.dtype[Any]) -> Any:
        offset = self._offset(field)
        if offset is None:
            return np.empty(0, dtype)
        start = offset + self._unpack("<I", offset)
        count = self._unpack("<I", start)
        self._need(start + 4, count * dtype.itemsize)
        return np.frombuffer(self._buffer, dtype, count, start + 4)

    def _offset(self, field: int) -> int | None:
        relative = self._fields[field] if field < len(self._fields) else 0
        return self._at + relative if relative else None

    def _unpack(self, kind: str, at: int) -> int:
        self._need(at, struct.calcsize(kind))
        return int(struct.unpack_from(kind, self._buffer, at)[0])

    def _need(self, at: int, length: int) -> None:
        if at < 0 or at + length > len(self._buffer):
            raise CorruptError(
                f"{self._where}: an offset leads to {at} + {length} of {len(self._buffer)} bytes"
            )


def _sized(file: BinaryIO, path: Path, most: int) -> bytes:
    head = file.read(4)
    length = struct.unpack("<I", head)[0] if len(head) == 4 else 0
    if not 8 <= length <= most:
        raise CorruptError(
            f"{path}, byte {len(MAGIC)}: found a header of {length} bytes, allowed is 8 to {most}"
        )
    data = file.read(length)
    if len(data) < length:
        raise CorruptError(
            f"{path}, byte {len(MAGIC) + 4}: the file ends within its header, found {len(data)} of {length} bytes"
        )
    return data


def _streams(xml: bytes, path: Path) -> dict[int, tuple[int, int]]:
    """Size by stream id, of those with events."""
    if len(xml) > _LONGEST_XML or b"<!" in xml:
        raise CorruptError(f"{path}, header: XML with declarations, or of more than {_LONGEST_XML} bytes")
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise CorruptError(f"{path}, header: {error}") from error
    found = {}
    for node in root.iterfind("./node[@name='outInfo']/node"):
        if node.findtext("./attr[@key='typeIdentifier']") != "EVTS":
            continue
        try:
            width = int(node.findtext("./node[@name='info']/attr[@key='sizeX']") or "")
            height = int(node.findtext("./node[@name='info']/attr[@key='sizeY']") or "")
            found[int(node.get("name") or "")] = check_size(width, height, path)
        except ValueError as error:
            raise CorruptError(f"{path}, header: a stream of events without number or size") from error
    return found


def _decompressor(compression: int, path: Path) -> Any:
    def raw(data: bytes, _offset: int) -> bytes:
        return data

    def lz4(data: bytes, offset: int) -> bytes:
        try:
            from lz4.frame import LZ4FrameDecompressor
        except ModuleNotFoundError as error:
            raise UnsupportedError(f"{path} is compressed with LZ4: pip install 'edgert[events]'") from error
        decompressor = LZ4FrameDecompressor()
        try:
            return _bounded(decompressor.decompress(data, _LARGEST_PAYLOAD + 1), decompressor.eof, offset)
        except RuntimeError as error:
            raise CorruptError(f"{path}, packet at byte {offset}: {error}") from error

    def zstd(data: bytes, offset: int) -> bytes:
        try:
            from zstandard import ZstdDecompressor, ZstdError
        except ModuleNotFoundError as error:
            raise UnsupportedError(f"{path} is compressed with zstd: pip install 'edgert[events]'") from error
        try:
            with ZstdDecompressor(max_window_size=1 << 27).stream_reader(data) as reader:
                return _bounded(reader.read(_LARGEST_PAYLOAD + 1), True, offset)
        except ZstdError as error:
            raise CorruptError(f"{path}, packet at byte {offset}: {error}") from error

    def _bounded(payload: bytes, whole: bool, offset: int) -> bytes:
        if len(payload) > _LARGEST_PAYLOAD or not whole:
            raise CorruptError(
                f"{path}, packet at byte {offset}: cut off, or more than {_LARGEST_PAYLOAD} bytes decompressed"
            )
        return payload

    known = {0: raw, 1: lz4, 2: lz4, 3: zstd, 4: zstd}
    if compression not in known:
        raise UnsupportedError(f"{path}: found compression {compression}, known are {list(known)}")
    return known[compression]


def write(path: str | Path, events: Events, size: tuple[int, int]) -> None:
    """Without compression, in packets of at most 65536 events."""
    xml = (
        '<dv version="2.0"><node name="outInfo" path="/mainloop/Recorder/outInfo/"><node name="0">'
        '<attr key="compression" type="string">NONE</attr>'
        '<attr key="originalModuleName" type="string">edgert</attr>'
        '<attr key="originalOutputName" type="string">events</attr>'
        '<attr key="typeDescription" type="string">Array of events (polarity ON/OFF).</attr>'
        '<attr key="typeIdentifier" type="string">EVTS</attr><node name="info">'
        f'<attr key="sizeX" type="int">{size[0]}</attr><attr key="sizeY" type="int">{size[1]}</attr>'
        '<attr key="source" type="string">edgert</attr></node></node></node></dv>'
    ).encode()
    # Root offset, identifier, vtable (three fields), table, then the string. What is 8 bytes long stands at a multiple
    # of 8, the size before all of it counted.
    vtable = struct.pack("<HHHHH6x", 10, 20, 16, 4, 12)
    table = struct.pack("<iqii", len(vtable), -1, 8, 0)
    text = struct.pack("<I", len(xml)) + xml + b"\0"
    header = struct.pack("<I4s", 8 + len(vtable), b"IOHE") + vtable + table + text
    with Path(path).open("wb") as file:
        file.write(MAGIC + struct.pack("<I", len(header)) + header)
        for first in range(0, len(events), 1 << 16):
            payload = _encoded(events[first : first + (1 << 16)])
            file.write(struct.pack("<ii", 0, len(payload)) + payload)


def _encoded(events: Events) -> bytes:
    raw = np.zeros(len(events), _EVENT)
    for name in EVENT.names or ():
        raw[name] = events[name]
    vtable = struct.pack("<HHH2x", 6, 8, 4)
    body = (
        struct.pack("<I4s", 16, b"EVTS") + vtable + struct.pack("<iI8x", 8, 12) + struct.pack("<I", len(raw))
    )
    payload = body + raw.tobytes()
    return struct.pack("<I", len(payload)) + payload
