"""What a camera's fast bias does to its rate."""

from dataclasses import replace

from edgert.events.biases import Bias, Biases
from edgert.events.camera import EventSource
from edgert.events.fast_slow import REFRACTORY

_PLACES, _SWEEPS = 5, 3


def fast_response(source: EventSource, before: Biases, seconds: float) -> list[tuple[int, float]]:
    """(fine refractory value, events a second) along its range, means of several sweeps, for a scene changes meanwhile too;
    fewer where the source ends. Leaves the last one set."""
    low, high = REFRACTORY
    places = [low + (high - low) * i // (_PLACES - 1) for i in range(_PLACES)]
    rates: dict[int, list[float]] = {}
    for fine in places * _SWEEPS:
        source.set_biases(replace(before, refractory=Bias(before.refractory.coarse, fine)))
        reading = source.read(seconds)
        if reading is None:
            break
        rates.setdefault(fine, []).append(len(reading.events) / seconds)
    return [(fine, sum(found) / len(found)) for fine, found in rates.items()]
