"""A model under the control loop on a machine that changes, and the command line of it."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from daemons import wait_until
from machines import GIB, FakeMachine
from shell import Shell

import edgert
from edgert.controlling import Control, bounds_from, replay
from edgert.controlling.brain import NOTCHES
from edgert.devices import load_device
from edgert.errors import CorruptError, NotFoundError
from edgert.signals import Sensors


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path / "root")


@pytest.fixture
def model() -> Iterator[edgert.Model]:
    with edgert.load(memory="12MiB", threads=2, context=256) as loaded:
        yield loaded


def hold(
    model: edgert.Model,
    machine: FakeMachine,
    log: Path | None = None,
    log_bytes: int = 1 << 20,
    **bounds: Any,
) -> tuple[Control, Clock]:
    clock = Clock()
    stated = bounds_from(load_device("raspberry-pi-5"), {"control_window_ms": 100, **bounds})
    return Control(
        model, stated, log=log, log_bytes=log_bytes, sensors=Sensors(machine.root, clock), clock=clock
    ), clock


def run(control: Control, clock: Clock, windows: int) -> None:
    for _ in range(windows):
        clock.now += 0.11
        control.tick()


def test_a_competitor_takes_the_store_down_and_its_end_brings_it_back(
    model: edgert.Model, machine: FakeMachine
) -> None:
    expected = model.generate("A file", max_tokens=20).tokens
    control, clock = hold(model, machine)
    full, least = model.knobs()["expert_memory"], model.native.least_expert_bytes
    notch = (full - least) // NOTCHES
    sizes = []
    for left in range(12, -1, -2):  # MiB below the limit, of which 26 are to be left
        machine.group("box", 260 << 20, (260 - 26 << 20) + 3 * notch - (left << 20))
        clock.now += 0.01
        control.tick()  # between two windows
        sizes.append(model.knobs()["expert_memory"])
        assert model.generate("A file", max_tokens=20).tokens == expected
    assert sizes[-1] < full
    machine.group("box", 260 << 20, 259 << 20)
    clock.now += 0.01
    control.tick()
    assert model.knobs()["expert_memory"] == full - NOTCHES * notch
    assert model.stats()["slot_bytes"] <= model.knobs()["expert_memory"]
    machine.group("box", 4 * GIB, GIB)
    run(control, clock, 80)
    assert model.knobs()["expert_memory"] == full
    control.stop()


def test_models_of_one_process_share_what_is_lacking(model: edgert.Model, machine: FakeMachine) -> None:
    """Each gives its part; a second one that nobody controls gives nothing."""
    stated = bounds_from(load_device("raspberry-pi-5"), {"control_window_ms": 60_000})
    machine.group("box", 260 << 20, 200 << 20)  # 26 MiB are to be left
    with edgert.load(memory="12MiB", threads=2, context=256) as other:
        with ExitStack() as running:
            controls = [
                running.enter_context(Control.start(one, stated, sensors=Sensors(machine.root)))
                for one in (model, other)
            ]
            full = model.knobs()["expert_memory"]
            notch = (full - model.native.least_expert_bytes) // NOTCHES
            machine.group("box", 260 << 20, (260 - 26 << 20) + 3 * notch)  # 3 are lacking
            wait_until(lambda: all(control.state().get("load", 0) > 0 for control in controls))
            machine.group("box", 260 << 20, 200 << 20)
            loads = [control.state()["load"] for control in controls]
            assert loads == [pytest.approx(1.5, rel=0.01)] * 2
        machine.group("box", 260 << 20, (260 - 26 << 20) + 3 * notch)
        with Control.start(model, stated, sensors=Sensors(machine.root)) as control:
            wait_until(lambda: control.state().get("load", 0) > 0)
            assert control.state()["load"] == pytest.approx(3, rel=0.01)


def test_heat_slows_a_model_down_without_changing_what_it_says(
    model: edgert.Model, machine: FakeMachine
) -> None:
    expected = model.generate("A file", max_tokens=8).tokens
    control, clock = hold(model, machine)
    for celsius in range(60, 90):
        machine.temperature(0, celsius)
        model.generate("A file", max_tokens=4)
        run(control, clock, 1)
    knobs = model.knobs()
    assert knobs["threads"] == 1
    assert knobs["token_interval_ms"] > 0
    assert model.generate("A file", max_tokens=8).tokens == expected
    effort = control._brain.effort
    machine.remove("sys/class/thermal")  # vanished while hot: nothing is loosened
    for sensor in control._sensors.temperatures.sensors:
        sensor.file.close()
    run(control, clock, 60)
    assert control._brain.effort <= effort
    control.stop()
    assert model.knobs()["token_interval_ms"] == 0  # as before


def test_the_thread_itself_and_its_record(model: edgert.Model, machine: FakeMachine, tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    stated = bounds_from(load_device("laptop"), {"control_window_ms": 50})
    with Control.start(model, stated, log=log, sensors=Sensors(machine.root)) as control:
        while control.windows < 5:
            model.generate("A file", max_tokens=30, ignore_eos=True)
        machine.group("box", 4 * GIB, 4 * GIB)
        while model.knobs()["expert_memory"] > control.state()["settings"]["plant"]["least_bytes"] + NOTCHES:
            time.sleep(0.01)
    control.stop()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert replay(log) == len(lines) - 1 >= 6
    assert sum(lines[1]["resident"]) > 0
    assert "safety" in {line["decisions"]["memory"]["reason"] for line in lines[1:]}

    def spoil(number: int, edit: Any) -> Path:
        copy = json.loads(json.dumps(lines))
        edit(copy[number])
        file = tmp_path / "spoilt.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in copy))
        return file

    with pytest.raises(CorruptError, match="line 3: knobs"):
        replay(spoil(2, lambda line: line["knobs"].update(threads=7)))
    with pytest.raises(CorruptError, match="line 4: not a line"):
        replay(spoil(3, lambda line: line.pop("signals", None) or line.pop("load")))
    with pytest.raises(CorruptError, match="line 1: not the head"):
        replay(spoil(0, lambda line: line.update(version=9)))
    with pytest.raises(NotFoundError):
        replay(tmp_path / "none.jsonl")


def test_a_disk_that_is_full_ends_the_record_and_not_the_control(
    model: edgert.Model, machine: FakeMachine, tmp_path: Path
) -> None:
    control, clock = hold(model, machine, tmp_path / "run.jsonl", log_bytes=4)
    run(control, clock, 1)
    (tmp_path / "run.jsonl.part").mkdir()
    run(control, clock, 3)
    assert control.windows == 4
    assert "run.jsonl.part" in control.state()["record_error"]
    control.stop()


# --- the command line --------------------------------------------------------------------------------


def test_a_run_under_control_says_the_same_and_can_be_replayed(edgert: Shell, tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    plain = edgert("run", "-p", "A file", "--max-tokens", "30", "--memory", "12MiB")
    held = edgert(
        "run", "-p", "A file", "--max-tokens", "30", "--memory", "12MiB", "--control", "auto", "--control-log", log,
        "--control-window-ms", "20",
    )  # fmt: skip
    assert held.stdout == plain.stdout
    assert "all the same" in edgert("control", "replay", log).stdout


def test_flags_that_do_not_go_together(edgert: Shell, tmp_path: Path) -> None:
    assert "--control auto" in edgert("run", "-p", "x", "--control-log", tmp_path / "x").stderr
    assert "--exact" in edgert("run", "-p", "x", "--control", "auto", "--allow-lossy", "--exact").stderr
    low = edgert("run", "-p", "x", "--control", "auto", "--token-time-low-ms", "9e5").stderr
    assert "token_time_low_ms" in low
