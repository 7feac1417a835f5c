"""Records of control: what they replay to, what is no record, and how large they grow."""

import json
import math
import os
import random
from pathlib import Path

import pytest
from control_cases import BOUNDS, CALM, CAMERA, PLANT

from edgert import control
from edgert._native import Controller
from edgert.controlling import replay
from edgert.controlling.brain import Brain
from edgert.controlling.record import Record
from edgert.errors import CorruptError, NotFoundError

# --- of a law ----------------------------------------------------------------------------------------


def recorded(path: Path, values: list[float]) -> Path:
    law = Controller("fast-slow", **CAMERA)
    with control.Record(path, "fast-slow", CAMERA) as record:
        for i, value in enumerate(values):
            record.write(law.step(value, i * 0.3))
    return path


def test_a_record_replays_bit_for_bit(tmp_path: Path) -> None:
    rates = [1e6 / 3, math.nan, 7e6, math.inf, 1.1e5, 0.1 + 0.2] * 20
    assert control.replay(recorded(tmp_path / "run.jsonl", rates)) == 120


def test_a_record_that_was_changed_is_named_by_line_and_field(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.jsonl", [1e5] * 10)
    lines = path.read_text().splitlines()
    lines[5] = json.dumps(json.loads(lines[5]) | {"fast": 3})
    path.write_text("\n".join(lines))
    with pytest.raises(CorruptError, match=r"line 6: fast is 3, replayed 57"):
        control.replay(path)
    path.write_text("{}\n")
    with pytest.raises(CorruptError, match="line 1"):
        control.replay(path)
    path.write_text(lines[0] + "\n[1]\n")
    with pytest.raises(CorruptError, match="line 2"):
        control.replay(path)
    with pytest.raises(NotFoundError):
        control.replay(tmp_path / "none.jsonl")


# --- of the control loop -----------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["fast-slow", "aimd", "pi"])
def test_a_record_is_bounded_and_each_part_of_it_can_be_replayed(tmp_path: Path, law: str) -> None:
    """However long a daemon runs: FILE and its older parts, the last of which go."""
    log, draw = tmp_path / "run.jsonl", random.Random(law)
    brain = Brain(BOUNDS, PLANT, law)
    record = Record(log, brain.settings(), {"model": "m"}, most_bytes=4 * 8000)
    for window in range(200):
        if draw.random() < 0.1:
            load = draw.random()
            line, made = {"kind": "urgent", "t": 0.0, "load": load}, brain.urgent(0.0, load)
        else:
            signals = CALM | {
                "t": float(window), "p95_ms": draw.uniform(1, 900), "mean_ms": draw.uniform(1, 900), "load": draw.uniform(-9, 3),
                "temperature": draw.choice([None, 50.0, 90.0]), "cpu_pressure": draw.choice([None, draw.random()]),
            }  # fmt: skip
            line, made = {"kind": "window", "signals": signals}, brain.window(signals)
        record.write({**line, "decisions": made, "knobs": brain.knobs}, brain.state)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 4 * (8000 + 2000)
    record.close()
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == ["run.jsonl", "run.jsonl.1", "run.jsonl.2", "run.jsonl.3"]
    assert all(replay(part) > 0 for part in parts[1:])
    latest = Record(log, brain.settings(), {"model": "m"}, most_bytes=4 * 8000)  # a run to the same file
    latest.close()
    assert replay(log) == 0
    assert parts[1].read_bytes().count(b"decisions") > 0

    spoilt = json.loads(parts[2].read_text().splitlines()[0])
    spoilt["state"]["own"]["_notch"] = "x"
    (tmp_path / "spoilt").write_text(
        "\n".join([json.dumps(spoilt), *parts[2].read_text().splitlines()[1:]]) + "\n"
    )
    with pytest.raises(CorruptError, match="_notch"):
        replay(tmp_path / "spoilt")


def test_a_part_that_cannot_be_written_leaves_the_others_whole(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    brain = Brain(BOUNDS, PLANT)
    record = Record(log, brain.settings(), {}, most_bytes=4)  # each line fills a part
    record.write({"kind": "urgent", "t": 0.0, "load": 1.0}, brain.state)
    before = {part.name: part.read_bytes() for part in tmp_path.iterdir()}
    (tmp_path / "run.jsonl.part").mkdir()
    with pytest.raises(OSError, match="part"):
        record.write({"kind": "urgent", "t": 0.0, "load": 1.0}, brain.state)
    assert {
        part.name: part.read_bytes() for part in tmp_path.iterdir() if part.is_file()
    }.keys() == before.keys()
    assert (tmp_path / "run.jsonl.1").read_bytes() == before["run.jsonl.1"]


def test_what_is_no_file_is_written_to_and_stays_what_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    brain = Brain(BOUNDS, PLANT)
    record = Record(pipe, brain.settings(), {}, most_bytes=4)
    record.write({"kind": "urgent", "t": 0.0, "load": 1.0}, brain.state)
    assert os.read(reader, 1 << 16).count(b"\n") == 2
    assert pipe.is_fifo()
    record.close()
    os.close(reader)
