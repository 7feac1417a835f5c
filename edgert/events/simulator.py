"""A simulated DAVIS-like sensor in a textured corridor. Everything that comes from here is simulated.

The pixel is v2e's in form: log intensity (linear below 20), one pole whose bandwidth grows with the intensity and the
photoreceptor's bias, thresholds that follow from bias currents and vary from pixel to pixel, a leak, noise events that are
more frequent in the dark and at low thresholds, a dead time after each event, and a burst when a slow bias changes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import InvalidArgumentError
from edgert.events.biases import DAVIS346, Biases
from edgert.events.camera import Reading
from edgert.events.stream import Events, events_of

_FULL_LIGHT = 2000.0  # intensity of a white wall at light 1
_BANDWIDTH_HZ = 1500.0  # of the photoreceptor there, with the default bias
_APPROACH_S = 0.3  # of motion before a camera that was put down elsewhere counts
_LEAK_HZ = 0.1
_NOISE_HZ = 0.5  # of a pixel in the dark, with the default thresholds
_NOISE_VOLT = 0.06  # the threshold's change for e times the noise
_MISMATCH = 0.03  # deviation of thresholds, in units of log intensity
_LEAST_THETA = np.float32(0.02)
_BURST = 0.15  # deviation of the references after a slow change

Floats = npt.NDArray[Any]
_Fired = tuple[Floats, Floats, Floats]  # pixels, seconds after the step began, whether brighter


@dataclass(frozen=True)
class Corridor:
    """A wall of `length_m`, seen from the side; a world is its seed."""

    seed: int = 0
    length_m: float = 100.0
    pixels_per_m: int = 200
    rows: int = 64
    wall: Floats = field(init=False, repr=False, compare=False)  # reflectance, [rows, columns]

    def __post_init__(self) -> None:
        if not (0 < self.length_m * self.pixels_per_m * self.rows <= 1 << 27):
            raise InvalidArgumentError("a corridor of more than 2^27 pixels")
        object.__setattr__(self, "wall", self._paint())

    def _paint(self) -> Floats:
        """Panels, posters and grain: blocks of several sizes in log reflectance, 0.05 to 1."""
        rng = np.random.default_rng(self.seed)
        columns = round(self.length_m * self.pixels_per_m)
        log = np.zeros((self.rows, columns), np.float32)
        for block, contrast in ((160, 0.5), (48, 0.45), (16, 0.4), (6, 0.3)):
            height = max(4, block // 2)
            shape = (-(-self.rows // height), -(-columns // block) + 1)
            blocks = rng.normal(0, contrast, shape).astype(np.float32)
            shift = int(rng.integers(block))
            log += np.repeat(np.repeat(blocks, height, 0), block, 1)[: self.rows, shift : shift + columns]
        wall = np.exp(log - log.max() * 0.8)
        return np.asarray(np.clip(wall, 0.05, 1.0), np.float32)


class SimulatedCamera:
    """An EventSource that moves along a corridor. `light` and `speed_m_per_s` are numbers or functions of seconds.

    `stride_m`: after each read the camera stands so much further on, so that long runs are sampled and not simulated
    throughout; it moves for 0.3 s before what it sees counts.
    """

    def __init__(
        self,
        corridor: Corridor,
        *,
        light: float | Callable[[float], float] = 1.0,
        speed_m_per_s: float | Callable[[float], float] = 2.0,
        size: tuple[int, int] = (64, 64),
        biases: Biases = DAVIS346,
        stride_m: float = 0.0,
        seed: int = 0,
    ) -> None:
        if size[1] > corridor.rows:
            raise InvalidArgumentError(f"size: found {size[1]} rows, the corridor has {corridor.rows}")
        self.size, self._corridor, self._stride = size, corridor, stride_m
        self._light, self._speed = _over_time(light), _over_time(speed_m_per_s)
        self._rng = np.random.default_rng([corridor.seed, seed])
        self._mismatch = self._rng.normal(0, _MISMATCH, size[0] * size[1]).astype(np.float32)
        self.t, self.position_m = 0.0, 0.0
        self._end_m = corridor.length_m - self.size[0] / corridor.pixels_per_m
        self._put(biases)
        self._stand()

    def biases(self) -> Biases:
        return self._biases

    def set_biases(self, biases: Biases) -> None:
        if replace(biases, refractory=self._biases.refractory) != self._biases:
            self._reference += self._rng.normal(0, _BURST, len(self._reference)).astype(np.float32)
        self._put(biases)

    def _put(self, biases: Biases) -> None:
        self._biases = biases
        self._on, self._off = (
            np.maximum(np.float32(theta) + self._mismatch, _LEAST_THETA)
            for theta in (biases.theta_on, biases.theta_off)
        )
        lowest = np.minimum(self._on, self._off)
        self._dark_noise_hz = _NOISE_HZ * np.exp((DAVIS346.theta_on - lowest) / _NOISE_VOLT)

    def close(self) -> None:
        """Nothing is held."""

    def read(self, seconds: float) -> Reading | None:
        speed = self._speed(self.t)
        if self.position_m + speed * seconds >= self._end_m:
            return None
        steps = self._steps(seconds, speed)
        dt = seconds / steps
        events = np.concatenate([self._step(dt) for _ in range(steps)])
        now = self.t
        if self._stride:
            self._go_on(self._stride - speed * seconds)
        return Reading(now, events)

    def _steps(self, seconds: float, speed: float, a_pixel: int = 2) -> int:
        """So many a pixel of motion, and at least one in 5 ms."""
        return max(1, int(np.ceil(seconds * max(a_pixel * speed * self._corridor.pixels_per_m, 200))))

    def _go_on(self, metres: float) -> None:
        """So much further, the last 0.3 s of it as it moves: what the pixels hold is what a way there leaves in them."""
        speed, now = self._speed(self.t), self.t
        moving = _APPROACH_S if metres >= speed * _APPROACH_S else metres / speed
        self.position_m += metres - speed * moving
        if self.position_m >= self._end_m:
            return
        self._stand()
        steps = self._steps(moving, speed, 1)
        for _ in range(steps):
            self._step(moving / steps)
        self.t = now

    def _stand(self) -> None:
        self._signal = _log(self._seen().ravel())
        self._reference = self._signal.copy()
        self._dead = np.zeros_like(self._signal)  # seconds of dead time that are left

    def _seen(self) -> Floats:
        at = self.position_m * self._corridor.pixels_per_m
        left, share = int(at), np.float32(at - int(at))
        view = self._corridor.wall[: self.size[1], left : left + self.size[0] + 1]
        if view.shape[1] <= self.size[0]:
            view = np.pad(view, ((0, 0), (0, self.size[0] + 1 - view.shape[1])), mode="edge")
        return np.asarray(
            (view[:, :-1] * (1 - share) + view[:, 1:] * share) * _FULL_LIGHT * self._light(self.t)
        )

    def _step(self, dt: float) -> Events:
        self.t += dt
        self.position_m += self._speed(self.t) * dt
        intensity = self._seen().ravel()
        before = self._signal
        share = 1 - np.exp(self._bandwidth(intensity) * np.float32(-2 * np.pi * dt))
        self._signal = before + (_log(intensity) - before) * share
        self._reference -= np.float32(_LEAK_HZ * self._biases.theta_on * dt)
        return self._stamped(
            [*self._signal_events(before, dt), self._noise_events(before, intensity, dt)], dt
        )

    def _signal_events(self, before: Floats, dt: float) -> list[_Fired]:
        """Of a step in which the signal leaves `before` with a constant slope: exact in time, dead times included."""
        waiting = self._dead > 0
        here = self._reference + self._on, self._reference - self._off
        crossed = np.maximum(self._signal, before) >= here[0]
        crossed |= np.minimum(self._signal, before) <= here[1]
        at = np.flatnonzero(crossed | waiting)
        # A pixel is armed when its dead time ends, and refers to the signal as it is then.
        slope = (self._signal[at] - before[at]) / np.float32(dt)
        armed = self._dead[at]
        late = armed >= dt
        reference = np.where(armed > 0, before[at] + slope * armed, self._reference[at])
        difference = before[at] + slope * armed - reference
        beyond = (difference >= self._on[at]) | (-difference >= self._off[at])  # since a bias changed
        theta = np.where(slope > 0, self._on[at], self._off[at])
        speed = np.abs(slope) + np.float32(1e-9)
        first = armed + np.where(beyond, 0, (theta - np.sign(slope) * difference) / speed)
        apart = np.float32(self._biases.refractory_s) + theta / speed
        fires = ~late & (first < dt)
        counts = np.where(fires, 1 + np.floor((dt - first) / apart), 0).astype(np.int64)
        again = np.where(fires, first + (counts - 1) * apart + self._biases.refractory_s, armed)
        self._reference[at] = np.where(fires, before[at] + slope * again, reference)
        self._dead[at] = np.maximum(again - dt, 0)
        up = np.where(beyond, difference > 0, slope > 0)[fires]
        at, counts, first, apart = at[fires], counts[fires], first[fires], apart[fires]
        return [(at, first, up), _repeated(at, first, apart, slope[fires] > 0, counts)]

    def _noise_events(self, before: Floats, intensity: Floats, dt: float) -> _Fired:
        """More frequent in the dark, a quarter in full light, and at low thresholds. They have their dead time too."""
        most = float(self._dark_noise_hz.max())
        at = np.unique(self._rng.integers(0, len(before), self._rng.poisson(most * dt * len(before))))
        chance = self._dark_noise_hz[at] / most * (1 - 0.75 * np.minimum(intensity[at] / _FULL_LIGHT, 1))
        at = at[(self._rng.random(len(at)) < chance) & (self._dead[at] == 0)]
        first = (self._rng.random(len(at)) * dt).astype(np.float32)
        again = first + np.float32(self._biases.refractory_s)
        self._reference[at] = before[at] + (self._signal[at] - before[at]) / np.float32(dt) * again
        self._dead[at] = np.maximum(again - dt, 0)
        return at, first, self._rng.random(len(at)) < 0.5

    def _bandwidth(self, intensity: Floats) -> Floats:
        """Of the photoreceptor, in proportion to the light, and its follower in a row, taken as one pole."""
        gain = max(self._biases.photoreceptor.picoamperes / DAVIS346.photoreceptor.picoamperes, 1e-4)
        return np.asarray(
            1 / (_FULL_LIGHT / (intensity * gain * _BANDWIDTH_HZ) + 1 / self._biases.follower_hz), np.float32
        )

    def _stamped(self, fired: list[_Fired], dt: float) -> Events:
        at, after, on = (np.concatenate(part) for part in zip(*fired, strict=True))
        t = ((self.t - dt + after) * 1e6).astype(np.int64)
        order = np.argsort(t, kind="stable")
        at = at[order]
        return events_of(t[order], at % self.size[0], at // self.size[0], on[order])


def _repeated(at: Floats, first: Floats, apart: Floats, up: Floats, counts: Floats) -> _Fired:
    """What follows the first event of each pixel."""
    more = counts - 1
    order = np.arange(more.sum()) - np.repeat(np.cumsum(more) - more, more) + 1
    return np.repeat(at, more), np.repeat(first, more) + order * np.repeat(apart, more), np.repeat(up, more)


def _over_time(value: float | Callable[[float], float]) -> Callable[[float], float]:
    return value if callable(value) else lambda _seconds: value


def _log(intensity: Floats) -> Floats:
    return np.where(intensity <= 20, intensity * np.float32(np.log(20) / 20), np.log(np.maximum(intensity, 20))).astype(np.float32)  # fmt: skip
