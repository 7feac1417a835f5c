"""Measuring this machine: memory, int8 arithmetic, storage."""

import contextlib
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from edgert import _native
from edgert.devices import this_machine
from edgert.errors import EdgertError, NotFoundError, StorageError
from edgert.machine import (
    EXTENT_BYTES,
    VERSION,
    BackendSpeed,
    Identity,
    MachineProfile,
    ReadSpeed,
    StorageSpeed,
    ThreadSpeed,
    fingerprint,
    winner,
)
from edgert.units import format_bytes

_CHUNK_BYTES = 8 << 20  # of the file, synced as it is written, so that little of it is in memory
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Effort:
    """How much is measured. The defaults take about a minute."""

    memory_bytes: int = 0  # 0: what the caches and the free memory suggest
    file_bytes: int = 2 << 30  # less where the disk is nearly full
    read_seconds: float = 0.4  # of a combination
    passes: int = 2  # over all combinations; the better one counts
    contests: int = 4  # of the ways to read, which take turns; likewise
    block_bytes: tuple[int, ...] = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
    depths: tuple[int, ...] = (1, 2, 4, 8, 16)

    @property
    def least_file_bytes(self) -> int:
        return min(self.file_bytes, 32 * max(self.block_bytes))


def probe(
    directory: Path, *, effort: Effort | None = None, progress: Progress | None = None
) -> MachineProfile:
    """Measure memory, arithmetic and the storage that `directory` lies on; progress(done, total) counts steps.

    A temporary file is written there and gone however this ends. Raises NotFoundError where there is no such directory,
    StorageError where it has no room or cannot be written or read.
    """
    effort = effort or Effort()
    if not directory.is_dir():
        raise NotFoundError(f"{directory}: no such directory to measure")
    isa = _native.Runtime(
        1 << 20, threads=1, io_threads=1
    ).isa  # first: EDGERT_ISA may name one that is not here
    steps = _Steps(len(thread_counts()) + 1 + _measurements(effort), progress)
    machine = this_machine()
    with temporary_file(directory, effort) as (reads, file_bytes):
        steps.advance()
        storage = _storage(directory, reads, file_bytes, effort, steps)
    threads = tuple(_threads(count, effort, steps) for count in thread_counts())
    return MachineProfile(
        version=VERSION,
        probed=datetime.now(UTC).replace(microsecond=0),
        isa=isa,
        machine=Identity(
            fingerprint(),
            machine.arch,
            _printable(_native.cpu_name()),
            machine.cores,
            machine.memory_bytes >> 20,
        ),
        storage=storage,
        threads=threads,
    )


def thread_counts() -> list[int]:
    """1, 2, 4, … and all usable cores."""
    cores = _native.usable_cores()
    return sorted({*(1 << power for power in range(cores.bit_length())), cores})


@contextmanager
def temporary_file(directory: Path, effort: Effort) -> Iterator[tuple[_native.ReadProbe, int]]:
    """A file of random bytes to read, and its size. It has no name by the time that it holds anything, so that nothing
    of it can stay behind."""
    stats = os.statvfs(directory)
    size = min(effort.file_bytes, stats.f_bavail * stats.f_frsize // 2) // _CHUNK_BYTES * _CHUNK_BYTES
    if size < effort.least_file_bytes:
        raise StorageError(
            f"{directory}: {format_bytes(stats.f_bavail * stats.f_frsize)} are free, and the probe needs "
            f"{format_bytes(2 * effort.least_file_bytes)}; name another directory with --path"
        )
    try:
        with _no_interrupts():
            descriptor, name = tempfile.mkstemp(prefix=".edgert-probe-", dir=directory)
            try:
                reads = _native.ReadProbe(name)
            except EdgertError:
                os.close(descriptor)
                raise
            finally:
                os.unlink(name)
    except EdgertError:  # some of which are OSErrors, with a text of their own
        raise
    except OSError as error:
        raise StorageError(f"{directory}: cannot be written: {error.strerror}") from None
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        try:
            for start in range(0, size, _CHUNK_BYTES):
                _write(file.fileno(), os.urandom(_CHUNK_BYTES))
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), start, _CHUNK_BYTES, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise StorageError(f"{directory}: cannot be written: {error.strerror}") from None
        yield reads, size


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Signals that end the process come after this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _patterns(effort: Effort) -> list[tuple[int, int]]:
    return [(block, depth) for block in effort.block_bytes for depth in effort.depths]


def _contest_patterns(effort: Effort) -> list[tuple[int, int]]:
    """As models read: whole experts, with the usual number of them in flight."""
    depth = max(depth for depth in effort.depths if depth <= 4)
    return [(block, depth) for block in effort.block_bytes if block >= EXTENT_BYTES]


def _measurements(effort: Effort) -> int:
    """Of storage, where everything is to be had."""
    contest = effort.contests * len(_contest_patterns(effort)) * 2 * len(_native.usable_io_backends())
    return contest + effort.passes * (2 * len(_patterns(effort)) + 1)


def _storage(
    directory: Path, reads: _native.ReadProbe, file_bytes: int, effort: Effort, steps: "_Steps"
) -> StorageSpeed:
    def measure(block: int, depth: int, direct: bool, io_backend: str, random: bool = True) -> float:
        speed = reads.measure(
            span_bytes=file_bytes,
            block_bytes=block,
            depth=depth,
            random=random,
            direct=direct,
            io_backend=io_backend,
            seconds=effort.read_seconds,
        )
        steps.advance()
        return speed / 1e6

    modes = (False, True) if reads.takes_direct else (False,)
    backends = _compare(measure, modes, effort)
    best = winner(backends)
    rows: dict[tuple[int, int, bool], float] = {}
    sequential = 0.0
    for _ in range(effort.passes):
        for direct in modes:
            for block, depth in _patterns(effort):
                place = block, depth, direct
                rows[place] = max(rows.get(place, 0.0), measure(block, depth, direct, best.io_backend))
        largest = max(effort.block_bytes)
        sequential = max(
            sequential, measure(largest, 4, best.direct_io == "on", best.io_backend, random=False)
        )
    return StorageSpeed(
        path=str(directory.resolve()).encode("utf-8", "replace").decode(),
        filesystem=_filesystem(directory),
        file_mib=file_bytes >> 20,
        io_backend=best.io_backend,
        direct_io=best.direct_io,
        sequential_mb_per_s=sequential,
        backends=backends,
        reads=tuple(
            ReadSpeed(block >> 10, depth, rows[block, depth, False], rows.get((block, depth, True)))
            for block, depth in _patterns(effort)
        ),
    )


def _compare(
    measure: Callable[[int, int, bool, str], float], modes: tuple[bool, ...], effort: Effort
) -> tuple[BackendSpeed, ...]:
    """Every way to read, in turns: what other programs do meanwhile meets all of them."""
    ways = [(backend, direct) for backend in _native.usable_io_backends() for direct in modes]
    speeds: dict[tuple[str, bool], dict[int, list[float]]] = {way: {} for way in ways}
    seconds = dict.fromkeys(ways, 0.0)  # of the processor
    megabytes = dict.fromkeys(ways, 0.0)
    for _ in range(effort.contests):
        for block, depth in _contest_patterns(effort):
            for backend, direct in ways:
                start, cpu_start = time.perf_counter(), time.process_time()
                speed = measure(block, depth, direct, backend)
                seconds[backend, direct] += time.process_time() - cpu_start
                megabytes[backend, direct] += speed * (time.perf_counter() - start)
                speeds[backend, direct].setdefault(block, []).append(speed)
    return tuple(
        BackendSpeed(
            backend,
            "on" if direct else "off",
            statistics.geometric_mean(max(of_block) for of_block in speeds[backend, direct].values()),
            1e6 * seconds[backend, direct] / megabytes[backend, direct],
        )
        for backend, direct in ways
    )


def _threads(count: int, effort: Effort, steps: "_Steps") -> ThreadSpeed:
    memory = _native.measure_memory(count, effort.memory_bytes or _native.memory_probe_bytes())
    arithmetic = _native.measure_arithmetic(count)
    steps.advance()
    return ThreadSpeed(count, memory / 1e6, arithmetic / 1e9)


def _filesystem(directory: Path) -> str:
    """Its type, such as ext4: that of the longest mount point above."""
    real = directory.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if real.is_relative_to(part.mountpoint)]
    with contextlib.suppress(ValueError):
        return _printable(max(mounts, key=lambda part: len(part.mountpoint)).fstype)
    return "unknown"


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable()) or "unknown"


class _Steps:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def advance(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, max(self._done, self._total))
