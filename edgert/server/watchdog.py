"""Whether the engines get on: what stands still with requests running is told to the service manager by silence."""

import time
from collections.abc import Callable, Iterable

from edgert.errors import EdgertError
from edgert.server.models import Opened

STILL_S = 300.0  # longer than a part of a prompt takes on the slowest board


class Watchdog:
    """stuck() is asked again and again; `clock` in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, still_s: float = STILL_S) -> None:
        self._clock = clock
        self._still_s = still_s
        self._seen: dict[str, tuple[tuple[float, ...], float]] = {}  # by model: how far it was, since when

    def stuck(self, models: Iterable[tuple[str, Opened]]) -> list[str]:
        """The models whose engines have requests and have not moved for `still_s`."""
        now = self._clock()
        before, self._seen = self._seen, {}
        for name, opened in models:
            try:
                progress = opened.progress()
            except EdgertError:  # it is being closed
                continue
            if progress is not None:
                known = before.get(name)
                self._seen[name] = known if known and known[0] == progress else (progress, now)
        return [name for name, (_, since) in self._seen.items() if now - since >= self._still_s]
