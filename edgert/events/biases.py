"""DAVIS346 biases: coarse and fine values, the currents that they mean, and what those do to a pixel.

I = T[7 - coarse] * fine / 255. The figures are those of the v2e pixel model and the published controller.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from edgert.errors import InvalidArgumentError

_TOP_PICOAMPERES = (11, 94, 756, 6054, 48437, 387_500, 3.1e6, 24.8e6)
_LEAST_FINE = 32  # below it the next coarse value has the same current with eight times the resolution
_REFRACTORY_COULOMB = 20e-15 * 0.8
_THRESHOLD_VOLTS = 0.0714
_LEAST_PICOAMPERES = 1e-3  # a fine value of 0 leaks
_FOLLOWER_FARAD, _THERMAL_VOLT = 131e-15, 0.025


class Bias(NamedTuple):
    coarse: int  # 0 to 7; 0 is the largest current
    fine: int  # 0 to 255

    @property
    def picoamperes(self) -> float:
        return _TOP_PICOAMPERES[7 - self.coarse] * self.fine / 255


def check(bias: Bias) -> Bias:
    if not (0 <= bias.coarse <= 7 and 0 <= bias.fine <= 255):
        raise InvalidArgumentError(f"bias: found {tuple(bias)}, allowed is coarse 0 to 7 and fine 0 to 255")
    return bias


# Every bias worth setting, by growing current: the steps of a fine value, carried over into the next coarse value.
LADDER = tuple(
    Bias(coarse, fine)
    for coarse in range(7, -1, -1)
    for fine in range(1 if coarse == 7 else _LEAST_FINE, 256)
)
_CURRENTS = [bias.picoamperes for bias in LADDER]
HIGHEST_LEVEL = round(1000 * math.log(_CURRENTS[-1] / _CURRENTS[0]))


def level(bias: Bias) -> int:
    """The logarithm of its current over the least, in thousandths: 1000 more are e times the current."""
    return round(1000 * math.log(max(check(bias).picoamperes, _CURRENTS[0]) / _CURRENTS[0]))


def at_level(place: int) -> Bias:
    """The bias whose current is nearest."""
    return LADDER[_nearest(_CURRENTS[0] * math.exp(place / 1000))]


def rung(bias: Bias) -> int:
    """The place on the ladder whose current is nearest."""
    return _nearest(check(bias).picoamperes)


def _nearest(current: float) -> int:
    above = min(bisect_left(_CURRENTS, current), len(LADDER) - 1)
    below = max(above - 1, 0)
    return below if current - _CURRENTS[below] < _CURRENTS[above] - current else above


@dataclass(frozen=True)
class Biases:
    """Those that the law moves, and `diff`, to which thresholds refer."""

    refractory: Bias  # RefrBp: more current, shorter dead time
    photoreceptor: Bias  # PrBp: more current, more bandwidth
    follower: Bias  # PrSFBp: the same
    on_threshold: Bias  # OnBn: more current, higher threshold
    off_threshold: Bias  # OffBn: more current, lower threshold
    diff: Bias  # DiffBn

    @property
    def refractory_s(self) -> float:
        return _REFRACTORY_COULOMB / (max(self.refractory.picoamperes, _LEAST_PICOAMPERES) * 1e-12)

    @property
    def follower_hz(self) -> float:
        """The source follower's bandwidth as jAER estimates it: I / (2 pi U_T C)."""
        return (
            max(self.follower.picoamperes, _LEAST_PICOAMPERES)
            * 1e-12
            / (2 * math.pi * _THERMAL_VOLT * _FOLLOWER_FARAD)
        )

    @property
    def theta_on(self) -> float:
        """In units of log intensity."""
        return _THRESHOLD_VOLTS * math.log(
            max(self.on_threshold.picoamperes, _LEAST_PICOAMPERES) / self.diff.picoamperes
        )

    @property
    def theta_off(self) -> float:
        return -_THRESHOLD_VOLTS * math.log(
            max(self.off_threshold.picoamperes, _LEAST_PICOAMPERES) / self.diff.picoamperes
        )

    def as_dict(self) -> dict[str, list[int]]:
        return {name: list(bias) for name, bias in vars(self).items()}

    @classmethod
    def from_dict(cls, given: Mapping[str, object]) -> "Biases":
        """InvalidArgumentError by name."""
        names = cls.__dataclass_fields__
        if set(given) != set(names):
            raise InvalidArgumentError(f"biases: found {', '.join(given)}, needed are {', '.join(names)}")
        found = {}
        for name, value in given.items():
            if not (
                isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int) for v in value)
            ):
                raise InvalidArgumentError(f"{name}: found {value!r}, needed is [coarse, fine]")
            found[name] = check(Bias(*value))
        return cls(**found)


# The start of the published controller. It states no DiffBn; this one makes both thresholds 0.26.
DAVIS346 = Biases(
    refractory=Bias(3, 25),
    photoreceptor=Bias(6, 119),
    follower=Bias(7, 32),
    on_threshold=Bias(1, 63),
    off_threshold=Bias(5, 168),
    diff=Bias(3, 103),
)
