"""What this machine lacks for models larger than memory, and the line that mends it.

Everything is read from files below `root`, so that a test can make a machine.
"""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgert import _native
from edgert.signals import File, Sensors


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `fix` is empty where nothing is to be done."""

    name: str
    found: str
    why: str = ""  # what it costs
    fix: str = ""

    @property
    def good(self) -> bool:
        return not self.why


def examine(root: str | os.PathLike[str] = "/", bundles: Path | None = None) -> list[Finding]:
    """`bundles`: the folder on whose storage models lie."""
    base = Path(root)
    place = bundles or Path.home()
    checks: tuple[Callable[[Path], Finding], ...] = (
        _memory_cgroup, _pressure, _available, _page_size, lambda root: _storage(root, place), _swap,
        _io_uring, _huge_pages, _governor, _temperatures, _overcommit,
    )  # fmt: skip
    return [check(base) for check in checks]


def _text(path: Path) -> str:
    return File(path).word()


def _is_raspberry_pi(root: Path) -> bool:
    return "Raspberry Pi" in _text(root / "proc/device-tree/model")


def _memory_cgroup(root: Path) -> Finding:
    name = "memory cgroup"
    groups = _native.cgroup_directories("memory", str(root))
    files = ("memory.limit_in_bytes", "memory.max", "memory.current", "cgroup.controllers")
    there = [path for _, path in groups if any((Path(path) / file).exists() for file in files[:3])]
    if there or any("memory" in _text(Path(path) / "cgroup.controllers").split() for _, path in groups):
        return Finding(name, f"version {groups[0][0]}")
    fix = "sudo sed -i 's/$/ cgroup_enable=memory/' /boot/firmware/cmdline.txt && sudo reboot"
    if not _is_raspberry_pi(root):
        fix = "add cgroup_enable=memory to the kernel's command line (GRUB_CMDLINE_LINUX in /etc/default/grub), then sudo update-grub && sudo reboot"
    return Finding(
        name,
        "none",
        "no limit on a service's memory can be set or seen; available memory is watched instead",
        fix,
    )


def _pressure(root: Path) -> Finding:
    name = "pressure (PSI)"
    if (root / "proc/pressure/memory").exists():
        return Finding(name, "memory, io and cpu")
    fix = "sudo sed -i 's/$/ psi=1/' /boot/firmware/cmdline.txt && sudo reboot"
    if not _is_raspberry_pi(root):
        fix = "add psi=1 to the kernel's command line (GRUB_CMDLINE_LINUX in /etc/default/grub), then sudo update-grub && sudo reboot"
    return Finding(
        name,
        "none",
        "the control loop sees shortage of memory later, by what is available and by major faults",
        fix,
    )


def _available(root: Path) -> Finding:
    name, available = "available memory", Sensors(root).available()
    if not available.there:
        return Finding(
            name, "unknown", "--memory auto cannot choose a budget", "state one, such as --memory 2GiB"
        )
    gib = available.value / (1 << 30)
    if gib < 0.5:
        return Finding(
            name,
            f"{gib:.2f} GiB",
            "little is left for experts",
            "end what is not needed: ps --sort=-rss -eo rss,comm | head",
        )
    return Finding(name, f"{gib:.1f} GiB")


def _page_size(root: Path) -> Finding:
    name, size = "page size", _native.page_size()
    if _is_raspberry_pi(root) and "Raspberry Pi 5" in _text(root / "proc/device-tree/model") and size == 4096:
        return Finding(name, f"{size} bytes", "reads and translations are slower than with 16 KiB",
                       "echo kernel=kernel_2712.img | sudo tee -a /boot/firmware/config.txt && sudo reboot")  # fmt: skip
    if size > 16384:
        return Finding(name, f"{size} bytes", "an expert's memory is rounded up to it; bundles are aligned to 16384",
                       f"edgert convert --alignment {size}")  # fmt: skip
    return Finding(name, f"{size} bytes")


def _disk(root: Path, place: Path) -> str | None:
    """The block device of a folder, as the kernel calls it."""
    while not place.exists():
        place = place.parent
    number = place.stat().st_dev
    link = root / "sys/dev/block" / f"{os.major(number)}:{os.minor(number)}"
    if not link.exists():
        return None
    device = link.resolve()
    return device.parent.name if (device / "partition").exists() else device.name


def _storage(root: Path, place: Path) -> Finding:
    name, disk = "storage of the bundles", _disk(root, place)
    if disk is None:
        return Finding(name, "not a block device")
    if disk.startswith("mmcblk"):
        kind = _text(root / "sys/block" / disk / "device/type")
        if kind != "MMC":
            return Finding(name, f"{disk}, an SD card", "experts are read at some 90 MB/s, and the card wears out",
                           "export EDGERT_HOME=/mnt/ssd/edgert  (a folder on an SSD)")  # fmt: skip
        return Finding(name, f"{disk}, eMMC")
    virtual = disk.startswith(("vd", "xvd"))  # of a virtual machine: the word says nothing
    if _text(root / "sys/block" / disk / "queue/rotational") == "1" and not virtual:
        return Finding(name, f"{disk}, said to rotate", "a disk that seeks reads experts at a few MB/s",
                       "export EDGERT_HOME=/mnt/ssd/edgert  (a folder on an SSD)")  # fmt: skip
    return Finding(name, disk)


def _swap(root: Path) -> Finding:
    name = "swap"
    rows = [line.split() for line in _text(root / "proc/swaps").splitlines()[1:] if line.split()]
    if not rows:
        return Finding(name, "none")
    compressed = all("zram" in row[0] for row in rows)
    if compressed:
        return Finding(name, "compressed, in memory")
    swappiness = _text(root / "proc/sys/vm/swappiness")
    if swappiness.isdigit() and int(swappiness) <= 10:
        return Finding(name, f"{rows[0][0]}, swappiness {swappiness}")
    return Finding(name, f"{rows[0][0]}, swappiness {swappiness or 'unknown'}",
                   "experts in memory may be swapped out, and a token then waits for them twice",
                   "echo vm.swappiness=10 | sudo tee /etc/sysctl.d/90-edgert.conf && sudo sysctl --system")  # fmt: skip


def _io_uring(root: Path) -> Finding:
    name = "io_uring"
    if "io_uring" in _native.usable_io_backends():
        return Finding(name, "usable")
    disabled = _text(root / "proc/sys/kernel/io_uring_disabled")
    if disabled in ("1", "2"):
        return Finding(name, f"turned off (kernel.io_uring_disabled = {disabled})", "reads go through threads (pread), which costs little",
                       "sudo sysctl kernel.io_uring_disabled=0")  # fmt: skip
    return Finding(name, f"not usable on {platform.release()}", "reads go through threads (pread), which costs little",
                   "allow io_uring in the container's seccomp profile, or leave it")  # fmt: skip


def _huge_pages(root: Path) -> Finding:
    name, text = "huge pages", _text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    if not text:
        return Finding(name, "none in this kernel")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("madvise", "always"):
        return Finding(name, chosen)
    return Finding(name, chosen or text, "experts lie in small pages: slower to fill and to read",
                   "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled")  # fmt: skip


def _governor(root: Path) -> Finding:
    name = "frequency governor"
    text = _text(root / "sys/devices/system/cpu/cpufreq/policy0/scaling_governor")
    if not text:
        return Finding(name, "none that can be set")
    if text == "powersave" and "intel_pstate" not in _text(
        root / "sys/devices/system/cpu/cpufreq/policy0/scaling_driver"
    ):
        return Finding(name, text, "the processor stays at its lowest frequency",
                       "echo schedutil | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor")  # fmt: skip
    return Finding(name, text)


def _temperatures(root: Path) -> Finding:
    sensors = Sensors(root).temperatures
    reading, _ = sensors.read()
    if reading.there:
        return Finding(
            "temperature", f"{reading.value:.0f} °C at the hottest of {len(sensors.sensors)} sensors"
        )
    return Finding("temperature", "no sensor", "heat is not controlled",
                   "sudo modprobe coretemp || sudo modprobe k10temp  (a virtual machine has none)")  # fmt: skip


def _overcommit(root: Path) -> Finding:
    name, text = "overcommit", _text(root / "proc/sys/vm/overcommit_memory")
    if text == "2":
        return Finding(name, "strict (2)", "address space that is not used yet counts as memory: large budgets may be refused",
                       "sudo sysctl vm.overcommit_memory=0")  # fmt: skip
    return Finding(name, {"0": "heuristic (0)", "1": "always (1)"}.get(text, text or "unknown"))
