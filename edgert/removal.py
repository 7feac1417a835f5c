"""Removing bundles: only what is one, and is not in use."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgert import caches, gguf
from edgert.bundle import embedded, locate
from edgert.errors import InvalidArgumentError, NotFoundError


@dataclass(frozen=True)
class Removable:
    """A bundle that may be removed; `bytes` is what it takes of the disk."""

    path: Path
    bytes: int

    def remove(self) -> None:
        """At once under its name, so that nobody meets a half of it. Raises InvalidArgumentError where it is in use or is
        no bundle any more, StorageError where the system refuses or a conversion is writing it."""
        from edgert.converters.output import BundleOutput

        with BundleOutput(self.path) as place:
            _check_unused(self.path)
            place.discard()
        if gguf.is_kept(self.path):
            with suppress(OSError):
                self.path.parent.rmdir()


def removable(model: str) -> Removable:
    """The bundle that a path or a name stands for; of a GGUF file, also of one in a cache, the bundle that was made of it.

    Raises NotFoundError where there is none, InvalidArgumentError for what is not to be removed.
    """
    from edgert.converters.output import why_no_bundle

    path = _path_of(model)
    if path.is_symlink():
        raise InvalidArgumentError(f"{path}: is a link; remove it, or name what it points to")
    packaged = embedded()
    if packaged is not None and path.resolve() == packaged.resolve():
        raise InvalidArgumentError(f"{model}: comes with the package, and goes with it")
    if problem := why_no_bundle(path):
        raise InvalidArgumentError(f"{path}: {problem}; only a bundle is removed")
    _check_unused(path)
    return Removable(path, sum(file.stat().st_blocks * 512 for file in path.iterdir()))


def _path_of(model: str) -> Path:
    if not model:  # such as an unset variable of a script
        raise InvalidArgumentError("found an empty name, allowed is a bundle's path or name")
    path = Path(caches.resolve(model) if caches.is_name(model) else model)
    if not gguf.is_gguf(path):
        return locate(path).absolute()
    kept = gguf.kept_bundle(path)
    if not kept.is_dir():
        raise NotFoundError(f"{model}: no bundle was made of it; the file itself is yours to remove")
    return kept


def _check_unused(path: Path) -> None:
    """As far as /proc tells: the processes of others hide what they have open."""
    files = {(status.st_dev, status.st_ino) for status in map(os.stat, path.iterdir())}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    status = link.stat()
                    if (status.st_dev, status.st_ino) in files:
                        raise InvalidArgumentError(f"{path}: process {process.name} uses it; end that first")
