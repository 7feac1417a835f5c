"""The budget of an engine whose allocations are not edgert's: what it will take is estimated before, what it took is
measured after."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from edgert import _native
from edgert.allocator import return_free_memory
from edgert.errors import BudgetError
from edgert.units import format_bytes


class Meter:
    """Holds one model to its budget. Attributes: budget_bytes, used_bytes (what the process grew by while the model was
    loaded, and what is held besides), peak_bytes, threads."""

    def __init__(self, name: str, knob_values: Mapping[str, Any]) -> None:
        stated = {key: value for key, value in knob_values.items() if value not in (None, "auto")}
        runtime = _native.Runtime(stated.get("memory", 0), threads=stated.get("threads", 0), io_threads=1)
        self._name = name
        self.budget_bytes = runtime.budget_bytes
        self.threads = runtime.threads
        self.used_bytes = 0
        self.peak_bytes = 0

    @property
    def left_bytes(self) -> int:
        return max(0, self.budget_bytes - self.used_bytes)

    def require(self, needed: int, what: str) -> None:
        """Raises BudgetError naming `needed` where the budget is smaller; `what` says what takes it."""
        if needed > self.budget_bytes:
            raise BudgetError(
                f"{self._name}: the budget is {format_bytes(self.budget_bytes)}, the smallest that works is "
                f"{format_bytes(needed)}: {what} (see memory=, --memory)"
            )

    @contextmanager
    def loading(self, held_bytes: int) -> Iterator[None]:
        """Measures what is loaded meanwhile; `held_bytes` are counted besides. Raises BudgetError at the end where it
        took more than the budget."""
        self.used_bytes = held_bytes
        before = _native.anonymous_resident_bytes()
        with self.running():
            yield
        self.used_bytes += max(0, _native.anonymous_resident_bytes() - before)
        self.require(self.peak_bytes, "measured while loading")

    @contextmanager
    def running(self) -> Iterator[list[int]]:
        """Measures the peak of what runs meanwhile, which the list holds at the end; other threads' growth counts too."""
        return_free_memory()  # or what runs would take from it and show no growth
        _reset_peak()
        before = _status("VmRSS")
        growth: list[int] = []
        try:
            yield growth
        finally:
            growth.append(max(0, _status("VmHWM") - before))
            self.peak_bytes = max(self.peak_bytes, self.used_bytes + growth[0])


def _reset_peak() -> None:
    with suppress(OSError):  # not everywhere; the peak is then that of the process so far
        descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"5")
        finally:
            os.close(descriptor)


def _status(key: str) -> int:
    """A size in /proc/self/status in bytes; 0 where there is none."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) << 10
    return 0
