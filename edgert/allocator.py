"""The C library's allocator."""

import ctypes
from collections.abc import Callable

_M_ARENA_MAX = -8  # of malloc.h


def return_free_memory() -> None:
    """Give freed memory back to the system, such as what parsing took; what is measured next then shows."""
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def share_one_heap() -> None:
    """Let all threads share one heap. By default they get up to eight a core, and what is free in one is of no use to the
    others. For a process with threads that come and go; before they do."""
    choose: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if choose is not None:
        choose(_M_ARENA_MAX, 1)
