"""What control costs: python benchmarks/control_cost.py

Prints microseconds a decision, the least of several rounds, for the law and the baselines; then those of the processor that the
loop takes beside a model: for its sensors, for all laws' decisions, for a whole window (the bound is 50) and with a record, and
for a look at the memory between two windows; and the share of time that these are (the bound is 0.1 %).
"""

import os
import random
import time
from collections.abc import Callable

import edgert
from edgert._native import Controller
from edgert.controlling import Control, bounds_from
from edgert.devices import resemble

_WINDOWS, _ROUNDS = 20_000, 5
_TICK_S = 0.05


def main() -> None:
    draw = random.Random(1)
    rates = [draw.lognormvariate(14, 1) for _ in range(_WINDOWS)]
    slow = [{"name": f"slow {i}", "minimum": 0, "maximum": 255, "start": 128, "step": 5} for i in range(4)]
    fast = {"name": "fast", "minimum": 4, "maximum": 57, "start": 30, "step": 8}
    for kind in ("fast-slow", "published", "aimd", "pi"):
        best = float("inf")
        for _ in range(_ROUNDS):
            law = Controller(kind, low=5e5, high=2.5e6, fast=fast, slow=slow, relief=8)
            started = time.perf_counter()
            for rate in rates:
                law.step(rate)
            best = min(best, time.perf_counter() - started)
        print(f"{kind:10} {best / _WINDOWS * 1e6:.2f} us a window")
    loop()


def loop() -> None:
    with edgert.load(context=256) as model:
        model.generate("A file", max_tokens=50)
        bounds = bounds_from(resemble(), {})
        length = bounds.window_ms / 1000
        now = 0.0

        def advance(control: Control, seconds: float) -> None:
            nonlocal now
            now += seconds
            control.tick()

        control = Control(model, bounds, clock=lambda: now)
        recorded = Control(model, bounds, clock=lambda: now, log=os.devnull)
        window = _cost(lambda: advance(control, 2 * length))
        tick = _cost(lambda: advance(control, 1e-6))
        signals = control.state()["signals"]
        for name, cost in (
            ("sensors", _cost(control._sensors.read)),
            ("decisions", _cost(lambda: control._brain.window(signals))),
            ("a window", window),
            ("a window with a record", _cost(lambda: advance(recorded, 2 * length))),
            ("a look at the memory", tick),
        ):
            print(f"{name:24} {cost:5.1f} us")
        share = (window + (length / _TICK_S - 1) * tick) / 1e6 / length
        print(f"{share:.3%} of the time of a processor")


def _cost(work: Callable[[], object]) -> float:
    """Microseconds of the processor, the least of several rounds."""
    best = float("inf")
    for _ in range(_ROUNDS):
        started = time.thread_time()
        for _ in range(200):
            work()
        best = min(best, (time.thread_time() - started) / 200 * 1e6)
    return best


if __name__ == "__main__":
    main()
