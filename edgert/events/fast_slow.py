"""The fast/slow law on the biases of a DAVIS346."""

import math
from typing import Any

from edgert._native import Controller
from edgert.errors import InvalidArgumentError
from edgert.events.biases import DAVIS346, HIGHEST_LEVEL, Bias, Biases, at_level, level

BAND = (5e5, 2.5e6)  # events a second of the whole sensor, as published
WINDOW_S = 0.3
STEP = 400  # of a slow move, in thousandths of the logarithm of a current; as published 5 fine units
REFRACTORY = (4, 57)  # fine values
_DEFAULTS = {"patience": 2, "blanking": 1, "dwell": 3, "relief": 8}
KINDS = ("fast-slow", "published", "fast-only", "slow-only", "fixed", "aimd", "pi")
_SLOW = {
    "photoreceptor": 1,
    "follower": 1,
    "on_threshold": -1,
    "off_threshold": 1,
}  # opening adds, or takes away


class FastSlow:
    """`step(rate, t)` takes the events a second of a window and gives the biases from then on.

    kind: fast-slow (the repaired law), published, fast-only, slow-only, fixed, aimd, pi. `band`: events a second. Slow biases move by a
    ratio of their currents, `slow_step` thousandths of its logarithm, so a fine value that runs out is carried over into the
    coarse one, and end `reach` thousandths from their start. As published they are fine values without an end; what a sensor cannot hold is cut off on the way to it.
    `settings`: those of docs/controllers.md. InvalidArgumentError by field.
    """

    def __init__(
        self,
        kind: str = "fast-slow",
        *,
        start: Biases = DAVIS346,
        band: tuple[float, float] = BAND,
        slew: int = 8,
        reach: int = 2000,
        slow_step: int | None = None,
        **settings: Any,
    ) -> None:
        if kind not in KINDS:
            raise InvalidArgumentError(f"kind: found {kind}, allowed is {', '.join(KINDS)}")
        self._start, self._published, self._slow_step = (
            start,
            kind == "published",
            slow_step or (5 if kind == "published" else STEP),
        )
        low, high = REFRACTORY
        fast: dict[str, Any] = {"name": "refractory", "minimum": low, "maximum": high, "start": min(max(start.refractory.fine, low), high), "step": slew}  # fmt: skip
        if kind == "slow-only":
            fast |= {"minimum": fast["start"], "maximum": fast["start"]}
        slow = [] if kind == "fast-only" else [self._slow(name, sign, reach) for name, sign in _SLOW.items()]
        self.law = {"fast-only": "fast-slow", "slow-only": "fast-slow"}.get(kind, kind)
        combined: Any = {"low": band[0], "high": band[1], "fast": fast, "slow": slow} | _DEFAULTS | settings
        self.settings: dict[str, Any] = combined
        self._controller = Controller(self.law, **self.settings)
        self.biases = start
        self.decision: dict[str, Any] | None = None

    def _slow(self, name: str, sign: int, reach: int) -> dict[str, Any]:
        bias: Bias = getattr(self._start, name)
        if self._published:
            return {
                "name": name,
                "minimum": 0,
                "maximum": 255,
                "start": bias.fine,
                "step": sign * self._slow_step,
            }
        place = level(bias)
        least, most = max(0, place - reach), min(HIGHEST_LEVEL, place + reach)
        return {
            "name": name,
            "minimum": least,
            "maximum": most,
            "start": place,
            "step": sign * self._slow_step,
        }

    def step(self, rate: float, t: float = math.nan, *, age: float = 0.0, quality: str = "exact") -> Biases:
        """rate: events a second; quality: exact, at-least (events were lost) or missing."""
        made = self._controller.step(rate, 0.0 if math.isnan(t) else t, age=age, quality=quality)
        biases = vars(self._start) | {"refractory": Bias(self._start.refractory.coarse, made["fast"])}
        for knob, place in zip(self.settings["slow"], made["slow"], strict=True):
            name = knob["name"]
            biases[name] = (
                Bias(getattr(self._start, name).coarse, min(max(place, 0), 255))
                if self._published
                else at_level(place)
            )
        self.decision, self.biases = made, Biases(**biases)
        return self.biases
