"""Settings of laws and signals that the tests of control share."""

from typing import Any

from edgert.controlling import Bounds
from edgert.controlling.brain import Plant

Settings = dict[str, Any]
Decision = dict[str, Any]

CAMERA: Settings = {
    "low": 5e5,
    "high": 2.5e6,
    "fast": {"name": "refractory", "minimum": 4, "maximum": 57, "start": 30, "step": 8},
    "slow": [
        {"name": "photoreceptor", "minimum": 0, "maximum": 255, "start": 119, "step": 5},
        {"name": "on threshold", "minimum": 0, "maximum": 255, "start": 63, "step": -5},
    ],
    "patience": 2,
    "blanking": 1,
    "dwell": 4,
    "relief": 8,
}

BOUNDS = Bounds(50, 250, 60, 75, 1 << 30, save_power="on-battery", window_ms=250)
PLANT = Plant(threads=4, least_bytes=100, most_bytes=1700)
CALM: dict[str, Any] = {
    "t": 0.0, "tokens": 10, "mean_ms": 100.0, "p50_ms": 100.0, "p95_ms": 120.0, "load": -1.0, "load_quality": "exact",
    "temperature": 65.0, "temperature_quality": "exact", "headroom": 15.0, "cores": 4, "on_battery": 0.0, "charge": 1.0,
    "cpu_pressure": 0.0, "memory_pressure": 0.0,
}  # fmt: skip
