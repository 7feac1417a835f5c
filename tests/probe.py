"""Run by the memory tests in a process of its own: generate from a bundle and report what it took, as JSON.

    python probe.py BUNDLE WARM_BUNDLE MEMORY THREADS REQUESTS TOKENS

WARM_BUNDLE is loaded and run first, so that what the interpreter loads lazily is there before the measurement.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from pathlib import Path

import edgert


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def storage_bytes() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("no read_bytes in /proc/self/io")


class Peak(threading.Thread):
    """The largest anonymous memory seen, about every half millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.0005):
            self.bytes = max(self.bytes, anonymous_bytes())


def main(bundle: str, warm: str, memory: str, threads: int, requests: int, tokens: int) -> None:
    first = edgert.load(warm, memory=64 << 20, threads=threads)
    first.generate("The module", max_tokens=4)
    del first
    gc.collect()

    peak = Peak()
    peak.start()
    read_before, before = storage_bytes(), anonymous_bytes()
    model = edgert.load(bundle, memory=memory, threads=threads)
    after_request = []
    for i in range(requests):
        result = model.generate(f"The module number {i} reads", max_tokens=tokens, temperature=1.0, seed=i)
        after_request.append(anonymous_bytes())
    peak.stopped.set()
    peak.join()
    report = {
        "growth_bytes": max(peak.bytes, *after_request) - before,
        "after_request": after_request,
        "storage_bytes": storage_bytes() - read_before,
        "stats": dict(model.stats()),
        "budget_bytes": result.statistics["budget_bytes"],
        "peak_bytes": result.statistics["peak_bytes"],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    bundle, warm_bundle, memory, *numbers = sys.argv[1:]
    main(bundle, warm_bundle, memory, *map(int, numbers))
