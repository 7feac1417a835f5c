"""A simulated DAVIS-like sensor in a textured corridor. Everything that comes from here is simulated.

The pixel is v2e's in form: log intensity (linear below 20), one pole whose bandwidth grows with the intensity and the
photoreceptor's bias, thresholds that follow from bias currents and vary from pixel to pixel, a leak, noise events that are
more frequent in the dark and at low thresholds, a dead time after each event, and a burst when a slow bias changes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import InvalidArgumentError
from edgert.events.biases import DAVIS346, Biases
from edgert.events.camera import Reading
from edgert.events.stream import EVENT, Events, events_of

_FULL_LIGHT = 2000.0  # intensity of a white wall at light 1
_BANDWIDTH_HZ = 1500.0  # there, with the default biases
_LEAK_HZ = 0.1
_NOISE_HZ = 0.5  # of a pixel in the dark, with the default thresholds
_NOISE_VOLT = 0.06  # the threshold's change for e times the noise
_MISMATCH = 0.03  # deviation of thresholds
_BURST = 0.15  # deviation of the references after a slow change

Floats = npt.NDArray[Any]


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
    throughout; what it sees settles for 10 ms before it counts.
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
        shape = (size[1], size[0])
        self._unlike = self._rng.normal(1, _MISMATCH, shape).astype(np.float32)
        self.t, self.position_m = 0.0, 0.0
        self._biases = biases
        self._signal = self._reference = np.zeros(shape, np.float32)
        self._settle()

    def biases(self) -> Biases:
        return self._biases

    def set_biases(self, biases: Biases) -> None:
        slow = [name for name in vars(biases) if name != "refractory"]
        if any(getattr(biases, name) != getattr(self._biases, name) for name in slow):
            burst = self._rng.normal(0, _BURST, self._reference.shape)
            self._reference = self._reference + burst.astype(np.float32)
        self._biases = biases

    def close(self) -> None:
        """Nothing is held."""

    def read(self, seconds: float) -> Reading | None:
        last = self._corridor.length_m - self.size[0] / self._corridor.pixels_per_m
        speed = self._speed(self.t)
        if self.position_m + speed * (seconds + 0.02) >= last:
            return None
        steps = max(1, int(np.ceil(seconds * max(speed * self._corridor.pixels_per_m, 100))))
        dt = seconds / steps
        events = np.concatenate([self._step(dt) for _ in range(steps)])
        if self._stride:
            self.position_m += self._stride - speed * seconds
            if self.position_m < last:
                self._settle()
        return Reading(self.t, events)

    def _settle(self) -> None:
        self._signal = _log(self._seen())
        self._reference = self._signal.copy()
        before, where = self.t, self.position_m
        for _ in range(6):
            self._step(0.01 / 6)
        self.t, self.position_m = before, where

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
        intensity = self._seen()
        before = self._signal
        self._signal = before + (_log(intensity) - before) * (
            1 - np.exp(self._bandwidth(intensity) * (-2 * np.pi * dt))
        )
        self._reference = self._reference - np.float32(_LEAK_HZ * self._biases.theta_on * dt)
        on, off = (np.float32(max(theta, 0.02)) for theta in (self._biases.theta_on, self._biases.theta_off))
        change = self._signal - self._reference
        threshold = np.where(change > 0, on, off) * self._unlike
        # A signal that moves during the dead time is not seen to have moved.
        lost = np.abs(self._signal - before) * np.float32(self._biases.refractory_s / dt)
        counts = (np.abs(change) / (threshold + lost)).astype(np.int32)
        np.minimum(counts, max(1, int(dt / self._biases.refractory_s)), out=counts)
        self._reference = self._reference + np.sign(change) * counts * (threshold + lost)
        noisy = self._rng.random(change.shape, np.float32) < self._noise(
            intensity, min(on, off)
        ) * np.float32(dt)
        return self._stamped(counts, change > 0, noisy, dt)

    def _bandwidth(self, intensity: Floats) -> Floats:
        b, d = self._biases, DAVIS346
        gain = b.photoreceptor.picoamperes / d.photoreceptor.picoamperes
        follower = b.follower.picoamperes / d.follower.picoamperes
        # Two poles in a row, taken as one.
        return np.asarray(
            1 / (_FULL_LIGHT / (intensity * gain) / _BANDWIDTH_HZ + 0.1 / follower / _BANDWIDTH_HZ)
        )

    def _noise(self, intensity: Floats, threshold: np.float32) -> Floats:
        faint = 1 - 0.75 * np.minimum(intensity / _FULL_LIGHT, 1)
        return np.asarray(
            _NOISE_HZ * np.exp((DAVIS346.theta_on - threshold) / _NOISE_VOLT) * faint, np.float32
        )

    def _stamped(self, counts: Floats, up: Floats, noisy: Floats, dt: float) -> Events:
        total = (counts + noisy).ravel()
        pixels = np.flatnonzero(total)
        if not len(pixels):
            return np.empty(0, EVENT)
        n = total[pixels]
        of = np.repeat(pixels, n)
        on = up.ravel()[of]
        flipped = noisy.ravel()[of] & (counts.ravel()[of] == 0)
        on = np.where(flipped, self._rng.random(len(of)) < 0.5, on)
        order = np.arange(len(of)) - np.repeat(np.cumsum(n) - n, n)
        t = (self.t - dt + dt * (order + self._rng.random(len(of))) / np.repeat(n, n)) * 1e6
        events = events_of(t.astype(np.int64), of % self.size[0], of // self.size[0], on)
        return events[np.argsort(events["t"], kind="stable")]


def _over_time(value: float | Callable[[float], float]) -> Callable[[float], float]:
    return value if callable(value) else lambda _seconds: value


def _log(intensity: Floats) -> Floats:
    return np.where(intensity <= 20, intensity * np.float32(np.log(20) / 20), np.log(np.maximum(intensity, 20))).astype(np.float32)  # fmt: skip
