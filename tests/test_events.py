"""The event-camera side: rates, biases, the law on them, a fake camera, frames, place recognition, the simulator, the CLI."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert import control
from edgert.cli.main import main
from edgert.errors import CorruptError, InvalidArgumentError, NotFoundError, UnsupportedError
from edgert.events import (
    DAVIS346,
    EVENT,
    Biases,
    Corridor,
    FastSlow,
    SimulatedCamera,
    event_frames,
    frames,
    open_source,
    rate_windows,
    run,
    tune,
    vpr,
)
from edgert.events import camera as cameras
from edgert.events.biases import LADDER, Bias, at_level, level, rung
from edgert.events.camera import Reading
from edgert.events.files import save_events
from edgert.events.stream import events_of


def at_times(t: list[int]) -> Any:
    return events_of(np.array(t), np.zeros(len(t)), np.zeros(len(t)), np.ones(len(t), bool))


# --- rates ------------------------------------------------------------------------------------------------------


def test_windows_count_empty_ones_and_leave_the_last_out() -> None:
    chunks = [at_times([0, 100_000]), at_times([299_999, 300_000]), at_times([1_200_000])]
    assert [(w.t, round(w.rate)) for w in rate_windows(chunks)] == [(0.3, 10), (0.6, 3), (0.9, 0), (1.2, 0)]


# --- biases -----------------------------------------------------------------------------------------------------


def test_the_ladder_grows_and_carries_fine_into_coarse() -> None:
    currents = [bias.picoamperes for bias in LADDER]
    assert all(a < b for a, b in pairwise(currents))
    assert LADDER[rung(Bias(6, 255)) + 1] == Bias(5, 32)
    assert all(at_level(level(bias)) == bias for bias in LADDER)
    assert level(Bias(4, 200)) - level(Bias(4, 100)) == pytest.approx(693, abs=1)
    assert all(LADDER[rung(bias)] == bias for bias in (Bias(6, 119), Bias(7, 32), Bias(1, 63), Bias(5, 168)))


def test_the_start_means_what_the_model_says() -> None:
    assert DAVIS346.refractory_s == pytest.approx(20e-15 * 0.8 / (48437e-12 * 25 / 255))
    assert DAVIS346.follower_hz == pytest.approx(67, abs=1)
    assert DAVIS346.theta_on == pytest.approx(0.262, abs=0.002)
    assert DAVIS346.theta_off == pytest.approx(0.262, abs=0.002)


def test_biases_that_no_sensor_has_are_refused() -> None:
    good: dict[str, Any] = dict(DAVIS346.as_dict())
    assert Biases.from_dict(good) == DAVIS346
    several: list[dict[str, Any]] = [
        {"refractory": [8, 0]},
        {"refractory": [0, 256]},
        {"refractory": 3},
        {"speed": [1, 1]},
    ]
    for bad in several:
        with pytest.raises(InvalidArgumentError):
            Biases.from_dict(good | bad)


# --- the law -----------------------------------------------------------------------------------------------------


def test_the_published_law_moves_the_published_biases() -> None:
    law = FastSlow("published")
    for _ in range(2):
        biases = law.step(0.0)
    assert biases.refractory == Bias(3, 57)
    moved = (biases.photoreceptor, biases.follower, biases.on_threshold, biases.off_threshold)
    assert moved == (Bias(6, 124), Bias(7, 37), Bias(1, 58), Bias(5, 173))
    for _ in range(400):  # what runs out of a fine value is cut off, for the sensor has no more
        biases = law.step(0.0)
    assert biases.on_threshold == Bias(1, 0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1e7), max_size=80))
def test_the_repaired_law_carries_and_stays_in_its_reach(rates: list[float]) -> None:
    law, before = FastSlow(reach=500, slow_step=90), DAVIS346
    for rate in rates:
        biases = law.step(rate)
        assert abs(biases.refractory.fine - before.refractory.fine) <= 8
        for name in ("photoreceptor", "follower", "on_threshold", "off_threshold"):
            assert abs(level(getattr(biases, name)) - level(getattr(DAVIS346, name))) <= 520
        before = biases


def test_lost_and_missing_events_never_open() -> None:
    law = FastSlow()
    assert law.step(1.0, quality="at-least") == DAVIS346
    assert law.step(1.0, quality="missing") == DAVIS346
    assert law.step(9e6, quality="at-least").refractory.fine < DAVIS346.refractory.fine


# --- a camera ------------------------------------------------------------------------------------------------------


class FakeCamera:
    """What a driver has to offer; its rate follows the refractory bias."""

    size = (346, 260)

    def __init__(self, fail_at: int | None = None, complete: bool = True) -> None:
        self.now, self._n, self._fail_at, self._complete = DAVIS346, 0, fail_at, complete
        self.set: list[Biases] = []

    def read(self, seconds: float) -> Reading | None:
        self._n += 1
        if self._n == self._fail_at:
            raise OSError("unplugged")
        count = round(self.now.refractory.fine * 1e3 * seconds)
        return Reading(self._n * seconds, np.zeros(count, EVENT), self._complete)

    def biases(self) -> Biases:
        return self.now

    def set_biases(self, biases: Biases) -> None:
        self.now = biases
        self.set.append(biases)

    def close(self) -> None: ...


def test_a_driver_is_found_driven_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    camera = FakeCamera()

    class Point:
        name = "fake"

        def load(self) -> Any:
            return lambda argument: camera if argument == "7" else None

    monkeypatch.setattr(cameras, "entry_points", lambda group: [Point()] if group == cameras.GROUP else [])
    source = open_source("fake:7")
    law = FastSlow(band=(1e4, 2e4))
    shown: list[float] = []
    with control.Record(tmp_path / "run.jsonl", law.law, law.settings) as record:
        assert run(source, law, windows=12, record=record, listen=lambda _, d: shown.append(d["value"])) == 12
    assert 1e4 <= shown[-1] <= 2e4 < shown[0]
    assert camera.now == DAVIS346 and len(camera.set) > 1
    assert control.replay(tmp_path / "run.jsonl") == 12
    with pytest.raises(NotFoundError, match="fake, file, simulated"):
        open_source("none:1")


def test_biases_are_restored_after_a_failure_and_lost_events_do_not_open() -> None:
    camera = FakeCamera(fail_at=4)
    with pytest.raises(OSError, match="unplugged"):
        run(camera, FastSlow(band=(1e4, 2e4)))
    assert len(camera.set) > 1 and camera.now == DAVIS346
    losing = FakeCamera(complete=False)
    run(losing, FastSlow(band=(1e5, 2e5)), windows=5)
    assert losing.set == [DAVIS346]  # only the restoring


# --- frames and place recognition -------------------------------------------------------------------------------------


def test_frames_count_by_polarity_and_the_cut_off_one_is_left_out() -> None:
    events = events_of([0, 10, 70_000, 140_000], [1, 1, 0, 0], [0, 0, 1, 1], [True, False, True, True])
    made = event_frames(events, (2, 2), 0.066)
    assert made.shape == (2, 2, 2, 2)
    assert made[0].tolist() == [[[0, 1], [0, 0]], [[0, 1], [0, 0]]]
    assert made[1].tolist() == [[[0, 0], [0, 0]], [[0, 0], [1, 0]]]
    with pytest.raises(InvalidArgumentError, match="frames"):
        event_frames(at_times([0, 1 << 60]), (1, 1))


def test_frames_of_a_still_camera_and_bursts_are_dropped() -> None:
    many = np.ones((40, 2, 4, 4), np.int32)
    many[7] *= 1000
    metres = np.concatenate([np.arange(20.0), np.full(20, 19.0)])
    kept = frames.kept_frames(many, metres)
    assert not kept[7] and kept[:7].all() and kept[8:20].all() and not kept[21:].any()


def test_descriptors_see_both_polarities_apart() -> None:
    """Where brighter and darker events cancel out, and where there are none, are two things."""
    drawn = np.zeros((2, 2, 64, 64), np.int32)
    drawn[0, :, :32] = 3
    rows = frames.descriptors(drawn)
    assert not np.allclose(rows[0], rows[1])


def test_descriptors_are_of_a_quarter_and_their_patches_alike() -> None:
    drawn = np.random.default_rng(0).integers(0, 5, (3, 2, 64, 64))
    rows = frames.descriptors(drawn)
    assert rows.shape == (3, 256)
    tiles = rows.reshape(3, 2, 8, 2, 8).transpose(0, 1, 3, 2, 4).reshape(12, 64)
    assert np.allclose(tiles.mean(axis=1), 0, atol=1e-5) and np.allclose(tiles.std(axis=1), 1, atol=1e-2)
    assert np.allclose(frames.equalised(np.array([[[3.0, 3.0], [1.0, 9.0]]])), [[[0.5, 0.5], [0.125, 0.875]]])


def test_recall_at_k() -> None:
    distance = np.array([[0.1, 0.2, 0.9], [0.3, 0.1, 0.2]])
    found = vpr.recall(distance, np.array([0.0, 10.0]), np.array([0.0, 5.0, 10.0]), 1.0, (1, 2))
    assert found.at == {1: 0.5, 2: 1.0}
    assert found.chance == pytest.approx(2 / 6)
    with pytest.raises(InvalidArgumentError):
        vpr.recall(distance, np.zeros(3), np.zeros(3))


def test_bootstrap_bounds_hold_the_mean() -> None:
    mean, low, high = vpr.bootstrap(np.array([1.0, 2.0, 3.0, 2.0]))
    assert low < mean == 2.0 < high


def test_a_network_in_place_of_pixels(tmp_path: Path) -> None:
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    entry = helper.make_tensor_value_info("x", kind, ["n", 2, 8, 8])
    out = helper.make_tensor_value_info("y", kind, ["n", 2, 1, 1])
    graph = helper.make_graph([helper.make_node("GlobalAveragePool", ["x"], ["y"])], "g", [entry], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    rows = vpr.network(tmp_path / "net.onnx")(np.ones((3, 2, 8, 8), np.int32))
    assert np.allclose(rows, np.sqrt(0.5))
    (tmp_path / "bad.onnx").write_bytes(b"no")
    with pytest.raises(CorruptError):
        vpr.network(tmp_path / "bad.onnx")


# --- the simulator (everything is simulated) --------------------------------------------------------------------------


def rate(light: float = 1.0, biases: Biases = DAVIS346, speed: float = 2.0) -> float:
    camera = SimulatedCamera(
        Corridor(5, length_m=4, rows=32), light=light, speed_m_per_s=speed, size=(32, 32), biases=biases
    )
    reading = camera.read(0.2)
    assert reading is not None
    return len(reading.events) / 0.2


def test_pixels_behave_as_the_physics_says() -> None:
    assert rate(light=0.02) < 0.6 * rate()  # the dark is slow and faint
    assert rate(speed=2) > 1.5 * rate(speed=1)
    for name, opened in (("photoreceptor", 60), ("on_threshold", -60), ("off_threshold", 60)):
        bias = LADDER[rung(getattr(DAVIS346, name)) + opened]
        assert rate(light=0.02, biases=replace(DAVIS346, **{name: bias})) > 1.02 * rate(light=0.02), name
    wide = replace(DAVIS346, follower=LADDER[rung(DAVIS346.follower) + 60])
    assert rate(biases=wide) > 1.02 * rate()  # in the light the follower is what is slow
    assert 0 < rate(light=0.001, speed=0.0) < 5 * 32 * 32  # noise and leak


def refractory(coarse: int, fine: int) -> Biases:
    return replace(DAVIS346, refractory=Bias(coarse, fine))


def test_the_fast_bias_is_nearly_inert_at_the_cameras_own_coarse_value() -> None:
    """A follower of 67 Hz holds events of a pixel some 300 us apart: 1.5 to 21 us of dead time are short beside that."""
    assert rate(biases=refractory(3, 4)) > 0.98 * rate(biases=refractory(3, 57))
    assert rate(biases=refractory(6, 4)) < 0.7 * rate(biases=refractory(6, 57))


def test_biases_that_ran_out_are_slow_and_not_more() -> None:
    names = ("photoreceptor", "follower", "off_threshold", "refractory")
    empty = replace(DAVIS346, **{n: Bias(getattr(DAVIS346, n).coarse, 0) for n in names})
    assert rate(biases=empty) < 0.1 * rate()


def test_a_dead_pixel_stays_silent_and_then_refers_to_what_it_sees() -> None:
    camera = SimulatedCamera(
        Corridor(5, length_m=4, rows=32), size=(32, 32), speed_m_per_s=2.0, biases=refractory(6, 4)
    )
    reading = camera.read(0.2)
    assert reading is not None
    events = reading.events
    order = np.lexsort((events["t"], events["x"], events["y"]))
    t, pixel = events["t"][order], events["y"][order] * 32 + events["x"][order]
    apart = np.diff(t)[np.diff(pixel) == 0]
    assert (
        len(apart) > 100 and apart.min() >= refractory(6, 4).refractory_s * 1e6 - 1
    )  # of 10.9 ms, over many steps


def test_a_camera_put_down_elsewhere_has_moved_there() -> None:
    """What it sees of a place is what a camera that came all the way sees of it."""
    wall = Corridor(5, length_m=4, rows=32)
    whole = SimulatedCamera(wall, size=(32, 32), speed_m_per_s=1.0, light=0.02)
    assert whole.read(1.0) is not None
    put = SimulatedCamera(wall, size=(32, 32), speed_m_per_s=1.0, light=0.02, stride_m=1.0)
    put.read(0.01)
    assert put.position_m == pytest.approx(1.0) and put.t == pytest.approx(0.01)
    one, other = whole.read(0.2), put.read(0.2)
    assert one is not None and other is not None
    assert len(other.events) == pytest.approx(len(one.events), rel=0.05)


def test_a_slow_change_bursts_and_runs_repeat() -> None:
    def counts(change: bool) -> list[int]:
        camera = SimulatedCamera(Corridor(5, length_m=4, rows=32), size=(32, 32), speed_m_per_s=0.0)
        first = camera.read(0.02)
        if change:
            camera.set_biases(replace(DAVIS346, photoreceptor=LADDER[rung(DAVIS346.photoreceptor) + 5]))
        second = camera.read(0.02)
        assert first is not None and second is not None
        return [len(first.events), len(second.events)]

    assert counts(True) == counts(True)
    assert counts(True)[1] > counts(False)[1] + 5


# --- the command line --------------------------------------------------------------------------------------------------


def test_simulate_vpr_run_replay_and_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    day, dusk = tmp_path / "day.aedat4", tmp_path / "dusk.es"
    for out, light, noise in ((day, "1", "0"), (dusk, "0.1", "1")):
        assert (
            main(
                [
                    "events",
                    "simulate",
                    str(out),
                    "--seconds",
                    "0.8",
                    "--light",
                    light,
                    "--noise",
                    noise,
                    "--json",
                ]
            )
            == 0
        )
        assert json.loads(capsys.readouterr().out)["simulated"]
    page = tmp_path / "matrix.html"
    assert main(["events", "vpr", str(day), str(dusk), "--json", "--plot", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"][0]["recall"]["1"] > 0.9
    assert "<svg" in page.read_text()
    record, plot = tmp_path / "run.jsonl", tmp_path / "run.html"
    arguments = ["events", "run", str(day), "--window", "0.1", "--record", str(record), "--plot", str(plot)]
    assert main(arguments) == 0
    assert "7 windows" in capsys.readouterr().out
    assert main(["events", "replay", str(record), "--plot", str(plot)]) == 0
    assert "7 decisions" in capsys.readouterr().out
    assert main(["events", "tune", str(day), "--window", "0.2", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["band"][0] < tuned["rate"] < tuned["band"][1] and "response" not in tuned
    assert main(["events", "tune", "simulated:3", "--window", "0.03", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert len(tuned["response"]) == 5
    least, change, most = tuned["change"]
    assert least < change < most
    assert tuned["authority"] in ("inert", "unclear") and tuned["slew"] is None


def test_tuning_tells_an_inert_bias_from_a_scene_that_changes() -> None:
    scene = np.random.default_rng(0)

    class Tuned(FakeCamera):
        def __init__(self, gain: float, spread: float) -> None:
            super().__init__()
            self._gain, self._spread = gain, spread

        def read(self, seconds: float) -> Reading | None:
            share = (self.now.refractory.fine - 4) / 53
            rate = 1e4 * (1 + self._gain * share) * float(np.exp(scene.normal(0, self._spread)))
            return Reading(0.0, np.zeros(round(rate * seconds), EVENT))

    def authority(gain: float, spread: float) -> str:
        return tune.fast_response(Tuned(gain, spread), DAVIS346, 1.0).authority

    assert authority(0.01, 0.02) == "inert"
    assert authority(0.8, 0.1) == "some"
    assert authority(0.01, 0.6) == "unclear"
    short = Corridor(5, length_m=2, rows=32)
    cut = tune.fast_response(SimulatedCamera(short, size=(32, 32)), DAVIS346, 0.1)
    assert cut.rates == {} and cut.authority == "unclear"
    steep = tune.fast_response(Tuned(1.0, 0.0), DAVIS346, 1.0)
    assert steep.rates[57] == pytest.approx(2e4) and steep.steepest == pytest.approx(1e4 / 53, rel=0.01)


def test_what_the_command_cannot_do_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_events(tmp_path / "a.es", at_times(list(range(0, 500_000, 1000))), (4, 4))
    cases = {
        "none:1": ["events", "run", "none:1"],
        "no such file": ["events", "run", str(tmp_path / "missing.es")],
        "--length": ["events", "vpr", str(tmp_path / "a.es"), str(tmp_path / "a.es")],
        "--window": ["events", "run", str(tmp_path / "a.es"), "--window", "0"],
        "--windows": ["events", "run", "simulated:3", "--windows", "0"],
        "number of a world": ["events", "run", "simulated:x"],
        "as in simulated:3": ["events", "tune", "simulated:-3"],
        "--slew": ["events", "run", "simulated:3", "--slew", "-5"],
        "--light": ["events", "simulate", str(tmp_path / "b.es"), "--light", "nan"],
        "--speed": ["events", "simulate", str(tmp_path / "b.es"), "--speed", "-1"],
        "--seconds": ["events", "simulate", str(tmp_path / "b.es"), "--seconds", "inf"],
        "--world": ["events", "simulate", str(tmp_path / "b.es"), "--world", "-1"],
        "--noise": ["events", "simulate", str(tmp_path / "b.es"), "--noise", "-1"],
        "--metres": ["events", "vpr", "a.es", "a.es", "--metres", "nan"],
    }
    for said, arguments in cases.items():
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert said.split(":", 1)[0] in error and "internal" not in error
    assert not (tmp_path / "b.es").exists()
    with pytest.raises(UnsupportedError):
        cameras.FileSource(tmp_path / "a.es").set_biases(DAVIS346)
