"""One model that decodes while the world changes: the worker of disturbances.py. Prints a JSON line a window.

python benchmarks/disturbed.py BUNDLE --memory 2GiB --threads 2 --law fast-slow --seconds 4 --root /
"""

import argparse
import json
import random
import time
from contextlib import nullcontext

import edgert
from edgert import _native
from edgert.bundle import Bundle
from edgert.controlling import Control, bounds_from
from edgert.devices import resemble
from edgert.routing import moe_layers
from edgert.signals import Sensors

_KEPT = 0.75  # of a token's experts are the next one's too, about what measured models do
_POSITIONS, _PROMPT = 256, 8


def routing(bundle: Bundle) -> list[list[list[int]]]:
    """Experts of consecutive tokens that have most in common, some more popular than others."""
    draw = random.Random(1)
    layers = moe_layers(bundle.recipe)
    table: list[list[list[int]]] = []
    for position in range(_POSITIONS):
        row = []
        for index, (count, top) in enumerate(layers):
            before = table[-1][index] if position else []
            chosen = [expert for expert in before if draw.random() < _KEPT]
            while len(chosen) < top:
                expert = int(count * draw.random() ** 1.6)
                if expert not in chosen:
                    chosen.append(expert)
            row.append(sorted(chosen))
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--memory")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--law", default="none", help="none, fast-slow, aimd, pi")
    parser.add_argument("--high-ms", type=float, default=1000.0, help="bound on a token's time")
    parser.add_argument("--window-ms", type=float, default=250.0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--root", default="/")
    parser.add_argument("--log")
    words = parser.parse_args()
    model = edgert.load(words.bundle, memory=words.memory, threads=words.threads, context=512)
    model.native.impose_routing(routing(Bundle.open(model.path)))
    stated = {
        "token_time_high_ms": words.high_ms,
        "control_window_ms": words.window_ms,
        "temperature_low_celsius": 66.0,
        "temperature_high_celsius": 76.0,
    }
    control = nullcontext() if words.law == "none" else Control.start(
        model, bounds_from(resemble(), stated), law=words.law, sensors=Sensors(words.root), log=words.log
    )  # fmt: skip
    sequence, sampler = model.sequence(), _native.Sampler(_native.SamplerOptions())
    step = model.native.step
    step([(sequence, list(range(_PROMPT)), sampler)])

    def decode(seconds: float, times: list[float]) -> None:
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            if sequence.length >= 500:
                sequence.rewind(_PROMPT)
            step([(sequence, [5], sampler)])
            times.append(time.perf_counter() - began)

    with control:
        decode(1.0, [])  # warm
        print(json.dumps({"ready": True}), flush=True)
        began = time.perf_counter()
        while (now := time.perf_counter() - began) < words.seconds:
            times: list[float] = []
            decode(words.window_ms / 1000, times)
            times.sort()
            line = {
                "t": now, "tokens": len(times), "seconds": sum(times),
                "p95_ms": 1000 * times[max(0, -(-95 * len(times) // 100) - 1)],
                "store": model.native.statistics()["slot_capacity_bytes"], "threads": model.knobs()["threads"],
            }  # fmt: skip
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
