"""The thread that watches a model and sets its knobs."""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgert.controlling.bounds import Bounds
from edgert.controlling.brain import Brain, Plant
from edgert.controlling.record import DEFAULT_BYTES, Record, plain
from edgert.errors import EdgertError, UnsupportedError
from edgert.signals import MISSING, Machine, Reading, Sensors

if TYPE_CHECKING:
    from edgert.model import Model

_TICK_S = 0.05  # in which a process can take at most a few hundred MB
_MOST_SHOWN = 4096  # experts
_running: "set[Control]" = set()  # of this process: they share the memory that is lacking, and that is free
_running_lock = threading.Lock()
_DIGITS = bytes(48 + code if code < 10 else 63 for code in range(256))
_COUNTERS = (
    "expert_hits", "expert_prefetch_hits", "expert_misses", "bytes_read", "stall_s", "evictions",
)  # fmt: skip


class Control:
    """Keeps a running model within its bounds, from start() to stop(). A context manager.

    Knobs that a person sets meanwhile are overwritten where the loop owns them: expert_memory, threads,
    token_interval_ms, and with allow_lossy the lossy modes. stop() puts them back where they were.

    Where several run in a process, each answers for its part of the memory that is lacking or free, in proportion to its
    expert slots: together they give what is lacking once, and take back no more than there is.
    """

    def __init__(
        self,
        model: "Model",
        bounds: Bounds,
        *,
        log: str | os.PathLike[str] | None = None,
        log_bytes: int = DEFAULT_BYTES,
        sensors: Sensors | None = None,
        law: str = "fast-slow",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._bounds, self._clock = model, bounds, clock
        self._sensors = sensors or Sensors(clock=clock)
        self._knobs = model.knobs()
        if not self._knobs:
            raise UnsupportedError(
                f"{model.name}: {model.backend} runs this model: its knobs cannot change while it runs"
            )
        native = model.native
        most = int(native.statistics()["slot_capacity_bytes"])
        self._plant = Plant(
            self._knobs["threads"],
            min(native.least_expert_bytes, most),
            most,
            self._knobs["token_interval_ms"],
            model.splits_experts,
        )
        self._brain = Brain(bounds, self._plant, law)
        about = {
            "model": model.name, "pid": os.getpid(), "knobs": self._knobs, "layers": [len(row) for row in native.store()],
            "unix_time": time.time(), "budget_bytes": model.stats()["budget_bytes"],
        }  # fmt: skip
        self._about = about
        self._record = None if log is None else Record(Path(log), self._brain.settings(), about, log_bytes)
        self._applied: dict[str, Any] = {}
        self._counts = native.statistics()
        self._steps = native.step_times(1 << 62)[0]
        self._window_began = clock()
        self._last: dict[str, Any] = {}
        self.cost_s = 0.0  # of the processor, by the thread
        self.windows = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgert-control", daemon=True)

    @classmethod
    def start(cls, model: "Model", bounds: Bounds, **options: Any) -> "Control":
        """`options`: log (a file for the record), log_bytes (its bound), sensors, law (a baseline to compare with). Raises UnsupportedError where the engine has no live knobs."""
        control = cls(model, bounds, **options)
        with _running_lock:
            _running.add(control)
        control._thread.start()
        return control

    def stop(self) -> None:
        """May be repeated."""
        self._stopping.set()
        with _running_lock:
            _running.discard(self)
        if self._thread.is_alive():
            self._thread.join()
        self._close_record()
        if not self._model.closed:
            self._apply({name: self._knobs[name] for name in self._applied})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def state(self) -> dict[str, Any]:
        """The last line of the record, with what is controlled and the bounds; for monitors and metrics."""
        return plain({"about": self._about, "settings": self._brain.settings(), **self._last})  # type: ignore[no-any-return]

    # --- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.wait(_TICK_S):
            began = time.thread_time()
            try:
                self.tick()
            except EdgertError:
                if self._model.closed:
                    return
            self.cost_s += time.thread_time() - began

    def tick(self) -> None:
        """What the thread does every 50 ms: a window's decision when one is over, else a look at the memory."""
        now = self._clock()
        if now - self._window_began >= self._bounds.window_ms / 1000:
            self._window(now)
            self._window_began = now
            return
        load = self._load(self._sensors.available(), self._sensors.memory.bound())
        if load.there and load.value > 0:
            self._finish(
                {"kind": "urgent", "t": now, "load": load.value}, self._brain.urgent(now, load.value)
            )

    def _window(self, now: float) -> None:
        machine, counted, signals = self._signals(now)
        decisions = self._brain.window(signals)
        self.windows += 1
        line = {
            "kind": "window", "t": now, "signals": signals, "counted": counted,
            "io_pressure": _value(machine.io_pressure), "frequency": _value(machine.frequency),
            "major_faults_per_s": _value(machine.major_faults_per_s),
            "available_bytes": _value(machine.available_bytes),
            **_shown(self._model.native.store()),
        }  # fmt: skip
        self._finish(line, decisions)

    def _finish(self, line: dict[str, Any], decisions: Mapping[str, Any]) -> None:
        line["decisions"], line["knobs"] = decisions, self._brain.knobs
        line["refused"] = self._apply(line["knobs"])
        if self._record is not None:
            self._write(line)
        self._last = {**self._last, **line}

    def _write(self, line: Mapping[str, Any]) -> None:
        """A disk that is full ends the record, not the control."""
        assert self._record is not None
        try:
            self._record.write(line, self._brain.state)
        except OSError as error:
            self._close_record()
            self._last["record_error"] = str(error)

    def _close_record(self) -> None:
        record, self._record = self._record, None
        if record is not None:
            with suppress(OSError):
                record.close()

    def _signals(self, now: float) -> tuple[Machine, dict[str, Any], dict[str, Any]]:
        native = self._model.native
        counts, before = native.statistics(), self._counts
        self._counts = counts
        self._steps, times = native.step_times(self._steps)
        machine = self._sensors.read()
        load = self._load(machine.available_bytes, self._sensors.memory.bound())
        times.sort()
        counted = {name: counts[name] - before[name] for name in _COUNTERS}
        counted.update(slot_bytes=counts["slot_bytes"], slot_capacity_bytes=counts["slot_capacity_bytes"])
        temperature, headroom = machine.temperature_celsius, machine.headroom_celsius
        signals = {
            "t": now,
            "tokens": len(times),
            "mean_ms": 1000 * math.fsum(times) / len(times) if times else None,
            "p50_ms": _percentile(times, 0.5),
            "p95_ms": _percentile(times, 0.95),
            "load": _value(load),
            "load_quality": load.quality,
            "temperature": _value(temperature),
            "temperature_quality": temperature.quality,
            "headroom": _value(headroom),
            "cores": machine.cores,
            "on_battery": _value(machine.on_battery),
            "charge": _value(machine.charge),
            "cpu_pressure": _value(machine.cpu_pressure),
            "memory_pressure": _value(machine.memory_pressure),
        }
        return machine, counted, signals

    def _load(self, available: Reading, bound: float) -> Reading:
        """How much of the reserve is lacking, in notches of the store; negative where there is more."""
        if not available.there:
            return Reading()
        lacking = min(self._bounds.memory_reserve_bytes, bound / 10) - available.value
        return Reading(lacking * self._share() / self._plant.notch_bytes, available.age, available.quality)

    def _share(self) -> float:
        """Of what the running models together have for experts."""
        with _running_lock:
            others = sum(one._plant.most_bytes for one in _running if one is not self)
        own = max(1, self._plant.most_bytes)
        return own / (own + others)

    def _apply(self, knobs: Mapping[str, Any]) -> list[str]:
        """Set what has changed; the knobs that were refused (memory that others have taken) are tried again."""
        refused = []
        for name, value in knobs.items():
            if self._applied.get(name) == value:
                continue
            try:
                self._model.set_knob(name, value)
            except EdgertError:
                refused.append(name)
            else:
                self._applied[name] = value
        return refused


def _shown(store: list[bytes]) -> dict[str, Any]:
    """Experts that are resident by layer, and which, of models that are not too large to look at."""
    resident = [row.count(2) for row in store]
    if sum(map(len, store)) > _MOST_SHOWN:
        return {"resident": resident}
    return {"resident": resident, "store": [row.translate(_DIGITS).decode() for row in store]}


def _value(reading: Reading) -> float | None:
    return None if reading.quality == MISSING else reading.value


def _percentile(times: list[float], share: float) -> float | None:
    """Of sorted seconds, in milliseconds: the nearest rank."""
    return 1000 * times[max(0, math.ceil(share * len(times)) - 1)] if times else None
