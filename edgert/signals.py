"""What can be sensed of the machine and of this process, each signal with its age and how far it can be believed.

Every source is optional. A number that is out of all range, goes backwards or stands still where it cannot is missing; where
one of several sources of a signal has gone, what is left is only a lower bound of the load ("at-least"). The files are opened
once and read anew in every window; what changes slowly is read seldom, and its age says so. `root` is where /proc and /sys
are looked up, for tests.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgert import _native

EXACT, AT_LEAST, MISSING = "exact", "at-least", "missing"
_CHUNK = 4096  # of a file: what is needed stands at its beginning
_PLAUSIBLE_CELSIUS = (-30.0, 125.0)
_BATTERY_S, _FREQUENCY_S = 5.0, 1.0  # between two readings: a driver may take milliseconds to answer
_ABSENT_READS = 20  # a file that is not there is looked for again after so many
_STUCK_AFTER = 240  # readings: a temperature that shows no change for so long is not measured any more


@dataclass(frozen=True, slots=True)
class Reading:
    """A signal: its value, the seconds since it was measured, and exact, at-least (of a load: it may be more) or missing."""

    value: float = math.nan
    age: float = math.inf
    quality: str = MISSING

    @property
    def there(self) -> bool:
        return self.quality != MISSING


NOTHING = Reading()


class File:
    """A file of the kernel's, kept open. read() gives its beginning, None while it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._absent = 0  # reads left until it is looked for again

    def read(self) -> bytes | None:
        if self._absent:
            self._absent -= 1
            return None
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._descriptor, _CHUNK, 0)
        except FileNotFoundError:
            self._absent = _ABSENT_READS
            return None
        except OSError:
            self.close()
            return None

    def word(self) -> str:
        return (self.read() or b"").decode("ascii", "replace").strip()

    def number(self) -> float | None:
        text = self.read()
        try:
            value = None if text is None else float(text)
        except ValueError:
            return None
        return value if value is not None and math.isfinite(value) else None

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def field(text: bytes | None, key: bytes) -> float | None:
    """The number behind `key` in lines of "key value" or "key: value"."""
    if text is None:
        return None
    at = 0 if text.startswith(key) else text.find(b"\n" + key) + 1
    end = at + len(key)
    if (at == 0 and not text.startswith(key)) or text[end : end + 1] not in (b":", b" "):
        return None
    try:
        return float(text[end + 1 : end + 40].split(None, 1)[0])
    except (ValueError, IndexError):
        return None


class Counter:
    """What a total grew by a second, from one reading to the next."""

    def __init__(self, total: Callable[[], float | None], most: float = math.inf) -> None:
        self._total, self._most = total, most
        self._before: tuple[float, float] | None = None

    def read(self, now: float) -> Reading:
        value, before = self._total(), self._before
        self._before = None if value is None or value < 0 else (now, value)
        if value is None or value < 0 or before is None or now <= before[0]:
            return NOTHING
        rate = (value - before[1]) / (now - before[0])
        return Reading(rate, 0.0, EXACT) if 0 <= rate <= self._most else NOTHING


class Memory:
    """Bytes that this process may still take: the least of MemAvailable and what every cgroup above it leaves.

    Of a source that was there and is gone, the others do not know: what they say is then more than there may be.
    """

    def __init__(self, root: Path) -> None:
        self._meminfo = File(root / "proc/meminfo")
        self._groups = [_Group(version, path) for version, path in _groups(root)]
        self._seen: set[int] = set()
        self._bound = math.inf

    def read(self) -> Reading:
        text = self._meminfo.read()
        kib, total = field(text, b"MemAvailable"), field(text, b"MemTotal") or math.inf
        found: list[float | None] = [kib * 1024 if kib is not None and 0 <= kib <= total else None]
        limits = [total * 1024]
        for group in self._groups:
            limit, left = group.read()
            limits.append(limit)
            found.append(left)
        there = {index for index, value in enumerate(found) if value is not None}
        self._seen |= there
        known = [value for value in found if value is not None and math.isfinite(value)]
        self._bound = min(limits)
        if not known:
            return NOTHING
        return Reading(min(known), 0.0, EXACT if self._seen <= there else AT_LEAST)

    def bound(self) -> float:
        """What bounds this process, in bytes, as last read: its smallest cgroup limit, or the machine's memory."""
        return self._bound


class _Limit:
    """A file with a number of bytes, or with a word where there is no limit; what it said last is not parsed again."""

    def __init__(self, path: Path) -> None:
        self._file = File(path)
        self._text: bytes | None = None
        self._value = math.inf

    def read(self) -> float | None:
        text = self._file.read()
        if text is not None and text != self._text:
            self._text, self._value = text, _limit(text)
        return None if text is None else self._value


class _Group:
    """A memory cgroup of version 1 or 2."""

    def __init__(self, version: int, path: Path) -> None:
        first = version == 1
        names = ["memory.limit_in_bytes"] if first else ["memory.max", "memory.high"]
        self._limits = [_Limit(path / name) for name in names]
        self._usage = File(path / ("memory.usage_in_bytes" if first else "memory.current"))
        self._stat = File(path / "memory.stat")
        self._cache = b"total_inactive_file" if first else b"inactive_file"

    def read(self) -> tuple[float, float | None]:
        """(limit, bytes left below it): infinite without a limit, none where it cannot be read."""
        found = [limit for file in self._limits if (limit := file.read()) is not None]
        if not found:
            return math.inf, None
        limit = min(found)
        if limit == math.inf:
            return limit, math.inf
        usage = self._usage.number()
        if usage is None or usage < 0:
            return limit, None
        cache = field(self._stat.read(), self._cache) or 0.0
        return limit, max(0.0, limit - (usage - min(usage, max(0.0, cache))))


def _limit(text: bytes) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.inf  # "max"
    return value if 0 <= value < 1 << 60 else math.inf


def _groups(root: Path, controller: str = "memory") -> list[tuple[int, Path]]:
    """(version, directory) of every group above this process."""
    return [(version, Path(path)) for version, path in _native.cgroup_directories(controller, str(root))]


@dataclass
class _Sensor:
    """One temperature. What stands still for long is not believed, but for one that has never moved."""

    file: File
    trip: float  # where the system slows the processor down; infinite: unknown
    seen: bool = False
    last: float = math.nan
    unchanged: int = 0
    moved: bool = False

    def read(self) -> float | None:
        raw = self.file.number()
        celsius = None if raw is None else raw / 1000
        if celsius is None or not _PLAUSIBLE_CELSIUS[0] <= celsius <= _PLAUSIBLE_CELSIUS[1]:
            return None
        self.seen = True
        if celsius == self.last:
            self.unchanged += 1
        else:
            self.moved |= not math.isnan(self.last)
            self.last, self.unchanged = celsius, 0
        return None if self.moved and self.unchanged >= _STUCK_AFTER else celsius


class Temperatures:
    """Of the hottest sensor, and of the smallest distance to where the system slows down."""

    def __init__(self, root: Path) -> None:
        self.sensors = list(_sensors(root))

    def read(self) -> tuple[Reading, Reading]:
        """(degrees Celsius, headroom in degrees). A sensor that was there and is gone makes it at least what is left."""
        found = [(sensor, sensor.read()) for sensor in self.sensors]
        there = [(sensor, value) for sensor, value in found if value is not None]
        if not there:
            return NOTHING, NOTHING
        gone = any(value is None and sensor.seen for sensor, value in found)
        quality = AT_LEAST if gone else EXACT
        headrooms = [sensor.trip - value for sensor, value in there if math.isfinite(sensor.trip)]
        headroom = Reading(min(headrooms), 0.0, quality) if headrooms else NOTHING
        return Reading(max(value for _, value in there), 0.0, quality), headroom


def _sensors(root: Path) -> Iterator[_Sensor]:
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    for zone in zones:
        trips = [_trip(path) for path in zone.glob("trip_point_*_type")]
        yield _Sensor(File(zone / "temp"), min(trips, default=math.inf))
    if not zones:  # a PC: the processor's own
        for file in sorted((root / "sys/class/hwmon").glob("hwmon*/temp*_input")):
            yield _Sensor(File(file), math.inf)


def _trip(kind: Path) -> float:
    """Of a passive trip point, in degrees Celsius; infinite for others."""
    value = File(kind.with_name(kind.name.replace("_type", "_temp"))).number()
    plausible = value is not None and 20_000 <= value <= 130_000
    return value / 1000 if value is not None and plausible and File(kind).word() == "passive" else math.inf


class Power:
    """The battery: whether the machine runs on it, and its charge from 0 to 1; missing where there is none."""

    def __init__(self, root: Path) -> None:
        supplies = sorted((root / "sys/class/power_supply").glob("*"))
        batteries = [path for path in supplies if File(path / "type").word() == "Battery"]
        self._status = [File(path / "status") for path in batteries]
        self._capacity = [File(path / "capacity") for path in batteries]

    def read(self) -> tuple[Reading, Reading]:
        words = [word for file in self._status if (word := file.word())]
        shares = [value / 100 for file in self._capacity if (value := file.number()) is not None]
        shares = [share for share in shares if 0 <= share <= 1]
        discharging = Reading(float("Discharging" in words), 0.0, EXACT) if words else NOTHING
        return discharging, Reading(min(shares), 0.0, EXACT) if shares else NOTHING


class Frequencies:
    """Of the processor, as a share of the most that it can run at."""

    def __init__(self, root: Path) -> None:
        policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
        self._now = [File(path / "scaling_cur_freq") for path in policies]
        self._most = [File(path / "cpuinfo_max_freq").number() for path in policies]

    def read(self) -> Reading:
        shares = [
            now / most
            for file, most in zip(self._now, self._most, strict=True)
            if most and (now := file.number()) is not None
        ]
        shares = [share for share in shares if 0 < share < 2]
        return Reading(max(shares), 0.0, EXACT) if shares else NOTHING


class Cores:
    """That this process may use: its affinity, and whole cores of what every cgroup above it grants."""

    def __init__(self, root: Path) -> None:
        self._quotas = [
            _Quota(
                [path / "cpu.cfs_quota_us", path / "cpu.cfs_period_us"]
                if version == 1
                else [path / "cpu.max"]
            )
            for version, path in _groups(root, "cpu")
        ]

    def read(self) -> int:
        return min([len(os.sched_getaffinity(0)), *(quota.read() for quota in self._quotas)])


class _Quota:
    """Microseconds of the processor in a period; a pool that is throttled in mid-job is worse than one core fewer."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = [File(path) for path in paths]
        self._text = b""
        self._cores = sys.maxsize

    def read(self) -> int:
        text = b" ".join([file.read() or b"" for file in self._files])
        if text != self._text:
            self._text, self._cores = text, _quota(text)
        return self._cores


def _quota(text: bytes) -> int:
    try:
        quota, period = map(int, text.split())
    except ValueError:
        return sys.maxsize  # "max 100000"
    return max(1, quota // period) if quota > 0 and period > 0 else sys.maxsize


class Seldom:
    """What is read at most once in so many seconds, and grows older in between."""

    def __init__(self, read: Callable[[], tuple[Reading, ...]], every_s: float) -> None:
        self._read, self._every_s = read, every_s
        self._last: tuple[Reading, ...] = ()
        self._at = -math.inf

    def read(self, now: float) -> tuple[Reading, ...]:
        age = now - self._at
        if not 0 <= age < self._every_s:
            self._last, self._at = self._read(), now
            return self._last
        return tuple([Reading(last.value, last.age + age, last.quality) for last in self._last])


@dataclass(frozen=True, slots=True)
class Machine:
    """One reading of everything. Pressures are shares of the time in which some task waited."""

    t: float
    available_bytes: Reading
    memory_pressure: Reading
    io_pressure: Reading
    cpu_pressure: Reading
    major_faults_per_s: Reading  # this process's own
    temperature_celsius: Reading
    headroom_celsius: Reading  # to where the system slows the processor down
    frequency: Reading
    on_battery: Reading
    charge: Reading
    cores: int  # that this process may use now


class Sensors:
    """All signals of the machine; one thread at a time."""

    def __init__(
        self, root: str | os.PathLike[str] = "/", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._root, self._clock = Path(root), clock
        self.memory = Memory(self._root)
        self._pressures = [
            Counter(_pressure(self._root / "proc/pressure" / name), most=1.5)
            for name in ("memory", "io", "cpu")
        ]
        self._faults = Counter(_major_faults(self._root / "proc/self/stat"))
        self.temperatures = Temperatures(self._root)
        frequencies, power = Frequencies(self._root), Power(self._root)
        self._frequency = Seldom(lambda: (frequencies.read(),), _FREQUENCY_S)
        self._power = Seldom(power.read, _BATTERY_S)
        self._cores = Cores(self._root)

    def available(self) -> Reading:
        """The signal that must be known soonest, alone."""
        return self.memory.read()

    def read(self) -> Machine:
        now = self._clock()
        available = self.memory.read()
        memory, io, cpu = (counter.read(now) for counter in self._pressures)
        temperature, headroom = self.temperatures.read()
        on_battery, charge = self._power.read(now)
        (frequency,) = self._frequency.read(now)
        return Machine(
            now, available, memory, io, cpu, self._faults.read(now), temperature, headroom,
            frequency, on_battery, charge, self._cores.read(),
        )  # fmt: skip


def _pressure(path: Path) -> Callable[[], float | None]:
    """Seconds in which some task waited, so far."""
    file = File(path)

    def total() -> float | None:
        text = file.read()
        if text is None or not text.startswith(b"some"):
            return None
        try:  # of the first line: the second says when every task waited
            return float(text[text.index(b"total=") + 6 :].split(None, 1)[0]) / 1e6
        except (IndexError, ValueError):
            return None

    return total


def _major_faults(path: Path) -> Callable[[], float | None]:
    file = File(path)

    def total() -> float | None:
        text = file.read()
        try:  # behind the name in brackets, which may hold spaces
            return None if text is None else float(text.rpartition(b")")[2].split(None, 10)[9])
        except (IndexError, ValueError):
            return None

    return total
