"""What one window of a controller costs, through Python: python benchmarks/control_cost.py

Prints microseconds a decision, the least of several rounds, for the law and the baselines. The bound is 50.
"""

import random
import time

from edgert._native import Controller

_WINDOWS, _ROUNDS = 20_000, 5


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


if __name__ == "__main__":
    main()
