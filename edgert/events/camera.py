"""Where events come from and biases go: files, the simulator, and cameras through plug-ins.

A driver is a package with an entry point in the group `edgert.event_sources`: a function that takes the text after the
colon of `NAME:ARGUMENT` and returns an EventSource.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from edgert.control import Record
from edgert.errors import InvalidArgumentError, NotFoundError, UnsupportedError
from edgert.events.biases import Biases
from edgert.events.fast_slow import WINDOW_S, FastSlow
from edgert.events.files import open_events
from edgert.events.rates import rate_windows
from edgert.events.stream import Events

GROUP = "edgert.event_sources"


@dataclass(frozen=True)
class Reading:
    t: float  # seconds
    events: Events
    complete: bool = True  # False: some were lost on the way


class EventSource(Protocol):
    size: tuple[int, int]  # width, height

    def read(self, seconds: float) -> Reading | None:
        """The events of the next `seconds`; None at the end."""

    def biases(self) -> Biases | None:
        """None: there are none to set, as of a recording."""

    def set_biases(self, biases: Biases) -> None: ...

    def close(self) -> None: ...


class FileSource:
    """A recording, as if it came from a camera without biases."""

    def __init__(self, path: str | Path) -> None:
        self._file = open_events(path)
        self.size = self._file.size
        self._windows: Any = None

    def read(self, seconds: float) -> Reading | None:
        self._windows = self._windows or rate_windows(self._file, seconds)
        window = next(self._windows, None)
        return None if window is None else Reading(window.t, window.events)

    def biases(self) -> Biases | None:
        return None

    def set_biases(self, biases: Biases) -> None:
        raise UnsupportedError("a recording has no biases to set")

    def close(self) -> None:
        self._file.close()


def open_source(name: str) -> EventSource:
    """`file:PATH`, `simulated:SEED`, or NAME:ARGUMENT of a plug-in. NotFoundError with the names that exist."""
    scheme, _, argument = name.partition(":")
    known: dict[str, Callable[[str], EventSource]] = {"file": FileSource, "simulated": _simulated}
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    if scheme in known:
        return known[scheme](argument)
    if scheme in plugins:
        source: EventSource = plugins[scheme].load()(argument)
        return source
    raise NotFoundError(
        f"source {scheme!r}: known are {', '.join(sorted({*known, *plugins}))}; drivers are plug-ins"
    )


def _simulated(argument: str) -> EventSource:
    from edgert.events.simulator import Corridor, SimulatedCamera

    if not (argument.isascii() and argument.isdecimal()):
        raise InvalidArgumentError(
            f"simulated:{argument}: needed is the number of a world, as in simulated:3"
        )
    return SimulatedCamera(Corridor(seed=int(argument)))


@contextmanager
def restored_biases(source: EventSource) -> Iterator[Biases | None]:
    """The biases as they were before are set again on the way out, whatever happened."""
    before = source.biases()
    try:
        yield before
    finally:
        if before is not None:
            source.set_biases(before)


def run(
    source: EventSource,
    law: FastSlow,
    *,
    seconds: float = WINDOW_S,
    windows: int | None = None,
    record: Record | None = None,
    listen: Callable[[Reading, dict[str, Any]], None] | None = None,
) -> int:
    """Read window after window, decide, set the biases where they change; the number of windows. The source's biases are
    restored at the end. A recording has none: then the decisions are only shown."""
    count = 0
    with restored_biases(source) as before:
        now = before
        while windows is None or count < windows:
            reading = source.read(seconds)
            if reading is None:
                break
            count += 1
            quality = "exact" if reading.complete else "at-least"
            wanted = law.step(len(reading.events) / seconds, reading.t, quality=quality)
            if now is not None and wanted != now:
                source.set_biases(wanted)
                now = wanted
            assert law.decision is not None
            if record is not None:
                record.write(law.decision)
            if listen is not None:
                listen(reading, law.decision)
    return count
