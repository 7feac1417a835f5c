"""What a camera's fast bias does to its rate."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from edgert.events.biases import Bias, Biases
from edgert.events.camera import EventSource
from edgert.events.fast_slow import REFRACTORY

_PLACES, _SWEEPS = 5, 8
_SURE = 2.36  # standard errors of so many sweeps, by Student
INERT = math.log(1.1)  # changes of the rate below a tenth


@dataclass(frozen=True)
class Response:
    rates: dict[int, float]  # events a second by fine refractory value, means of the sweeps
    effect: float  # logarithm of the rate at the open end over that at the tight one
    error: float  # to either side, 95 % sure: the scene changes from window to window too

    @property
    def authority(self) -> str:
        """inert: surely less than a tenth; some: surely more; unclear: the scene changed too much to tell."""
        if abs(self.effect) + self.error < INERT:
            return "inert"
        return "some" if self.effect - self.error > INERT else "unclear"

    @property
    def steepest(self) -> float:
        """Events a second of a fine unit."""
        places = sorted(self.rates)
        return max(
            (abs(self.rates[b] - self.rates[a]) / (b - a) for a, b in pairwise(places)),
            default=0.0,
        )


def fast_response(source: EventSource, before: Biases, seconds: float) -> Response:
    """Sweeps along the range, there and back, so that what is compared was measured soon after one another; no rates where
    the source ends before. Leaves the last bias set."""
    low, high = REFRACTORY
    places = [low + (high - low) * i // (_PLACES - 1) for i in range(_PLACES)]
    sweeps: list[dict[int, float]] = []
    for k in range(_SWEEPS):
        found = {}
        for fine in places if k % 2 == 0 else places[::-1]:
            source.set_biases(replace(before, refractory=Bias(before.refractory.coarse, fine)))
            reading = source.read(seconds)
            if reading is None:
                return _response(sweeps)
            found[fine] = len(reading.events) / seconds
        sweeps.append(found)
    return _response(sweeps)


def _response(sweeps: list[dict[int, float]]) -> Response:
    if len(sweeps) < _SWEEPS:
        return Response({}, 0.0, math.inf)
    rates = {fine: float(np.mean([sweep[fine] for sweep in sweeps])) for fine in sweeps[0]}
    low, high = REFRACTORY
    ratios = np.array([math.log(max(s[high], 1.0) / max(s[low], 1.0)) for s in sweeps])
    return Response(rates, float(ratios.mean()), float(_SURE * ratios.std(ddof=1) / math.sqrt(len(ratios))))
