"""The C library's allocator."""

import ctypes
from collections.abc import Callable


def return_free_memory() -> None:
    """Give freed memory back to the system, such as what parsing took; what is measured next then shows."""
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
