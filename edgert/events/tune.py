"""What a camera's fast bias does to its rate."""

from dataclasses import replace

from edgert.events.biases import Bias, Biases
from edgert.events.camera import EventSource
from edgert.events.fast_slow import REFRACTORY

_PLACES = 5


def fast_response(source: EventSource, before: Biases, seconds: float) -> list[tuple[int, float]]:
    """(fine refractory value, events a second) along its range; shorter where the source ends. Leaves the last one set."""
    low, high = REFRACTORY
    found = []
    for i in range(_PLACES):
        fine = low + (high - low) * i // (_PLACES - 1)
        source.set_biases(replace(before, refractory=Bias(before.refractory.coarse, fine)))
        reading = source.read(seconds)
        if reading is None:
            break
        found.append((fine, len(reading.events) / seconds))
    return found
