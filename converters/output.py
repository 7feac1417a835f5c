"""Where a bundle is written: beside its place, synced, then swapped in.

For a bundle NAME.edgert the same directory may briefly hold
  .NAME.edgert.lock  held with flock, so a killed process leaves no lock behind
  .NAME.edgert.new   the bundle being written; what a killed process left is removed by the next conversion
  .NAME.edgert.trial bundles that a conversion measures its choices on; removed likewise
  .NAME.edgert.old   only where the file system cannot exchange two names: the old bundle, for an instant
Killed at any moment, NAME.edgert is the complete old bundle or the complete new one; where names cannot be
exchanged, the old one may be under `.old` until the next conversion puts it back.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Self

from edgert import component
from edgert.errors import InvalidArgumentError, NotFoundError, StorageError

_BUNDLE_FILES = re.compile(
    r"manifest\.json|dense\.bin|experts-\d{5}\.bin|remainders\.bin"
    r"|routing_profile\.bin|tokenizer\.json|tokenizer_config\.json|chat_template\.jinja|generation_config\.json"
)
SPARE_BYTES = 16 << 20  # for the manifest and the file system's own needs
_MANIFEST_START = b'{"checksum":"'
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class BundleOutput:
    """The place of one bundle; a context manager that holds its lock and removes what was not committed.

    Raises InvalidArgumentError for a place that must not be written, StorageError where the system refuses or
    another conversion is at work.
    """

    def __init__(self, output: str | os.PathLike[str], source: Path | None = None) -> None:
        self.path = Path(os.path.abspath(output))
        self._lock = self._sibling("lock")
        self._lock_fd = -1
        self.directory = self._sibling("new")
        self.trial = self._sibling("trial")  # made by whoever needs it
        self._old = self._sibling("old")
        self._check_place()
        if source is not None:
            self._check_apart(source)
        self._check_replaceable()

    def __enter__(self) -> Self:
        self._acquire()
        try:
            self._recover()
            self._check_replaceable()
            os.mkdir(self.directory)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.trial, ignore_errors=True)
        self._release()

    def require_space(self, needed: int) -> None:
        """Raises StorageError when the file system has less room."""
        status = os.statvfs(self.path.parent)
        free = status.f_bavail * status.f_frsize
        if free < needed:
            raise StorageError(
                f"{self.path}: the bundle needs {needed} bytes, "
                f"but only {free} are free in {self.path.parent}"
            )

    def commit(self) -> None:
        """Make the written directory the bundle. Its files must be synced."""
        self._check_replaceable()  # again: a conversion takes long enough for something to be put there
        sync_directory(self.directory)
        if not os.path.lexists(self.path):
            os.rename(self.directory, self.path)
        elif not _exchange(self.directory, self.path):
            os.rename(self.path, self._old)
            os.rename(self.directory, self.path)
        sync_directory(self.path.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def discard(self) -> None:
        """Take the bundle that stands here away. Killed on the way, its place is empty and what is left of it goes with
        the next conversion."""
        self._check_replaceable()
        os.rmdir(self.directory)
        os.rename(self.path, self.directory)
        sync_directory(self.path.parent)

    def _sibling(self, ending: str) -> Path:
        return self.path.parent / f".{self.path.name}.{ending}"

    def _check_place(self) -> None:
        if not self.path.name:
            raise InvalidArgumentError(f"{self.path}: not a name for a bundle")
        if not self.path.parent.is_dir():
            raise NotFoundError(f"{self.path.parent}: no such directory to put the bundle into")

    def _check_apart(self, source: Path) -> None:
        real_source, real_output = Path(os.path.realpath(source)), Path(os.path.realpath(self.path))
        if real_output == real_source:
            raise InvalidArgumentError(f"{self.path}: output and source are the same directory")
        if real_output.is_relative_to(real_source) or real_source.is_relative_to(real_output):
            raise InvalidArgumentError(f"{self.path}: output and source {source} contain one another")

    def _check_replaceable(self) -> None:
        """Only a bundle is ever replaced."""
        if not os.path.lexists(self.path):
            return
        problem = why_no_bundle(self.path)
        if problem is not None:
            raise InvalidArgumentError(
                f"{self.path}: exists and {problem}; only a bundle is replaced: "
                "remove it or choose another output"
            )

    def _acquire(self) -> None:
        while self._lock_fd < 0:
            try:
                fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise StorageError(f"{self.path.parent}: cannot write here: {error.strerror}") from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                current = (
                    os.stat(self._lock).st_ino == os.fstat(fd).st_ino
                )  # else its owner has just removed it
            except BlockingIOError:
                os.close(fd)
                raise StorageError(
                    f"{self.path}: another conversion is writing this bundle; wait for it"
                ) from None
            except FileNotFoundError:
                current = False
            if current:
                self._lock_fd = fd
            else:
                os.close(fd)

    def _release(self) -> None:
        with suppress(OSError):  # a directory that became read-only; the next conversion takes the file over
            os.unlink(self._lock)
        os.close(self._lock_fd)
        self._lock_fd = -1

    def _recover(self) -> None:
        """Undo what a killed conversion left."""
        if os.path.lexists(self._old):
            if os.path.lexists(self.path):
                shutil.rmtree(self._old)
            else:
                os.rename(self._old, self.path)
        for left in (self.directory, self.trial):
            if os.path.lexists(left):
                shutil.rmtree(left)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def why_no_bundle(path: Path) -> str | None:
    """What keeps what stands at `path` from being a bundle: a directory that holds the files of one and nothing else."""
    if path.is_symlink() or not path.is_dir():
        return "is not a directory"
    named = component.file_names(path)
    with os.scandir(path) as entries:
        for entry in entries:
            known = _BUNDLE_FILES.fullmatch(entry.name) or entry.name in named
            if not entry.is_file(follow_symlinks=False) or not known:
                return f"holds {entry.name!r}, which is not part of a bundle"
    return None if _has_manifest(path) else "has no manifest.json of a bundle"


def _has_manifest(path: Path) -> bool:
    try:
        with open(path / "manifest.json", "rb") as file:
            return file.read(len(_MANIFEST_START)) == _MANIFEST_START
    except OSError:
        return False


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the C library, the kernel or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(b))
