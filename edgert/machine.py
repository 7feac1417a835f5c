"""What this machine was measured to do: the file that `edgert devices probe` writes and the runtime and `plan` read.

docs/devices.md documents the file. It is read strictly, and only believed on the machine that it was measured on.
"""

import errno
import hashlib
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgert import _native, settings
from edgert.devices import this_machine
from edgert.errors import InvalidArgumentError, StorageError
from edgert.strict_toml import choice, dumps, number, read_toml, section

VERSION = 2  # of the file; another one is measured anew
EXTENT_BYTES = 1 << 20  # about what one expert takes; the settings are chosen for reads of it
_ENOUGH = 0.97  # of the best, for which fewer reads in flight are preferred
_WIN = 1.05  # times as fast: less may be chance


@dataclass(frozen=True)
class Identity:
    fingerprint: str  # of what tells machines apart
    arch: str
    cpu: str
    cores: int = number(1, 1 << 16)  # those that the probe could use
    memory_mib: int = number(1, 1 << 24)


@dataclass(frozen=True)
class ThreadSpeed:
    threads: int = number(1, 1024)
    memory_read_mb_per_s: float = number(1, 1e8)
    int8_gops: float = number(1e-3, 1e7)  # a multiply-add is two operations


@dataclass(frozen=True)
class ReadSpeed:
    """Random reads through this library's own reader."""

    block_kib: int = number(4, 1 << 20)
    depth: int = number(1, 256)  # reads in flight
    buffered_mb_per_s: float = number(1e-3, 1e7)
    direct_mb_per_s: float | None = number(1e-3, 1e7, default=None)  # none where the file system takes none


@dataclass(frozen=True)
class BackendSpeed:
    """The reads that models do, in one of the ways to do them."""

    io_backend: str = choice("pread", "io_uring")
    direct_io: str = choice("on", "off")
    mb_per_s: float = number(1e-3, 1e7)
    cpu_ms_per_gb: float = number(0, 1e9)  # of all threads


@dataclass(frozen=True)
class StorageSpeed:
    path: str  # a directory on what was measured
    filesystem: str
    file_mib: int = number(1, 1 << 24)  # the file that was read
    io_backend: str = choice("pread", "io_uring")  # which of the two won
    direct_io: str = choice("on", "off")  # likewise
    sequential_mb_per_s: float = number(1e-3, 1e7)
    backends: tuple[BackendSpeed, ...] = ()  # what was compared
    reads: tuple[ReadSpeed, ...] = ()  # every block with every depth

    def read_mb_per_s(self, block_bytes: float, depth: float) -> float:
        """Random reads of `block_bytes` with `depth` in flight: between what was measured, on logarithmic scales; outside
        of it, the nearest."""
        blocks = sorted({row.block_kib << 10 for row in self.reads})
        depths = sorted({row.depth for row in self.reads})
        speeds = {(row.block_kib << 10, row.depth): self._speed(row) for row in self.reads}

        def at_depth(count: int) -> float:
            return interpolate(block_bytes, [(block, speeds[block, count]) for block in blocks])

        return interpolate(depth, [(count, at_depth(count)) for count in depths])

    def best_depth(self) -> int:
        """The fewest reads in flight that read extents about as fast as any."""
        speeds = {row.depth: self.read_mb_per_s(EXTENT_BYTES, row.depth) for row in self.reads}
        return min(depth for depth, speed in speeds.items() if speed >= _ENOUGH * max(speeds.values()))

    def _speed(self, row: ReadSpeed) -> float:
        direct = row.direct_mb_per_s
        return direct if self.direct_io == "on" and direct is not None else row.buffered_mb_per_s


@dataclass(frozen=True)
class MachineProfile:
    probed: datetime
    isa: str
    machine: Identity
    storage: StorageSpeed
    version: int = number(VERSION, VERSION)
    threads: tuple[ThreadSpeed, ...] = ()

    @property
    def age(self) -> timedelta:
        return max(datetime.now(UTC) - self.probed, timedelta(0))

    @property
    def is_this_machine(self) -> bool:
        return self.machine.fingerprint == fingerprint()

    def describe_age(self) -> str:
        days = self.age.days
        return "today" if days == 0 else "yesterday" if days == 1 else f"{days} days ago"

    def covers(self, bundle: Path) -> bool:
        """Whether a bundle lies on the storage that was measured."""
        try:
            return os.stat(self.storage.path).st_dev == bundle.stat().st_dev
        except OSError:
            return False

    def knobs(self, bundle: Path) -> dict[str, Any]:
        """Settings for a bundle: what won here, where they hold for it."""
        if not self.covers(bundle):
            return {}
        knobs: dict[str, Any] = {"io_threads": self.storage.best_depth()}
        # A container may forbid what won outside.
        if self.storage.io_backend in _native.usable_io_backends():
            knobs["io_backend"] = self.storage.io_backend
        if self.storage.direct_io == "off":
            knobs["direct_io"] = "off"
        return knobs


def machine_file() -> Path:
    return settings.home() / "machine.toml"


def load_machine(path: Path | None = None) -> MachineProfile | None:
    """The profile in `path` (default: this machine's own); None where there is none.

    Raises InvalidArgumentError for a file that breaks the rules of docs/devices.md; it says to probe again.
    """
    file = machine_file() if path is None else path
    if not file.is_file():
        return None
    try:
        profile = section(MachineProfile, read_toml(file), str(file))
        _check(profile, str(file))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"{error} (`edgert devices probe` writes the file anew; removing it does no harm)"
        ) from None
    return profile


def measured() -> MachineProfile | None:
    """The profile of this very machine, if it has been probed; None for one that was copied from another, and with a
    RuntimeWarning for one that cannot be read: it makes models faster, and none needs it to run."""
    try:
        profile = load_machine()
    except (InvalidArgumentError, OSError) as error:
        text = f"this machine counts as not measured: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=1)  # always of one place, and so shown once
        return None
    return profile if profile is not None and profile.is_this_machine else None


def check_writable(path: Path) -> None:
    """Raise StorageError where save_machine() would fail; leaves nothing."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}; name another file") from None


def save_machine(profile: MachineProfile, path: Path) -> None:
    """Write `profile`, replacing a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write("# Written by `edgert devices probe`; docs/devices.md explains it.\n" + dumps(profile))
            file.flush()
            os.fsync(file.fileno())  # else a loss of power may leave an empty file under the name
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def fingerprint() -> str:
    """16 hexadecimal digits that differ from machine to machine and stay the same on one."""
    try:
        machine_id = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        machine_id = platform.node()
    machine = this_machine()
    parts = ("edgert", machine_id, machine.arch, _native.cpu_name(), machine.board, str(os.cpu_count()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def winner(speeds: Sequence[BackendSpeed]) -> BackendSpeed:
    """What to read with: what is faster by more than chance, else direct reads, which leave the page cache alone, and
    pread, which costs no more time of the processor: it wakes one thread for a read, io_uring two or three."""
    fastest = max(row.mb_per_s for row in speeds)
    equal = [row for row in speeds if row.mb_per_s * _WIN >= fastest]
    return max(equal, key=lambda row: (row.direct_io == "on", row.io_backend == "pread"))


def interpolate(x: float, points: Sequence[tuple[float, float]]) -> float:
    """The value at `x` between `points` (x rising, all positive), on logarithmic scales; outside, the nearest's."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 * math.pow(y1 / y0, math.log(x / x0) / math.log(x1 / x0))
    return points[-1][1]


def _check(profile: MachineProfile, file: str) -> None:
    def refuse(key: str, found: object, allowed: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"{file}: key {key}: found {found!r:.60}, allowed is {allowed}")

    counts = [row.threads for row in profile.threads]
    if not counts or counts != sorted(set(counts)):
        raise refuse("threads", counts, "a table or more, of rising numbers of threads")
    places = [(row.block_kib, row.depth) for row in profile.storage.reads]
    blocks, depths = {block for block, _ in places}, {depth for _, depth in places}
    if not places or sorted(places) != sorted((block, depth) for block in blocks for depth in depths):
        raise refuse("storage.reads", f"{len(places)} tables", "one for every block with every depth")
    if profile.storage.direct_io == "on" and any(
        row.direct_mb_per_s is None for row in profile.storage.reads
    ):
        raise refuse("storage.direct_io", "on", "off, for direct reads were not measured")
