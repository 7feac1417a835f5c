"""What the control loop decides: its guards whatever the signals say, and how many threads are fastest."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from control_cases import BOUNDS, CALM, PLANT
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.controlling import Bounds, bounds_from
from edgert.controlling.brain import LOSSY_KNOBS, Brain
from edgert.controlling.trial import ThreadTrial
from edgert.devices import device_names, load_device
from edgert.errors import InvalidArgumentError


def after(brain: Brain, windows: int = 1, **signals: Any) -> dict[str, Any]:
    for _ in range(windows):
        brain.window({**CALM, **signals})
    return brain.knobs


# --- guards ------------------------------------------------------------------------------------------


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


def test_a_mode_that_has_nothing_to_work_on_is_left_out() -> None:
    whole = replace(PLANT, splits_experts=False)
    brain = Brain(Bounds(**{**vars_of(BOUNDS), "allow_lossy": True}), whole)
    lossy = after(brain, 50, p95_ms=900.0)
    assert lossy["skip_absent_experts"] > 0 and "low_precision_misses" not in lossy


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


# --- bounds ------------------------------------------------------------------------------------------


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


# --- threads -----------------------------------------------------------------------------------------


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
