"""Files from outside: regular files only, read by offset, never past a stated bound."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from edgert.errors import CorruptError, NotFoundError, StorageError


@dataclass(frozen=True, slots=True)
class _Partial:
    present_bytes: int
    fetch: Callable[[], None]


_partial: dict[str, _Partial] = {}


@contextmanager
def partial_file(path: Path, present_bytes: int, fetch: Callable[[], None]) -> Iterator[None]:
    """Meanwhile only the first bytes of `path` need be there: a read past them calls `fetch`, which puts the whole file
    in its place and may be called again, from any thread."""
    key = os.path.abspath(path)
    _partial[key] = _Partial(present_bytes, fetch)
    try:
        yield
    finally:
        del _partial[key]


class InputFile:
    """A regular file opened for reading by offset.

    Raises NotFoundError, CorruptError (a link, FIFO, directory or device) or StorageError. Not mapped: a read
    that fails is an error with an address, never a signal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = _partial.get(os.path.abspath(path)) if _partial else None
        self._fd = -1
        self._open()

    def _open(self) -> None:
        path = self.path
        try:
            _require_regular(path, os.lstat(path))  # before the open: opening a device can have effects
            self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            status = os.fstat(self._fd)
        except FileNotFoundError:
            raise NotFoundError(f"{path}: no such file") from None
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        try:
            _require_regular(path, status)
        except CorruptError:
            self.close()
            raise
        self.bytes = status.st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`. Raises CorruptError at the end of the file, StorageError on failure."""
        if self._partial is not None and offset + len(view) > self._partial.present_bytes:
            self._partial.fetch()
            self.close()
            self._partial = None
            self._open()
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise StorageError(
                    f"{self.path}: reading at byte {offset + done}: {error.strerror}"
                ) from error
            if count == 0:
                raise CorruptError(
                    f"{self.path}: ends at byte {offset + done}, {len(view) - done} bytes before the end of "
                    "the data that its header declares; the file changed or is truncated"
                )
            done += count

    def read(self, offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return buffer


def read_small_file(path: Path, max_bytes: int) -> bytearray:
    """The whole file. Raises CorruptError when it is larger than `max_bytes`."""
    with InputFile(path) as file:
        if file.bytes > max_bytes:
            raise CorruptError(f"{path}: {file.bytes} bytes; at most {max_bytes} are allowed here")
        return file.read(0, file.bytes)


def _require_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }.get(stat.S_IFMT(status.st_mode), "not a file")
    raise CorruptError(f"{path}: is {kind}; only regular files are read")
