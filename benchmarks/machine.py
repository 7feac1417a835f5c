"""What a figure depends on besides the code: the machine's description, the disk and its read-ahead, other processes."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgert.roof import Bandwidths

_MEMORY_BYTES, _READ_ALIGNMENT, _READ_SECONDS = 512 << 20, 4096, 1.0


def describe() -> dict[str, str | int]:
    from edgert import _native

    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _native.cpu_name(),
        "cores": _native.usable_cores(),
        "memory_bytes": pages * page,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def speeds(experts: Path, expert_bytes: int, threads: int, depth: int) -> Bandwidths:
    """What memory, arithmetic and reads of the file `experts` do at this moment: neighbours on a shared machine change
    it by the minute."""
    from edgert import _native

    reads = _native.ReadProbe(str(experts))
    block = -(-expert_bytes // _READ_ALIGNMENT) * _READ_ALIGNMENT
    return Bandwidths(
        _native.measure_memory(threads, min(_MEMORY_BYTES, _native.memory_probe_bytes())),
        reads.measure(
            span_bytes=experts.stat().st_size // block * block,
            block_bytes=block,
            depth=depth,
            random=True,
            direct=reads.takes_direct,
            io_backend="auto",
            seconds=_READ_SECONDS,
        ),
        _native.measure_arithmetic(threads),
    )


class Others:
    """How many processors other processes kept busy since this was made; a figure taken beside them misleads."""

    def __init__(self) -> None:
        self._start = self._now()

    def processors(self) -> float:
        """Call it when the children measured have ended and been waited for."""
        (busy, own, seconds), (busy_before, own_before, start) = self._now(), self._start
        return max(0.0, (busy - busy_before) - (own - own_before)) / (seconds - start)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds that all processors were busy, of them for this process and its children, and the clock."""
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), own, time.monotonic()


def device_number(path: Path) -> str:
    """MAJOR:MINOR of the device that `path` lies on."""
    device = path.stat().st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def disk(path: Path, sys: Path = Path("/sys")) -> Path | None:
    """The folder in /sys of the whole disk that `path` lies on, or of the logical volume or loop device; None where the
    file system has no such device of its own, as overlay, tmpfs, btrfs and network file systems."""
    block = (sys / "dev" / "block" / device_number(path)).resolve()
    # A partition has no queue; its disk is the folder around it.
    return next((folder for folder in (block, block.parent) if (folder / "queue").is_dir()), None)


def read_ahead_file(path: Path, sys: Path = Path("/sys")) -> Path | None:
    """The file in /sys that holds read_ahead_kb of the device that `path` lies on; None if the system has none."""
    whole = disk(path, sys)
    # A file system on several devices has a read-ahead of its own.
    folder = sys / "class" / "bdi" / device_number(path) if whole is None else whole / "queue"
    file = folder / "read_ahead_kb"
    return file if file.exists() else None


@contextmanager
def read_ahead(path: Path, kilobytes: int) -> Iterator[int | None]:
    """Set the read-ahead of mapped files to `kilobytes` where that is permitted; yields the one that holds."""
    file = read_ahead_file(path)
    if file is None:
        yield None
        return
    before = file.read_text()
    try:
        file.write_text(str(kilobytes))
    except OSError:
        yield int(before)
        return
    try:
        yield int(file.read_text())
    finally:
        file.write_text(before)
