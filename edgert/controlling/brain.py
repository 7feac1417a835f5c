"""From the signals of a window to the knobs: laws for memory, heat, speed and quality, and the trial of threads.

No clock, no file, no model: what is decided follows from the settings and the windows so far alone, so that a record can be
replayed bit for bit. Missing signals never loosen a bound.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgert._native import Controller
from edgert.controlling.bounds import Bounds
from edgert.controlling.trial import ThreadTrial

NOTCHES = 16  # of the store, from the least to all that it was given
_PACES = 8  # rungs below one thread
_SLOWER = 1.25  # each of them, times the time from token to token
_CHANGED = 1.25  # of a token's time, for the rungs to follow
_LOSSY_NOTCHES = 8
LOSSY_KNOBS = (
    "low_precision_misses",
    "skip_absent_experts",
)  # what costs least first, which needs split experts
_MOST_LOSSY = {"low_precision_misses": 0.5, "skip_absent_experts": 0.15}
_TIGHT_PRESSURE = 0.2  # share of time that tasks wait for memory, from which on the store shrinks
_INERT = {"name": "none", "minimum": 0, "maximum": 0, "start": 0, "step": 1}
_STATE = ("_threads", "_notch", "_heat", "_speed", "_saved", "_saving", "_usual_ms", "_lossy")

Signals = Mapping[str, Any]
Decisions = dict[str, Any]


@dataclass(frozen=True)
class Plant:
    """What is controlled, as it stood at the start."""

    threads: int
    least_bytes: int  # of expert slots
    most_bytes: int
    token_interval_ms: float = 0.0  # stated by the user: never less
    splits_experts: bool = True

    @property
    def notch_bytes(self) -> int:
        return max(1, (self.most_bytes - self.least_bytes) // NOTCHES)


class Brain:
    """window() and urgent() return the decisions by law, and `knobs` what the knobs shall be."""

    def __init__(self, bounds: Bounds, plant: Plant, law: str = "fast-slow") -> None:
        self._bounds, self._plant, self._law = bounds, plant, law
        self._top = _PACES + plant.threads - 1  # of the ladder of effort
        self._trial = ThreadTrial(plant.threads)
        self._threads = plant.threads
        self._notch, self._heat, self._speed = NOTCHES, self._top, self._top
        self._saved = self._top  # what the battery allows
        self._saving = bounds.save_power == "always"
        self._usual_ms = 0.0  # to compute a token, without what pacing adds
        self._lossy_knobs = LOSSY_KNOBS if plant.splits_experts else LOSSY_KNOBS[1:]
        self._lossy = [0] * len(self._lossy_knobs)
        self.laws = {name: Controller(law, **settings) for name, settings in self._settings().items()}

    def _settings(self) -> dict[str, dict[str, Any]]:
        b = self._bounds
        effort = {"name": "effort", "minimum": 0, "maximum": self._top, "start": self._top}
        store = {"name": "store", "minimum": 0, "maximum": NOTCHES, "start": NOTCHES, "step": 1}
        lossy = [
            {"name": name, "minimum": 0, "maximum": _LOSSY_NOTCHES, "start": 0, "step": -1, "stage": stage}
            for stage, name in enumerate(self._lossy_knobs)
        ]
        high = b.token_time_high_ms
        return {
            # The signal is how many notches of the store are lacking to the reserve.
            "memory": {
                "low": -1.5, "high": 0.0, "fast": _INERT, "slow": [store], "patience": 4, "dwell": 4, "slow_gain": 0.5,
                "drives": "slow", "integral": 0.5,
            },
            "heat": {
                "low": b.temperature_low_celsius, "high": b.temperature_high_celsius, "lead": 4.0,
                "proportional": 3.0, "integral": 0.35,
                "fast": {**effort, "step": max(1, self._top // 8)},
            },
            "speed": {"low": b.token_time_low_ms, "high": high, "fast": {**effort, "step": -max(1, self._top // 4)}},
            "quality": {
                "low": 0.6 * high, "high": high, "fast": _INERT, "slow": lossy, "patience": 4, "dwell": 8,
                "drives": "slow",
            },
        }  # fmt: skip

    # --- in: signals ------------------------------------------------------------------------------------

    def urgent(self, t: float, load: float) -> Decisions:
        """Memory is short: as many notches go at once as are lacking. (A baseline's law knows by itself how many.)"""
        times = min(NOTCHES, max(1, math.ceil(load))) if self._law == "fast-slow" else 1
        decisions = [self.laws["memory"].step(load, t, urgent=True) for _ in range(times)]
        self._notch = decisions[-1]["slow"][0]
        return {"memory": decisions[-1]}

    def window(self, s: Signals) -> Decisions:
        """`s`: t, tokens, mean_ms, p95_ms, load and its quality, temperature and its quality, headroom, cores, on_battery,
        charge, cpu_pressure, memory_pressure; None where there is none."""
        t = s["t"]
        made = {**self._memory(s, t), "heat": self._cool(s, t), "speed": self._hurry(s, t)}
        if self._bounds.allow_lossy:
            made["quality"] = self._give_up(s, t)
        self._save(s)
        most = max(1, min(self._plant.threads, s["cores"], self.effort - _PACES + 1))
        mean = math.nan if s["mean_ms"] is None else s["mean_ms"]
        if mean > _CHANGED * self._usual_ms or 0 < mean < self._usual_ms / _CHANGED:
            self._usual_ms = mean
        self._threads = self._trial.window(s["tokens"], mean, s["cpu_pressure"], most)
        return made

    def _memory(self, s: Signals, t: float) -> Decisions:
        load, pressure = s["load"], s["memory_pressure"]
        pressed = pressure is not None and pressure > _TIGHT_PRESSURE
        if (load is not None and load > 0) or pressed:
            return self.urgent(t, max(load or 0.0, 0.0))
        decision = _step(self.laws["memory"], t, load, s["load_quality"])
        self._notch = decision["slow"][0]
        return {"memory": decision}

    def _cool(self, s: Signals, t: float) -> dict[str, Any]:
        headroom = s["headroom"]
        urgent = headroom is not None and headroom < 1
        decision = _step(self.laws["heat"], t, s["temperature"], s["temperature_quality"], urgent=urgent)
        self._heat = decision["fast"]
        return decision

    def _hurry(self, s: Signals, t: float) -> dict[str, Any]:
        seen = s["p95_ms"]
        if seen is not None:
            seen = max(seen, self.knobs["token_interval_ms"])
            if not self._saving and seen <= self._bounds.token_time_high_ms:
                # Fast enough: a baseline would slow down to its aim within the band.
                seen = max(seen, self._bounds.token_time_low_ms) if self._law == "fast-slow" else None
        decision = _step(self.laws["speed"], t, seen)
        self._speed = decision["fast"]
        return decision

    def _give_up(self, s: Signals, t: float) -> dict[str, Any]:
        """Quality, where nothing else is left to give: the effort is all that heat allows."""
        free = self._speed == self._top or any(self._lossy)
        decision = _step(self.laws["quality"], t, s["p95_ms"] if free else None)
        self._lossy = decision["slow"]
        return decision

    def _save(self, s: Signals) -> None:
        """A battery that does not answer is as it was."""
        if s["on_battery"] is not None and self._bounds.save_power != "always":
            self._saving = self._bounds.save_power == "on-battery" and s["on_battery"] > 0
        if s["on_battery"] is not None and not s["on_battery"]:
            self._saved = self._top
        elif s["on_battery"] and s["charge"] is not None:
            self._saved = _PACES if s["charge"] < self._bounds.low_charge else self._top

    # --- out: knobs -------------------------------------------------------------------------------------

    @property
    def effort(self) -> int:
        return min(self._heat, self._speed, self._saved)

    @property
    def knobs(self) -> dict[str, Any]:
        slower = max(0, _PACES - self.effort)
        knobs: dict[str, Any] = {
            "expert_memory": self._plant.most_bytes - (NOTCHES - self._notch) * self._plant.notch_bytes,
            "threads": self._threads,
            "token_interval_ms": max(
                self._plant.token_interval_ms, self._usual_ms * _SLOWER**slower if slower else 0.0
            ),
        }
        if self._bounds.allow_lossy:
            for name, notch in zip(self._lossy_knobs, self._lossy, strict=True):
                knobs[name] = _MOST_LOSSY[name] * notch / _LOSSY_NOTCHES
        return knobs

    def state(self) -> dict[str, Any]:
        """What it goes on from; restore() of it in a brain of the same settings goes on alike."""
        return {
            "laws": {name: law.state() for name, law in self.laws.items()},
            "trial": self._trial.state(),
            "own": {name: getattr(self, name) for name in _STATE},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises KeyError, TypeError and ValueError for what state() cannot have given."""
        for name, law in self.laws.items():
            law.restore(state["laws"][name])
        self._trial.restore(state["trial"])
        for name in _STATE:
            before, value = getattr(self, name), state["own"][name]
            if type(value) is not type(before):
                raise TypeError(f"{name} is {value!r:.60}")
            setattr(self, name, value)

    def settings(self) -> dict[str, Any]:
        """What a record needs to make this brain again."""
        return {"bounds": asdict(self._bounds), "plant": asdict(self._plant), "law": self._law}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Brain":
        return cls(Bounds(**settings["bounds"]), Plant(**settings["plant"]), settings["law"])


def _step(
    law: Controller, t: float, value: float | None, quality: str = "exact", **more: Any
) -> dict[str, Any]:
    if value is None:
        return {**law.step(math.nan, t, quality="missing", **more), "value": None}
    return law.step(value, t, quality=quality, **more)
