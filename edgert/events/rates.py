"""Events a second, window by window."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from edgert.errors import InvalidArgumentError
from edgert.events.stream import EVENT, Events


@dataclass(frozen=True)
class Window:
    t: float  # seconds, where it ends
    rate: float  # events a second
    events: Events


def rate_windows(chunks: Iterable[Events], seconds: float = 0.3) -> Iterator[Window]:
    """Cut a stream into windows of `seconds` from its first event on; empty ones count, the last, cut off, does not.

    Events are taken in file order, so that one that is late belongs to the window that is open.
    """
    if not 1e-3 <= seconds <= 3600:
        raise InvalidArgumentError(f"seconds: found {seconds}, allowed is 0.001 to 3600")
    length, end, kept = round(seconds * 1e6), None, []
    for chunk in chunks:
        rest = chunk
        while len(rest):
            if end is None:
                end = int(rest["t"][0]) + length
            beyond = rest["t"] >= end
            cut = int(np.argmax(beyond)) if beyond.any() else len(rest)
            kept.append(rest[:cut])
            rest = rest[cut:]
            if not len(rest):
                break
            events = np.concatenate(kept) if kept else np.empty(0, EVENT)
            yield Window(end / 1e6, len(events) / seconds, events)
            end, kept = end + length, []
