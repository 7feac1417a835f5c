"""How many threads compute fastest now: tried on the running model, one more or one fewer at a time.

More threads are not always faster: where others use the cores, where storage sets the pace, or where a token is small. A trial
runs the other number for a window, and goes back for one; it stays only with what was faster than both. Trials begin after the
start, when the cores, their load or the time of a token have changed, and every few hundred windows.
"""

import math
from collections.abc import Mapping
from typing import Any

_GAIN = 0.95  # of the time of a token, for a change to count
_CHANGED = 1.25  # times as slow or as fast
_LOADED = 0.3  # change of the share of time in which tasks wait for a core
_EVERY = 256  # windows
_LEAST_TOKENS = 3
_SETTLED = 3  # windows before a trial


class ThreadTrial:
    """Deterministic: what it says follows from the windows that it was shown."""

    def __init__(self, threads: int) -> None:
        self.threads = threads  # that won
        self._tried = threads  # last
        self._direction = -1
        self._phase = "rest"  # rest -> other -> back
        self._rested, self._due, self._tries = 0, True, 0
        self._before = self._other = math.nan
        self._usual = math.nan  # time of a token since the last trial
        self._load: float | None = None

    def window(self, tokens: int, mean_ms: float, load: float | None, most: int) -> int:
        """The threads to compute with in the window to come; at most `most` (cores, heat)."""
        at = min(self.threads, most)
        if tokens < _LEAST_TOKENS or not mean_ms > 0:
            self._phase = "rest"
            return at
        if self._phase == "other":
            self._other, self._phase = mean_ms, "back"
            return at
        if self._phase == "back":
            self._judge(mean_ms)
            return min(self.threads, most)
        return self._rest(mean_ms, load, most, at)

    def state(self) -> dict[str, Any]:
        """For records; restore() of it goes on alike."""
        return dict(vars(self))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Numbers that there are none of yet come as None from a record."""
        for name, before in vars(self).items():
            value = state[name]
            if value is None and name != "_load":
                value = math.nan
            if not isinstance(value, bool | int | float | str | None) or isinstance(
                before, str
            ) != isinstance(value, str):
                raise TypeError(f"{name} is {value!r:.60}")
            setattr(self, name, value)

    def _judge(self, mean_ms: float) -> None:
        self._phase = "rest"
        if self._other < _GAIN * min(self._before, mean_ms):
            self.threads = self._tried
            self._usual, self._tries, self._due = self._other, 0, True
        else:
            self._usual = min(self._before, mean_ms)
            self._direction = -self._direction
            self._tries += 1
            self._due = self._tries < 2  # the other direction too
        self._rested = 0

    def _rest(self, mean_ms: float, load: float | None, most: int, at: int) -> int:
        self._rested += 1
        if self._rested >= _EVERY or self._changed(mean_ms, load):
            self._due, self._tries = True, 0
        if not self._due or self._rested < _SETTLED:
            return at
        if not 1 <= at + self._direction <= most:
            self._direction = -self._direction
            self._tries += 1
        if self._tries >= 2 or not 1 <= at + self._direction <= most:
            self._due, self._rested, self._tries = False, 0, 0
            self._usual = mean_ms
            return at
        self._before, self._phase, self._load = mean_ms, "other", load
        self._tried = at + self._direction
        return self._tried

    def _changed(self, mean_ms: float, load: float | None) -> bool:
        if math.isnan(self._usual):
            return False
        slower = mean_ms > _CHANGED * self._usual or mean_ms * _CHANGED < self._usual
        loaded = load is not None and self._load is not None and abs(load - self._load) > _LOADED
        return slower or loaded
