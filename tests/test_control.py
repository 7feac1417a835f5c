"""The fast/slow law: as published, step for step; repaired, its promises on any signal."""

import json
import math
from collections.abc import Callable

import pytest
from control_cases import CAMERA, Decision, Settings
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert._native import Controller
from edgert.errors import InvalidArgumentError

# --- as published ------------------------------------------------------------------------------------


def published(rates: list[float]) -> list[tuple[int, list[int]]]:
    """The law as its authors state it, written out once more."""
    low, high, patience, step = 5e5, 2.5e6, 2, 5
    up = down = 0
    slow, places = [119, 63], []
    for rate in rates:
        u = min(max(int(57 - 53 * (rate - low) / (high - low)), 4), 57)
        if u == 57:
            up += 1
            if up == patience:
                up, slow = 0, [slow[0] + step, slow[1] - step]
        elif u == 4:
            down += 1
            if down == patience:
                down, slow = 0, [slow[0] - step, slow[1] + step]
        else:
            up = down = 0
        places.append((u, slow))
    return places


@settings(deadline=None)
@given(st.lists(st.floats(0, 4e6) | st.sampled_from([0.0, 1e5, 5e5, 2.5e6, 1e8]), max_size=60))
def test_the_published_law_step_for_step(rates: list[float]) -> None:
    law = Controller("published", **CAMERA)
    assert [(d["fast"], d["slow"]) for d in map(law.step, rates)] == published(rates)


def test_the_published_laws_known_gaps_are_kept_and_repaired_in_the_other() -> None:
    rails = [0.0, 1e7, 0.0, 1e7]  # rail to rail: neither counter is cleared by the other's rail
    assert [d["action"] for d in decide("published", rails)][-1] == "slow"
    assert all(d["action"] != "slow" for d in decide("fast-slow", rails))
    dark = [0.0] * 400  # the slow knobs have no ends
    assert decide("published", dark)[-1]["slow"][1] < 0
    assert decide("fast-slow", dark)[-1]["slow"][1] == 0


# --- promises, whatever the signal does --------------------------------------------------------------


def decide(kind: str, values: list[float], given: Settings = CAMERA) -> list[Decision]:
    law = Controller(kind, **given)
    return [law.step(value, float(i)) for i, value in enumerate(values)]


@st.composite
def laws(draw: st.DrawFn) -> Settings:
    def knob(name: str, least_step: int) -> Settings:
        low = draw(st.integers(-20, 20))
        high = low + draw(st.integers(0, 30))
        step = draw(st.integers(least_step, 9)) * draw(st.sampled_from([-1, 1]))
        return {
            "name": name,
            "minimum": low,
            "maximum": high,
            "start": draw(st.integers(low, high)),
            "step": step,
        }

    blanking = draw(st.integers(0, 3))
    return {
        "low": -1.0,
        "high": 1.0,
        "fast": knob("fast", 1),
        "slow": [
            knob(f"slow {i}", 1) | {"stage": draw(st.integers(0, 1))} for i in range(draw(st.integers(0, 3)))
        ],
        "patience": draw(st.integers(1, 4)),
        "blanking": blanking,
        "dwell": blanking + draw(st.integers(0, 5)),
        "relief": draw(st.integers(0, 15)),
        "slow_gain": draw(st.sampled_from([0.0, 0.5, 4.0, 1e9])),
        "lead": draw(st.sampled_from([0.0, 1.0, 5.0])),
        "max_age": 2.0,
    }


values = st.sampled_from([-3.0, -1.01, -0.9, 0.0, 0.9, 1.01, 3.0, math.nan, math.inf]) | st.floats(-4, 4)
windows = st.fixed_dictionaries(
    {
        "value": values,
        "age": st.sampled_from([0.0, 0.0, 0.0, 1.0, 3.0]),
        "quality": st.sampled_from(["exact"] * 6 + ["at-least", "missing"]),
        "urgent": st.sampled_from([False] * 12 + [True]),
    }
)
calm = st.fixed_dictionaries(
    {"value": values, "age": st.just(0.0), "quality": st.just("exact"), "urgent": st.just(False)}
)
# Long stretches of one signal reach what single windows do not.
signals = st.lists(st.tuples(windows | calm, st.integers(1, 8)), max_size=25).map(
    lambda stretches: [window for window, times in stretches for _ in range(times)]
)


def opened(law: Settings, before: Decision, after: Decision) -> int:
    """How many knobs stand further open than before, less those that are tighter."""
    knobs = [law["fast"], *law["slow"]]
    places = zip(knobs, [before["fast"], *before["slow"]], [after["fast"], *after["slow"]], strict=True)
    return sum(((b - a) * knob["step"] > 0) - ((b - a) * knob["step"] < 0) for knob, a, b in places)


def steps_moved(law: Settings, before: Decision, after: Decision) -> float:
    """Of the slow knob that moved the most."""
    places = zip(law["slow"], before["slow"], after["slow"], strict=True)
    return max(float(abs(b - a) / abs(knob["step"])) for knob, a, b in places)


def most_steps(law: Settings, window: Settings, made: Decision) -> float:
    """One, or with a gain as many as the signal is far from the band."""
    beyond = max(law["low"] - window["value"], window["value"] - law["high"])
    return float(max(1, law["slow_gain"] * beyond)) if made["reason"] == "rail" else 1


@settings(max_examples=150, deadline=None)
@given(laws(), signals)
def test_promises(law: Settings, signal: list[Settings]) -> None:
    controller = Controller("fast-slow", **law)
    before: Decision = {
        "fast": law["fast"]["start"],
        "slow": [knob["start"] for knob in law["slow"]],
        "reversals": 0,
    }
    history: list[tuple[Decision, Settings]] = []  # how the knobs stood, and the window then
    last_slow = -(10**9)
    for i, window in enumerate(signal):
        made = controller.step(**window)
        history.append((before, window))
        for knob, place in zip(
            [law["fast"], *law["slow"]], [made["fast"], *made["slow"]], strict=True
        ):  # inside the limits
            assert knob["minimum"] <= place <= knob["maximum"]
        assert abs(made["fast"] - before["fast"]) <= abs(law["fast"]["step"])  # slew
        if made["slow"] != before["slow"]:
            assert made["action"] == "slow"
            if made["reason"] != "safety":
                assert i - last_slow >= law["dwell"]
                assert made["reason"] in ("rail", "hunting")
                if made["reason"] == "rail":
                    assert i + 1 >= law["patience"]
                    assert all(
                        at_rail_outside(law, *past, made["direction"]) for past in history[-law["patience"] :]
                    )
            else:
                assert window["urgent"]
            assert steps_moved(law, before, made) <= most_steps(law, window, made)
            last_slow = i
        stale = window["age"] > law["max_age"] or not math.isfinite(window["value"])
        if window["quality"] != "exact" or stale:  # missing data never loosens
            assert opened(law, before, made) <= 0
            if (window["quality"] == "missing" or stale) and not window["urgent"]:
                assert (made["fast"], made["slow"]) == (before["fast"], before["slow"])
        before = made


def at_rail_outside(law: Settings, knobs: Decision, window: Settings, direction: int) -> bool:
    fast = law["fast"]
    rail = fast["maximum"] if direction * fast["step"] > 0 else fast["minimum"]
    outside = window["value"] < law["low"] if direction > 0 else window["value"] > law["high"]
    return bool(knobs["fast"] == rail and outside and not window["urgent"])


@settings(max_examples=80, deadline=None)
@given(laws(), signals, st.floats(-1, 1))
def test_nothing_moves_in_the_band_at_constant_input(
    law: Settings, past: list[Settings], value: float
) -> None:
    fresh = Controller("fast-slow", **law)
    assert all(fresh.step(value)["action"] == "hold" for _ in range(30))
    used = Controller("fast-slow", **law)
    for window in past:
        used.step(**window)
    for _ in range(law["patience"] + law["blanking"] + law["relief"] + 3):  # what was under way ends
        used.step(value)
    assert all(used.step(value)["action"] == "hold" for _ in range(30))


@settings(max_examples=30, deadline=None)
@given(laws(), signals, st.sampled_from(["fast-slow", "fixed", "aimd", "pi"]))
def test_decisions_follow_from_settings_and_signals(law: Settings, signal: list[Settings], kind: str) -> None:
    one, other = Controller(kind, **law), Controller(kind, **law)
    assert repr([one.step(**w) for w in signal]) == repr([other.step(**w) for w in signal])


@settings(max_examples=60, deadline=None)
@given(laws(), signals, signals, st.sampled_from(["fast-slow", "fixed", "aimd", "pi"]))
def test_a_state_goes_on_as_it_would_have(
    law: Settings, past: list[Settings], future: list[Settings], kind: str
) -> None:
    one, other = Controller(kind, **law), Controller(kind, **law)
    for window in past:
        one.step(**window)
    other.restore(json.loads(json.dumps(one.state())))
    assert repr([one.step(**w) for w in future]) == repr([other.step(**w) for w in future])


@pytest.mark.parametrize(
    "spoil", [lambda s: s[:-1], lambda s: [*s, 0.0], lambda s: [math.nan, *s[1:]], lambda s: [0.5, *s[1:]]]
)
def test_numbers_that_are_no_state_are_refused(spoil: Callable[[list[float]], list[float]]) -> None:
    law = Controller("fast-slow", **CAMERA)
    with pytest.raises(InvalidArgumentError, match="state"):
        law.restore(spoil(law.state()))


def test_safety_needs_no_patience_and_ignores_a_dwell() -> None:
    law = Controller("fast-slow", **CAMERA)
    for photoreceptor in (114, 109, 104):
        made = law.step(1e6, urgent=True)
        assert (made["action"], made["reason"], made["slow"][0]) == ("slow", "safety", photoreceptor)


def test_a_slow_move_is_as_long_as_the_signal_is_far_where_that_is_wanted() -> None:
    store = {"name": "store", "minimum": 0, "maximum": 16, "start": 0, "step": 1}
    fast = {"name": "none", "minimum": 0, "maximum": 0, "start": 0, "step": 1}
    law = Controller(
        "fast-slow", low=-1.5, high=0, fast=fast, slow=[store], patience=1, blanking=0, dwell=0, slow_gain=0.5
    )
    free, places = 12.0, list[int]()  # what the store takes is free no more
    for _ in range(8):
        before = places[-1] if places else 0
        places.append(law.step(before - free)["slow"][0])
    assert places == [5, 7, 8, 9, 10, 11, 11, 11]


def test_slow_knobs_move_by_stage_and_come_back_in_reverse() -> None:
    stages = [
        {"name": "slots", "minimum": 0, "maximum": 2, "start": 2, "step": 1, "stage": 0},
        {"name": "precision", "minimum": 3, "maximum": 4, "start": 4, "step": 1, "stage": 1},
    ]
    fast = {"name": "depth", "minimum": 0, "maximum": 0, "start": 0, "step": 1}
    law = Controller("fast-slow", low=0, high=1, fast=fast, slow=stages, patience=1, blanking=0, dwell=0)
    moves = [law.step(value)["slow"] for value in [2, 2, 2, 2, -1, -1, -1]]
    assert moves == [[1, 4], [0, 4], [0, 3], [0, 3], [0, 4], [1, 4], [2, 4]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"high": 1.0}, "high"),
        ({"patience": 0}, "patience"),
        ({"dwell": 0}, "dwell"),
        ({"lead": math.nan}, "lead"),
        ({"fast": CAMERA["fast"] | {"start": 99}}, "fast.start"),
        ({"fast": CAMERA["fast"] | {"step": 0}}, "fast.step"),
        ({"speed": 1}, "speed"),
        ({"low": "x"}, "low"),
    ],
)
def test_settings_are_refused_by_field(change: Settings, named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        Controller("fast-slow", **(CAMERA | change))
