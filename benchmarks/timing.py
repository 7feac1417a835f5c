"""How benchmarks take times and print them."""

import time
from collections.abc import Callable
from typing import TypeVar

import edgert
from edgert.patches import AdapterMode

_TOKEN = 7
_Result = TypeVar("_Result")


def timed(call: Callable[[], _Result]) -> tuple[float, _Result]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def switch_seconds(model: edgert.Model, adapter: str | None, mode: AdapterMode = "auto") -> float:
    return timed(lambda: model.set_adapter(adapter, mode=mode))[0]


def token_seconds(model: edgert.Model, tokens: int) -> list[float]:
    """Seconds of each token of a new sequence that begins with one token."""
    times: list[float] = []
    last = time.perf_counter()
    for _ in model.stream([_TOKEN], max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=len(times)):
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return times


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"


def against(seconds: float, of: float) -> str:
    return f"{ms(seconds)} ({seconds / of:,.2f}x)"
