"""Readers of event files: golden bytes, both ways, in chunks, hostile; and event for event with the public packages."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import CorruptError, EdgertError, InvalidArgumentError, NotFoundError, UnsupportedError
from edgert.events import EVENT, es, evt, open_events, stream
from edgert.events.files import FORMATS, save_events

SIZE = (346, 260)
Events = stream.Events


def events(rows: list[tuple[int, int, int, bool]]) -> Events:
    return np.array(rows, EVENT)


def drawn(n: int, seed: int = 0, span: int = 30_000_000) -> Events:
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, span, n))
    return stream.events_of(t, rng.integers(0, SIZE[0], n), rng.integers(0, SIZE[1], n), rng.random(n) < 0.5)


# --- golden bytes --------------------------------------------------------------------------------------------


def test_aedat2_golden(tmp_path: Path) -> None:
    head = b"#!AER-DAT2.0\r\n# AEChip: eu.seebetter.ini.chips.davis.Davis346blue\r\n# dvs128 is elsewhere\r\n"
    row = 259 - 10  # counted from below
    records = [(row << 22 | 5 << 12 | 1 << 11, 0xFFFFFFFE), (1 << 31 | 7, 3), (row << 22 | 6 << 12, 4)]
    path = tmp_path / "a.aedat"
    path.write_bytes(head + b"".join(struct.pack(">II", *record) for record in records))
    file = open_events(path)
    assert file.size == SIZE
    assert file.read().tolist() == [(2**32 - 2, 5, 10, True), (2**32 + 4, 6, 10, False)]


def test_evt2_golden(tmp_path: Path) -> None:
    words = [
        0x1 << 28 | 9,
        8 << 28 | 2,
        1 << 28 | 3 << 22 | 640 << 11 | 7,
        0xA << 28,
        0 << 28 | 4 << 22 | 1 << 11 | 2,
    ]
    path = tmp_path / "a.raw"
    path.write_bytes(b"% evt 2.0\n% geometry 1280x720\n% end\n" + struct.pack("<5I", *words))
    file = open_events(path)
    assert file.size == (1280, 720)
    assert file.read().tolist() == [(2 * 64 + 3, 640, 7, True), (2 * 64 + 4, 1, 2, False)]


def test_evt3_golden(tmp_path: Path) -> None:
    words = [
        0x8001, 0x6002, 0x0007, 0x2805,  # time, row 7, on at 5
        0x3064, 0x4801, 0x5081,  # off from column 100: 100 and 111, then 8 more: 112 and 119
        0x8002, 0x6003, 0x0008, 0x2006,
    ]  # fmt: skip
    path = tmp_path / "a.raw"
    path.write_bytes(b"% format EVT3;height=720;width=1280\n% end\n" + struct.pack("<11H", *words))
    t = 1 << 12 | 2
    expected = [
        (t, 5, 7, True),
        (t, 100, 7, False),
        (t, 111, 7, False),
        (t, 112, 7, False),
        (t, 119, 7, False),
    ]
    assert open_events(path).read().tolist() == [*expected, (2 << 12 | 3, 6, 8, False)]


def test_es_golden(tmp_path: Path) -> None:
    path = tmp_path / "a.es"
    body = "010100020000030004 00fd0500060 0ff0007000800ffffff0101016400".replace(" ", "")
    path.write_bytes(bytes.fromhex("4576656e742053747265616d020000014001f000" + body))
    file = open_events(path)
    assert file.size == (320, 240)
    expected = [
        (0, 1, 2, True),
        (0, 3, 4, False),
        (126, 5, 6, True),
        (253, 7, 8, False),
        (634, 257, 100, True),
    ]
    assert file.read().tolist() == expected


# --- both ways -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_is_read(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = drawn(3000)  # EVT's clocks wrap around within
    save_events(tmp_path / "a", wanted, SIZE, format)
    assert np.array_equal(open_events(tmp_path / "a").read(), wanted)
    for module in ("aedat2", "evt", "es"):  # chunks that cut words' runs anywhere
        monkeypatch.setattr(f"edgert.events.{module}.CHUNK_BYTES", 40)
    with open_events(tmp_path / "a") as file:
        assert file.size == SIZE
        assert np.array_equal(np.concatenate(list(file)), wanted)
    save_events(tmp_path / "none", wanted[:0], SIZE, format)
    assert len(open_events(tmp_path / "none").read()) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=30), st.integers(5, 23))
def test_es_runs_and_gaps(steps: list[int], chunk: int) -> None:
    t = np.cumsum(np.array(steps, np.int64))
    wanted = stream.events_of(t, t % 7, t % 5, t % 2 == 0)
    whole = b""
    for step, one in zip(steps, wanted, strict=True):
        head = step % 127 << 1 | int(one["on"])
        whole += b"\xff" * (step // 127) + struct.pack("<BHH", head, one["x"], one["y"])
    parts, time, rest = [], 0, b""
    for first in range(0, len(whole), chunk):
        part, time, rest = es._decoded(rest + whole[first : first + chunk], time)
        parts.append(part)
    assert rest == b""
    assert np.array_equal(np.concatenate([*parts, wanted[:0]]), wanted)


def test_silence_and_late_starts_keep_their_length(tmp_path: Path) -> None:
    """The clocks of EVT turn round in 16.8 s and 4.8 h; what says nothing for longer is still counted through."""
    at = np.array([0, 1, 12_000_000, 24_100_000, 75_000_000, 75_000_001, 600_000_000])
    for format in ("evt2", "evt3"):
        at[-1] *= 100 if format == "evt2" else 1
        wanted = stream.events_of(at, at % 7, at % 5, at % 2 == 0)
        save_events(tmp_path / "a", wanted, SIZE, format)
        assert np.array_equal(open_events(tmp_path / "a").read(), wanted)
    wanted = wanted[:-1]
    late = wanted.copy()
    late["t"] += (1 << 24) + 5
    save_events(tmp_path / "late", late, SIZE, "evt3")
    assert np.array_equal(open_events(tmp_path / "late").read()["t"], wanted["t"] + 5)
    late["t"][-1] += 1 << 37
    with pytest.raises(InvalidArgumentError, match="2\\^36"):
        save_events(tmp_path / "late", late, SIZE, "evt3")


def test_a_record_that_begins_like_a_header_line_is_a_record(tmp_path: Path) -> None:
    row = 259 - (0x23 << 2 | 1)  # counted from below, its bits are the byte of #
    wanted = events([(5, 1, row, True), (10, 2, row, False), (0x0A0D, 3, row, True)])
    save_events(tmp_path / "a.aedat", wanted, SIZE)
    data = (tmp_path / "a.aedat").read_bytes()
    assert open_events(tmp_path / "a.aedat").read().tolist() == wanted.tolist()
    (tmp_path / "old.aedat").write_bytes(data.replace(b"#End Of ASCII Header\r\n", b""))
    assert open_events(tmp_path / "old.aedat").read().tolist() == wanted.tolist()


# --- hostile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_changed_files_are_refused_or_read_but_nothing_else(format: str, tmp_path: Path) -> None:
    save_events(tmp_path / "a", drawn(300, span=4000), SIZE, format)
    whole = (tmp_path / "a").read_bytes()
    rng, path = np.random.default_rng(1), tmp_path / "b"
    for i in range(150):
        changed = bytearray(whole if i % 2 else whole[: rng.integers(1, len(whole))])
        for _ in range(int(rng.integers(1, 4))):
            changed[rng.integers(0, min(len(changed), 1200))] = int(
                rng.choice(np.array([0, 1, 127, 128, 255, int(rng.integers(256))]))
            )
        path.write_bytes(changed)
        try:
            with open_events(path) as file:
                for chunk in file:
                    assert len(chunk) <= len(whole)
                    assert len(chunk) == 0 or (
                        chunk["x"].max() < file.size[0] and chunk["y"].max() < file.size[1]
                    )
        except EdgertError as error:
            assert str(path) in str(error)


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_events(tmp_path / "none")
    cases: list[tuple[bytes, type[EdgertError], str]] = [
        (b"hello", UnsupportedError, "AEDAT 2 and 4"),
        (b"#!AER-DAT2.0\r\n# AEChip: DVS128\r\n", UnsupportedError, "davis346"),
        (b"% evt 4.0\n% end\n", UnsupportedError, "EVT 2 and EVT 3"),
        (b"% evt 3.0\n% end\n", UnsupportedError, "size="),
        (b"% evt 3.0\n% geometry 99999x3\n% end\n", CorruptError, "99999"),
        (b"Event Stream\x02\x00\x00\x02\x01\x00\x01\x00", UnsupportedError, "ATIS"),
        (b"#!AER-DAT4.0\r\n" + struct.pack("<I", 1 << 31), CorruptError, "header"),
    ]
    for content, kind, said in cases:
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(kind, match=said):
            open_events(tmp_path / "a")
    with pytest.raises(InvalidArgumentError, match="davis|DAVIS|AEDAT 2"):
        save_events(tmp_path / "a.aedat", drawn(3), (3, 3))
    with pytest.raises(InvalidArgumentError, match="back"):
        evt.write(tmp_path / "a", drawn(9)[::-1], SIZE)


def test_events_outside_of_the_sensor_are_corrupt(tmp_path: Path) -> None:
    save_events(tmp_path / "a.es", drawn(50), (16, 16), "es")
    with pytest.raises(CorruptError, match="16 x 16"):
        open_events(tmp_path / "a.es").read()


# --- event for event with the public packages, where they are installed --------------------------------------------


def test_aedat4_agrees_with_dv_processing(tmp_path: Path) -> None:
    dv = pytest.importorskip("dv_processing")
    wanted, path = drawn(20_000), tmp_path / "dv.aedat4"
    for compression in ("LZ4", "LZ4_HIGH", "ZSTD", "ZSTD_HIGH", "NONE"):
        # Frames, IMU and triggers between the events.
        config = dv.io.MonoCameraWriter.DAVISConfig("camera", SIZE, getattr(dv.CompressionType, compression))
        writer = dv.io.MonoCameraWriter(str(path), config)
        for part in np.array_split(wanted, 5):
            store, t0 = dv.EventStore(), int(part["t"][0])
            for t, x, y, on in part.tolist():
                store.push_back(t, x, y, on)
            writer.writeEvents(store)
            writer.writeFrame(dv.Frame(t0, np.zeros(SIZE[::-1], np.uint8)))
            writer.writeTrigger(dv.Trigger(t0, dv.TriggerType.EXTERNAL_SIGNAL_RISING_EDGE))
            writer.writeImu(dv.IMU(t0, *[0.0] * 10))
        del writer
        with open_events(path) as file:
            assert file.size == SIZE
            assert np.array_equal(file.read(), wanted)
    ours = tmp_path / "ours.aedat4"
    save_events(ours, wanted, SIZE)
    recording, parts = dv.io.MonoCameraRecording(str(ours)), []
    while (batch := recording.getNextEventBatch()) is not None:
        parts.append(batch.numpy())
    read = np.concatenate(parts)
    columns = (read["timestamp"], read["x"], read["y"], read["polarity"] == 1)
    assert np.array_equal(stream.events_of(*columns), wanted)


def test_aedat4_agrees_with_aedat(tmp_path: Path) -> None:
    aedat = pytest.importorskip("aedat")
    wanted, path = drawn(5000), tmp_path / "a.aedat4"
    save_events(path, wanted, SIZE)
    parts = [packet["events"] for packet in aedat.Decoder(str(path)) if "events" in packet]
    read = np.concatenate(parts)
    assert np.array_equal(stream.events_of(read["t"], read["x"], read["y"], read["on"]), wanted)


@pytest.mark.parametrize("suffix", ["aedat", "aedat4", "raw"])
def test_files_of_eventcv(suffix: str, tmp_path: Path) -> None:
    eventcv = pytest.importorskip("eventcv")
    wanted, path = drawn(5000), tmp_path / f"a.{suffix}"
    columns = [wanted[name].astype(np.int64) for name in ("x", "y", "t", "on")]
    made = eventcv.from_numpy(np.stack(columns, axis=1), sensor_size=SIZE, time_unit="us")
    made.save(str(path))
    theirs = eventcv.load(str(path)).numpy()
    assert np.array_equal(open_events(path, size=SIZE).read(), as_events(theirs))
    save_events(tmp_path / f"ours.{suffix}", wanted, SIZE)
    assert np.array_equal(as_events(eventcv.load(str(tmp_path / f"ours.{suffix}")).numpy()), wanted)


def as_events(xytp: Any) -> Events:
    return stream.events_of(xytp[:, 2], xytp[:, 0], xytp[:, 1], xytp[:, 3] > 0)


@pytest.mark.parametrize("encoding", ["evt2", "evt3"])
def test_files_of_expelliarmus(encoding: str, tmp_path: Path) -> None:
    expelliarmus = pytest.importorskip("expelliarmus")
    wizard = expelliarmus.Wizard(encoding=encoding)
    # Of EVT 3 it counts the clock's wraps itself, whatever TIME_HIGH says, so times there stay below the first.
    wanted = drawn(5000, span=4096 if encoding == "evt3" else 4_000_000)
    theirs = np.empty(len(wanted), np.dtype([("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "u1")]))
    for name, mine in (("t", "t"), ("x", "x"), ("y", "y"), ("p", "on")):
        theirs[name] = wanted[mine]
    wizard.save(str(tmp_path / "theirs.raw"), theirs)
    read = open_events(tmp_path / "theirs.raw", size=SIZE).read()
    assert np.array_equal(read, wanted)
    save_events(tmp_path / "ours.raw", wanted, SIZE, encoding)
    back = wizard.read(str(tmp_path / "ours.raw"))
    assert np.array_equal(stream.events_of(back["t"], back["x"], back["y"], back["p"] == 1), wanted)


def test_files_of_event_stream(tmp_path: Path) -> None:
    event_stream = pytest.importorskip("event_stream")
    wanted = drawn(5000)
    theirs = np.empty(len(wanted), event_stream.dvs_dtype)
    for name in ("t", "x", "y", "on"):
        theirs[name] = wanted[name]
    with event_stream.Encoder(str(tmp_path / "theirs.es"), "dvs", *SIZE) as encoder:
        encoder.write(theirs)
    assert np.array_equal(open_events(tmp_path / "theirs.es").read(), wanted)
    save_events(tmp_path / "ours.es", wanted, SIZE)
    with event_stream.Decoder(str(tmp_path / "ours.es")) as decoder:
        back = np.concatenate(list(decoder))
    assert np.array_equal(stream.events_of(back["t"], back["x"], back["y"], back["on"]), wanted)


def test_other_readers_count_a_silence_too(tmp_path: Path) -> None:
    eventcv, evlib = pytest.importorskip("eventcv"), pytest.importorskip("evlib")
    at = np.array([0, 1, 12_000_000, 24_100_000, 75_000_000, 75_000_001, 130_000_000])
    wanted = stream.events_of(at, at % 7, at % 5, at % 2 == 0)
    for format in ("evt2", "evt3"):
        save_events(tmp_path / "a.raw", wanted, SIZE, format)
        assert np.array_equal(as_events(eventcv.load(str(tmp_path / "a.raw")).numpy()), wanted)
        table = evlib.load_events(str(tmp_path / "a.raw")).collect()
        assert table["t"].dt.total_microseconds().to_list() == at.tolist()


@pytest.mark.parametrize("format", ["evt2", "evt3"])
def test_evlib_reads_what_is_written(format: str, tmp_path: Path) -> None:
    evlib = pytest.importorskip("evlib")
    wanted, path = drawn(5000, span=4_000_000), tmp_path / "a.raw"
    save_events(path, wanted, SIZE, format)
    table = evlib.load_events(str(path)).collect()
    read = stream.events_of(
        table["t"].dt.total_microseconds().to_numpy(),
        table["x"].to_numpy(),
        table["y"].to_numpy(),
        table["polarity"].to_numpy() > 0,
    )
    assert np.array_equal(read, wanted)


def test_importing_loads_no_model() -> None:
    import subprocess
    import sys

    code = "import sys, edgert.events as e; e.FastSlow, e.open_events; print('tokenizers' in sys.modules, 'edgert.model' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
