"""What happens around a model while it decodes: the scripts of disturbances.py.

A script is a name and what is done when, in shares of the run: at 0.3 a competitor takes memory, at 0.7 it ends. The world
undoes it all.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import limiter

MIB = 1 << 20
_ALLOCATE = (
    "import sys,time\nblocks=[]\nfor mib in map(int,sys.argv[1].split(',')):\n"
    "    blocks.append(bytearray(b'x')*(mib<<20))\n    time.sleep(float(sys.argv[2]))\ntime.sleep(99)\n"
)
_SPIN = "while True: pass"
_AMBIENT, _TRIP, _CONSTANT = 40.0, 80.0, 0.4
_PERIOD_US = 5000  # short: as if the frequency were lower


@dataclass
class World:
    """One worker in its cgroups, and what is done to it."""

    groups: limiter.Groups
    worker: int  # its process
    limit: int  # bytes of memory at the start
    budget: int  # of them the model's
    disk: str | None  # MAJOR:MINOR
    root: Path  # of the sensors that the worker looks at
    seconds: float = 5.0  # of the script
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    lowered: int = 0  # MiB that a competitor holds in place of a limit
    heating: threading.Thread | None = None

    def take(self, mib: int, pieces: int = 8, pause: float = 0.03) -> None:
        """A competitor in the same cgroup takes memory piece by piece."""
        sizes = ",".join([str(max(1, mib // pieces))] * pieces)
        self._start(self.groups.command([sys.executable, "-c", _ALLOCATE, sizes, str(pause)]))

    def spin(self, processes: int) -> None:
        for _ in range(processes):
            self._start([sys.executable, "-c", _SPIN])

    def release(self) -> None:
        """The competitors end."""
        while self.others:
            other = self.others.pop()
            other.kill()
            other.wait()

    def _start(self, command: list[str]) -> None:
        self.others.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def memory_limit(self, bytes_: int) -> None:
        """Version 1 refuses one below what is in use: then a competitor holds the rest, until the limit rises again."""
        for path in self.groups.paths:
            for name in ("memory.limit_in_bytes", "memory.max"):
                if (path / name).exists():
                    try:
                        (path / name).write_text(str(bytes_))
                    except OSError:
                        lacking = (int((path / name).read_text()) - bytes_) // MIB - self.lowered
                        self.lowered += lacking
                        self.take(lacking, 4)
                    else:
                        self.lowered = 0
                        self.release()

    def disk_limit(self, bytes_a_second: int | None) -> None:
        for path in self.groups.paths:
            if (path / "blkio.throttle.read_bps_device").exists():
                (path / "blkio.throttle.read_bps_device").write_text(f"{self.disk} {bytes_a_second or 0}")
            elif (path / "io.max").exists():
                (path / "io.max").write_text(f"{self.disk} rbps={bytes_a_second or 'max'}")

    def cores(self, count: int) -> None:
        """The worker, all its threads, may use the first `count` cores."""
        for thread in os.listdir(f"/proc/{self.worker}/task"):
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(int(thread), range(count))

    # --- a chip that warms up as it works, and is slowed down when it is too hot ------------------------

    def heat(self, degrees_a_core: float) -> None:
        """The time constant is a share of the script, as all its times are."""
        constant_s = _CONSTANT * self.seconds
        self.heating = threading.Thread(target=self._heat, args=(degrees_a_core, constant_s), daemon=True)
        self.heating.start()

    def _heat(self, degrees_a_core: float, constant_s: float) -> None:
        celsius, before, then = 60.0, self._work(), time.monotonic()
        while not self.ended.wait(0.05):
            work, now = self._work(), time.monotonic()
            target = _AMBIENT + degrees_a_core * (work - before) / (now - then)
            celsius += (target - celsius) * min(1.0, (now - then) / constant_s)
            before, then = work, now
            self.temperature(celsius)
            self._throttle(celsius >= _TRIP)

    def _work(self) -> float:
        try:
            fields = Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _throttle(self, hot: bool) -> None:
        for path in self.groups.paths:
            if (path / "cpu.cfs_quota_us").exists():
                (path / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
                (path / "cpu.cfs_quota_us").write_text(str(3 * _PERIOD_US // 10) if hot else "-1")
            elif (path / "cpu.max").exists():
                (path / "cpu.max").write_text(f"{3 * _PERIOD_US // 10 if hot else 'max'} {_PERIOD_US}")

    def temperature(self, celsius: float | str) -> None:
        text = celsius if isinstance(celsius, str) else str(round(celsius * 1000))
        file = self.root / "sys/class/thermal/thermal_zone0/temp"
        if file.exists():
            file.write_text(text + "\n")

    def lose_sensors(self) -> None:
        for name in ("temp", "trip_point_0_temp"):
            (self.root / "sys/class/thermal/thermal_zone0" / name).write_text("")

    def end(self) -> None:
        self.ended.set()
        if self.heating is not None:  # it writes files that go now
            self.heating.join()
        self.release()


Act = tuple[float, Callable[[World], None]]


@dataclass(frozen=True)
class Script:
    name: str
    acts: tuple[Act, ...]
    small: bool = True  # for a model of megabytes too
    large: bool = True


def _take(share: float, pieces: int = 8) -> Callable[[World], None]:
    """Memory: what is free at the start, and this share of the model's budget."""
    return lambda w: w.take(round((w.limit - w.budget * 1.15 + share * w.budget) / MIB), pieces)


def _limit(share: float) -> Callable[[World], None]:
    return lambda w: w.memory_limit(round(w.limit - share * w.budget))


def _disk(rate: int | None) -> Callable[[World], None]:
    return lambda w: w.disk_limit(rate)


def _cores(count: int) -> Callable[[World], None]:
    return lambda w: w.cores(count)


def _spin(count: int) -> Callable[[World], None]:
    return lambda w: w.spin(count)


def _temperature(value: float | str) -> Callable[[World], None]:
    return lambda w: w.temperature(value)


def _release(world: World) -> None:
    world.release()


def _lose(world: World) -> None:
    world.lose_sensors()


def _heat(degrees: float) -> Callable[[World], None]:
    return lambda w: w.heat(degrees)


MB = 1_000_000
SCRIPTS = (
    Script("nothing happens", ()),
    Script("memory: a third of the budget, and back", ((0.25, _take(0.33)), (0.65, _release)), small=False),
    Script("memory: half of the budget at once", ((0.3, _take(0.5, 1)), (0.7, _release)), small=False),
    Script("memory: half of the budget, slowly, to the end", ((0.2, _take(0.5, 24)),), small=False),
    Script("memory: bursts", tuple(
        act for start in (0.2, 0.5, 0.8) for act in ((start, _take(0.3, 2)), (start + 0.15, _release))
    ), small=False),
    Script("memory: limit lowered in steps", (
        (0.2, _limit(0.15)), (0.4, _limit(0.3)), (0.6, _limit(0.45)),
    ), small=False),
    Script("memory: limit lowered, and back", ((0.25, _limit(0.4)), (0.65, _limit(0.0))), small=False),
    Script("cores: half of them", ((0.3, _cores(1)),)),
    Script("cores: half of them, and back", ((0.3, _cores(1)), (0.65, _cores(2)))),
    Script("cores: one other at work", ((0.3, _spin(1)), (0.7, _release))),
    Script("cores: two others at work", ((0.3, _spin(2)), (0.7, _release))),
    Script("cores: others in bursts", tuple(
        act for start in (0.2, 0.45, 0.7) for act in ((start, _spin(2)), (start + 0.1, _release))
    )),
    Script("disk: 2 GB/s to 200 MB/s and back", (
        (0.0, _disk(2000 * MB)), (0.3, _disk(200 * MB)), (0.65, _disk(2000 * MB)),
    ), small=False),
    Script("disk: slower and slower", (
        (0.25, _disk(1500 * MB)), (0.5, _disk(900 * MB)), (0.75, _disk(500 * MB)),
    ), small=False),
    Script("heat: a chip that two cores overheat", ((0.0, _heat(26.0)),)),
    Script("heat: a chip that one core overheats slowly", ((0.0, _heat(45.0)),)),
    Script("heat: and the sensor vanishes", ((0.0, _heat(26.0)), (0.5, _lose))),
    Script("sensors: a lie of 300 degrees", ((0.3, _temperature("300000")), (0.6, _temperature(55.0)))),
    Script("sensors: a lie of -40 degrees", ((0.3, _temperature("-40000")),)),
    Script("sensors: words", ((0.3, _temperature("warm")), (0.6, _temperature(55.0)))),
    Script("half the cores and the memory", (
        (0.25, _cores(1)), (0.4, _take(0.4)), (0.75, _release),
    ), small=False),
    Script("others at work, and the disk slows down", (
        (0.25, _spin(1)), (0.4, _disk(600 * MB)), (0.75, _release), (0.75, _disk(None)),
    ), small=False),
    Script("heat and half the cores", ((0.0, _heat(26.0)), (0.5, _cores(1)))),
)  # fmt: skip
