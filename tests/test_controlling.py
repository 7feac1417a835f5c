"""The control loop: its guards whatever the signals say, a model under it on a machine that changes, and its records."""

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from daemons import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import GIB, FakeMachine
from shell import Shell

import edgert
from edgert.controlling import Bounds, Control, bounds_from, replay
from edgert.controlling.brain import LOSSY_KNOBS, NOTCHES, Brain, Plant
from edgert.controlling.record import Record
from edgert.controlling.trial import ThreadTrial
from edgert.devices import device_names, load_device
from edgert.errors import CorruptError, InvalidArgumentError, NotFoundError
from edgert.signals import Sensors

BOUNDS = Bounds(50, 250, 60, 75, 1 << 30, save_power="on-battery", window_ms=250)
PLANT = Plant(threads=4, least_bytes=100, most_bytes=1700)
CALM: dict[str, Any] = {
    "t": 0.0, "tokens": 10, "mean_ms": 100.0, "p50_ms": 100.0, "p95_ms": 120.0, "load": -1.0, "load_quality": "exact",
    "temperature": 65.0, "temperature_quality": "exact", "headroom": 15.0, "cores": 4, "on_battery": 0.0, "charge": 1.0,
    "cpu_pressure": 0.0, "memory_pressure": 0.0,
}  # fmt: skip


def after(brain: Brain, windows: int = 1, **signals: Any) -> dict[str, Any]:
    for _ in range(windows):
        brain.window({**CALM, **signals})
    return brain.knobs


# --- guards -----------------------------------------------------------------------------------------


def test_nothing_moves_while_all_is_well() -> None:
    brain = Brain(BOUNDS, PLANT)
    start = brain.knobs
    assert start == {"expert_memory": 1700, "threads": 4, "token_interval_ms": 0}
    settled = after(brain, 10)  # the trial of threads is over
    assert all(after(brain) == settled == start for _ in range(100))


def test_memory_that_is_lacking_goes_at_once_and_comes_back_slowly() -> None:
    brain = Brain(BOUNDS, PLANT)
    brain.urgent(0.0, 3.2)
    assert brain.knobs["expert_memory"] == 1700 - 4 * 100
    assert after(brain, load=1.0)["expert_memory"] == 1700 - 5 * 100  # at a window too
    grown = [after(brain, load=-4.0)["expert_memory"] for _ in range(60)]
    assert max(b - a for a, b in pairwise(grown)) == 100
    assert grown[3:5] == [1200, 1300]  # patience
    assert grown[-1] == 1700
    brain.urgent(0.0, 8.0)
    assert after(brain, 5, load=-8.0)["expert_memory"] == 900 + 300  # half of what is free beyond the band
    brain.urgent(0.0, 1e9)
    assert brain.knobs["expert_memory"] == 100


def test_pressure_shrinks_the_store_though_memory_is_said_to_be_there() -> None:
    brain = Brain(BOUNDS, PLANT)
    assert after(brain, memory_pressure=0.5)["expert_memory"] == 1600
    assert after(brain, memory_pressure=0.5, load=None, load_quality="missing")["expert_memory"] == 1500


def test_heat_takes_threads_and_then_time_and_gives_them_back() -> None:
    brain = Brain(BOUNDS, PLANT)
    hot = [after(brain, temperature=78.0) for _ in range(60)]
    assert [knobs["threads"] for knobs in hot][-1] == 1
    assert hot[-1]["token_interval_ms"] == pytest.approx(100 * 1.25**8)
    assert all(a["token_interval_ms"] <= b["token_interval_ms"] for a, b in pairwise(hot))
    cool = [after(brain, temperature=55.0) for _ in range(60)]
    assert (cool[-1]["threads"], cool[-1]["token_interval_ms"]) == (4, 0)
    assert brain.effort == brain._top


def test_a_trip_point_that_is_near_acts_before_the_band_does() -> None:
    brain = Brain(BOUNDS, PLANT)
    before = brain.effort
    after(brain, headroom=0.5)
    assert brain.effort < before


def test_speed_beyond_the_need_is_given_up_on_battery_only() -> None:
    brain = Brain(BOUNDS, PLANT)
    fast = {"p95_ms": 10.0, "mean_ms": 9.0}
    after(brain, 40, **fast)
    assert brain.knobs["token_interval_ms"] == 0
    after(brain, 40, **fast, on_battery=1.0)
    saved = brain.knobs["token_interval_ms"]
    assert BOUNDS.token_time_low_ms <= saved <= BOUNDS.token_time_high_ms
    assert after(brain, 5, **fast, on_battery=None)["token_interval_ms"] >= saved  # silent is not plugged in


def test_a_battery_that_is_low_leaves_one_thread_until_it_is_known_to_charge() -> None:
    brain = Brain(BOUNDS, PLANT)
    assert after(brain, 4, on_battery=1.0, charge=0.1)["threads"] == 1
    after(brain, 40, on_battery=1.0, charge=None)
    after(brain, 40, on_battery=None, charge=None)
    assert brain.effort < brain._top
    after(brain, 2, on_battery=0.0, charge=0.1)
    assert brain.effort == brain._top


def test_quality_is_given_up_only_where_that_is_allowed_and_comes_back_first() -> None:
    strict, allowed = Brain(BOUNDS, PLANT), Brain(Bounds(**{**vars_of(BOUNDS), "allow_lossy": True}), PLANT)
    assert not set(LOSSY_KNOBS) & set(after(strict, 50, p95_ms=900.0))
    lossy = after(allowed, 50, p95_ms=900.0)
    assert lossy["low_precision_misses"] > 0
    assert lossy["skip_absent_experts"] == 0  # what costs more waits for what costs less
    assert after(allowed, 400, p95_ms=900.0)["skip_absent_experts"] > 0
    assert after(allowed, 5, tokens=0, p95_ms=None, mean_ms=None) == allowed.knobs
    calm = after(allowed, 400, p95_ms=100.0)
    assert (calm["low_precision_misses"], calm["skip_absent_experts"]) == (0, 0)


def vars_of(bounds: Bounds) -> dict[str, Any]:
    return {name: getattr(bounds, name) for name in bounds.__dataclass_fields__}


NUMBER = st.none() | st.floats(-1e9, 1e9)
SIGNALS = st.fixed_dictionaries(
    {
        "t": st.just(0.0), "tokens": st.integers(0, 50), "mean_ms": NUMBER, "p50_ms": NUMBER, "p95_ms": NUMBER,
        "load": NUMBER, "load_quality": st.sampled_from(["exact", "at-least", "missing"]), "temperature": NUMBER,
        "temperature_quality": st.sampled_from(["exact", "at-least", "missing"]), "headroom": NUMBER,
        "cores": st.integers(1, 9), "on_battery": st.sampled_from([None, 0.0, 1.0]), "charge": NUMBER,
        "cpu_pressure": NUMBER, "memory_pressure": NUMBER,
    }
)  # fmt: skip
NOTHING = {
    name: None for name in CALM if name not in ("t", "tokens", "cores", "load_quality", "temperature_quality")
} | {"t": 0.0, "tokens": 0, "cores": 4, "load_quality": "missing", "temperature_quality": "missing"}


@settings(deadline=None, max_examples=60)
@given(st.lists(SIGNALS, max_size=25), st.booleans())
def test_knobs_stay_in_their_ranges_and_nothing_loosens_without_signals(
    windows: list[dict[str, Any]], lossy: bool
) -> None:
    brain = Brain(Bounds(**{**vars_of(BOUNDS), "allow_lossy": lossy}), PLANT)
    for signals in windows:
        brain.window(signals)
        knobs = brain.knobs
        assert PLANT.least_bytes <= knobs["expert_memory"] <= PLANT.most_bytes
        assert 1 <= knobs["threads"] <= min(PLANT.threads, signals["cores"])
        assert 0 <= knobs["token_interval_ms"] <= 1e9 * 1.25**8
        assert all(0 <= knobs.get(name, 0) <= 0.5 for name in LOSSY_KNOBS)
    before, effort = brain.knobs, brain.effort
    brain.window(NOTHING)
    assert brain.knobs["expert_memory"] <= before["expert_memory"]
    assert brain.effort <= effort
    assert all(brain.knobs.get(name, 0) <= before.get(name, 0) for name in LOSSY_KNOBS)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_what_is_known_only_as_a_lower_bound_never_loosens(values: list[float]) -> None:
    brain = Brain(BOUNDS, PLANT)
    brain.urgent(0.0, 4.0)
    after(brain, 20, temperature=90.0)
    for value in values:
        before, effort = brain.knobs["expert_memory"], brain.effort
        after(brain, load=value, load_quality="at-least", temperature=value, temperature_quality="at-least")
        assert brain.knobs["expert_memory"] <= before
        assert brain.effort <= effort


@pytest.mark.parametrize("law", ["aimd", "pi"])
def test_a_baseline_does_not_slow_down_what_need_not_save_power(law: str) -> None:
    brain = Brain(BOUNDS, PLANT, law)
    after(brain, 40, p95_ms=5.0, mean_ms=5.0)
    assert brain._speed == brain._top
    after(brain, 40, p95_ms=5.0, mean_ms=5.0, on_battery=1.0)
    assert brain._speed < brain._top


# --- threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [1, 2, 3, 8])
def test_the_number_of_threads_that_is_fastest_is_found_and_found_again(best: int) -> None:
    trial, threads, used = ThreadTrial(8), 8, []
    for window in range(400):
        optimum = best if window < 200 else 9 - best
        load = 0.0 if window < 200 else 0.9
        threads = trial.window(20, 10 + 5 * abs(threads - optimum), load, 8)
        used.append(threads)
    assert used[150:199].count(best) >= 47
    assert used[-45:].count(9 - best) >= 43


@pytest.mark.parametrize("lost_at", range(2, 12))
def test_cores_that_go_in_the_middle_of_a_trial_leave_a_thread(lost_at: int) -> None:
    trial, threads = ThreadTrial(2), 2
    for window in range(30):
        most = 2 if window < lost_at else 1
        threads = trial.window(20, 10.0 + 5 * threads, None, most)
        assert 1 <= threads <= most


def test_no_thread_is_tried_beyond_the_cores_that_are_left() -> None:
    trial = ThreadTrial(8)
    assert all(trial.window(20, 10.0, None, 3) <= 3 for _ in range(600))


# --- a model under control --------------------------------------------------------------------------


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


# --- the command line -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", device_names())
def test_every_device_has_bounds_that_can_be_kept(name: str) -> None:
    bounds = bounds_from(load_device(name), {})
    assert bounds.temperature_high_celsius < load_device(name).thermal.throttle_celsius
    Brain(bounds, PLANT)


def test_stated_bounds_go_first() -> None:
    device = load_device("phone")
    bounds = bounds_from(device, {"token_time_high_ms": 40.0, "memory_reserve": 1 << 20, "save_power": None})
    assert (bounds.token_time_low_ms, bounds.memory_reserve_bytes, bounds.save_power) == (
        20,
        1 << 20,
        "on-battery",
    )
    with pytest.raises(InvalidArgumentError, match="temperature_low_celsius"):
        bounds_from(device, {"temperature_low_celsius": 80.0})
