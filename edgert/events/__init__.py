"""Event cameras: files, event rates, biases under the fast/slow law, frames, place recognition, and a simulator.

    from edgert.events import FastSlow, open_events, rate_windows

    law = FastSlow("fast-slow")
    for window in rate_windows(open_events("drive.aedat4"), seconds=0.3):
        biases = law.step(window.rate, window.t)

Needs numpy (the extra `events`); no model and no engine is loaded. What comes from the simulator is simulated.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgert.events.biases import DAVIS346, Biases
    from edgert.events.camera import EventSource, open_source, run
    from edgert.events.fast_slow import FastSlow
    from edgert.events.files import EventFile, open_events
    from edgert.events.frames import event_frames
    from edgert.events.rates import rate_windows
    from edgert.events.simulator import Corridor, SimulatedCamera
    from edgert.events.stream import EVENT

_HOME = {
    "Biases": "biases",
    "Corridor": "simulator",
    "DAVIS346": "biases",
    "EVENT": "stream",
    "EventFile": "files",
    "EventSource": "camera",
    "FastSlow": "fast_slow",
    "SimulatedCamera": "simulator",
    "event_frames": "frames",
    "open_events": "files",
    "open_source": "camera",
    "rate_windows": "rates",
    "run": "camera",
}

__all__ = [
    "DAVIS346",
    "EVENT",
    "Biases",
    "Corridor",
    "EventFile",
    "EventSource",
    "FastSlow",
    "SimulatedCamera",
    "event_frames",
    "open_events",
    "open_source",
    "rate_windows",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgert.events' has no attribute {name!r}")
    value = getattr(import_module(f"edgert.events.{_HOME[name]}"), name)
    globals()[name] = value
    return value
