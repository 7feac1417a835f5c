"""What a controlled model is to keep within: from the device profile, unless stated."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgert.devices import Device
from edgert.errors import InvalidArgumentError
from edgert.settings import Setting

SAVING = ("never", "on-battery", "always")


@dataclass(frozen=True)
class Bounds:
    """Bands and reserves. Speed above what `token_time_low_ms` asks for is given up only as `save_power` says."""

    token_time_low_ms: float
    token_time_high_ms: float
    temperature_low_celsius: float
    temperature_high_celsius: float
    memory_reserve_bytes: int  # left to the rest of the machine, at most a tenth of what bounds this process
    save_power: str = "never"
    low_charge: float = 0.2  # of the battery: below it, on battery, one thread computes
    window_ms: float = 250.0
    allow_lossy: bool = False


BOUNDS = (
    Setting(
        "token_time_low_ms", "float", "faster than this is not needed where power is saved", None, 0, 1e6
    ),
    Setting("token_time_high_ms", "float", "a token should take no longer", None, 0, 1e6, above_minimum=True),
    Setting("temperature_low_celsius", "float", "cooler leaves room to speed up", None, 0, 150),
    Setting("temperature_high_celsius", "float", "hotter slows down", None, 0, 150),
    Setting(
        "memory_reserve", "bytes", "memory that is left to others, at most a tenth of all", None, 0, 1 << 50
    ),
    Setting("save_power", "choice", "when speed beyond the need is given up", None, choices=SAVING),
    Setting("control_window_ms", "float", "time between decisions", None, 20, 60_000),
)

LOG_SIZE = Setting(
    "control_log_size", "bytes", "bound of the record with its older parts", 256 << 20, 64 << 10, 1 << 50
)

CONTROL = (
    Setting(
        "control",
        "choice",
        "whether knobs follow what the machine around allows",
        "off",
        choices=("off", "auto"),
    ),
    *BOUNDS,
    LOG_SIZE,
)


def bounds_from(device: Device, stated: Mapping[str, Any], *, allow_lossy: bool = False) -> Bounds:
    """Those of a device, with what is stated (by the names of BOUNDS) in their place.

    Raises InvalidArgumentError where a low bound is not below its high one."""
    own, table = device.bounds, device.control
    bounds = Bounds(
        own.token_time_low_ms, own.token_time_high_ms, own.temperature_low_celsius, own.temperature_high_celsius,
        table.memory_reserve_mib << 20, table.save_power, table.low_charge_percent / 100, table.window_ms,
        allow_lossy,
    )  # fmt: skip
    names = {"memory_reserve": "memory_reserve_bytes", "control_window_ms": "window_ms"}
    given = {names.get(name, name): value for name, value in stated.items() if value is not None}
    if "token_time_high_ms" in given and "token_time_low_ms" not in given:
        given["token_time_low_ms"] = min(bounds.token_time_low_ms, given["token_time_high_ms"] / 2)
    bounds = replace(bounds, **given)
    for name in ("token_time", "temperature"):
        unit = "ms" if name == "token_time" else "celsius"
        low, high = getattr(bounds, f"{name}_low_{unit}"), getattr(bounds, f"{name}_high_{unit}")
        if low >= high:
            raise InvalidArgumentError(f"{name}_low_{unit}: found {low:g}, allowed is less than {high:g}")
    return bounds
