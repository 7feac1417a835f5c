"""Device profiles: what a machine offers, and what a bundle for it should be like.

A profile is one TOML file, documented in docs/devices.md. It is read strictly: a key that is missing, unknown or
out of range is refused with the file and the key.
"""

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert import _native
from edgert.errors import InvalidArgumentError, NotFoundError
from edgert.strict_toml import choice, number, read_toml, section

PROFILES = Path(__file__).parent / "devices"


def _format() -> Any:
    return choice(*(row["name"] for row in _native.formats() if row["packs_floats"]))


def _isa() -> Any:
    return choice(*(row for knob in _native.knobs() if knob["name"] == "isa" for row in knob["choices"][1:]))


@dataclass(frozen=True)
class Cpu:
    arch: str = choice("x86_64", "aarch64")  # as `uname -m` says
    isa: str = _isa()  # the kernels that every such machine runs
    cores: int = number(1, 1024)
    page_size_bytes: int = number(4096, 1 << 16)


@dataclass(frozen=True)
class Memory:
    total_mib: int = number(64, 1 << 24)
    bandwidth_mb_per_s: float = number(1, 1e7)  # peak, MB = 10**6 bytes


@dataclass(frozen=True)
class Storage:
    kind: str = choice("nvme", "sata-ssd", "ufs", "emmc", "sd-card")
    sequential_read_mb_per_s: float = number(1, 1e6)
    random_read_mb_per_s: float = number(1, 1e6)  # extents of about 1 MiB at random offsets, four in flight


@dataclass(frozen=True)
class Thermal:
    throttle_celsius: float = number(0, 150)  # of the processor: where it begins to slow down
    critical_celsius: float = number(0, 150)  # where it is slowed to the utmost or switched off


@dataclass(frozen=True)
class Bundle:
    """The choices of `edgert convert --device`."""

    dense_format: str = _format()
    expert_format: str = _format()
    embedding_format: str = _format()
    output_format: str = _format()
    alignment_bytes: int = number(4096, 1 << 20)
    context_tokens: int = number(1, 2**31 - 1)
    memory_mib: int | None = number(1, 1 << 24, default=None)  # None: as much as the machine has free


@dataclass(frozen=True)
class Bounds:
    """The bands in which the controllers keep the machine: they slow down above `high`, may speed up below `low`."""

    token_time_low_ms: float = number(0, 1e6)
    token_time_high_ms: float = number(0, 1e6)
    temperature_low_celsius: float = number(0, 150)
    temperature_high_celsius: float = number(0, 150)


@dataclass(frozen=True)
class Control:
    """How `--control auto` keeps them."""

    memory_reserve_mib: int = number(0, 1 << 24)  # left to others, at most a tenth of what there is
    save_power: str = choice("never", "on-battery", "always")  # give up speed that nobody needs
    low_charge_percent: float = number(0, 100)  # of the battery: below it one thread computes
    window_ms: float = number(20, 60_000)  # time between decisions


@dataclass(frozen=True)
class Device:
    name: str
    title: str
    boards: tuple[str, ...]  # parts of /proc/device-tree/model that name this very device
    cpu: Cpu
    memory: Memory
    storage: Storage
    thermal: Thermal
    bundle: Bundle
    bounds: Bounds
    control: Control


@dataclass(frozen=True)
class Machine:
    """What tells machines apart; `board` is empty where the firmware names none."""

    arch: str
    cores: int
    memory_bytes: int
    board: str


def device_names() -> list[str]:
    """The profiles that come with edgert, in alphabetical order."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def load_device(name: str | os.PathLike[str]) -> Device:
    """Return a profile by its name, or by the path of a file that ends in .toml.

    Raises NotFoundError, or InvalidArgumentError for a profile that breaks the rules of docs/devices.md.
    """
    if os.fspath(name).endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise NotFoundError(f"{path}: no such device profile")
    elif name in device_names():
        path = PROFILES / f"{name}.toml"
    else:
        raise NotFoundError(f"device {os.fspath(name)!r} is unknown; known are {', '.join(device_names())}")
    device = section(Device, read_toml(path), str(path))
    _check_relations(device, str(path))
    return device


def this_machine() -> Machine:
    try:
        board = Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace").rstrip("\0\n")
    except OSError:
        board = ""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(platform.machine(), _native.usable_cores(), memory_bytes, board)


def resemble(machine: Machine | None = None) -> Device:
    """Return the profile closest to `machine` (default: this one).

    A board that a profile names decides. Otherwise the same architecture counts most, then the ratios of memory and
    of cores.
    """
    known = machine or this_machine()
    devices = [load_device(name) for name in device_names()]
    named = [device for device in devices if any(board in known.board for board in device.boards)]

    def distance(device: Device) -> tuple[bool, float]:
        memory = abs(math.log2(known.memory_bytes / (device.memory.total_mib << 20)))
        cores = abs(math.log2(known.cores / device.cpu.cores))
        return device.cpu.arch != known.arch, memory + cores

    return min(named or devices, key=distance)


def _check_relations(device: Device, file: str) -> None:
    if device.name != Path(file).stem:
        raise InvalidArgumentError(
            f"{file}: key name: found {device.name!r}, allowed is the name of the file"
        )
    for key, size in (
        ("cpu.page_size_bytes", device.cpu.page_size_bytes),
        ("bundle.alignment_bytes", device.bundle.alignment_bytes),
    ):
        if size & (size - 1):
            raise InvalidArgumentError(f"{file}: key {key}: found {size}, allowed is a power of two")
    bounds, thermal = device.bounds, device.thermal
    for key, low, high in (
        ("thermal.throttle_celsius", thermal.throttle_celsius, thermal.critical_celsius),
        ("bounds.token_time_low_ms", bounds.token_time_low_ms, bounds.token_time_high_ms),
        ("bounds.temperature_low_celsius", bounds.temperature_low_celsius, bounds.temperature_high_celsius),
    ):
        if low >= high:
            raise InvalidArgumentError(f"{file}: key {key}: found {low:g}, allowed is less than {high:g}")
