"""GGUF files run through a bundle, which is made the first time and kept.

The engine's kernels read tiles of sixteen rows and its store reads aligned extents of one expert each, so a GGUF file is
repacked once, losslessly, rather than read in place (docs/checkpoints.md says what was weighed).
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edgert import settings
from edgert.errors import StorageError

_GENERATION = 1  # of what is kept: raised when the same file would give another bundle


def is_gguf(path: Path) -> bool:
    from edgert.converters.checkpoint import is_gguf as looks_like_one

    return not path.is_dir() and looks_like_one(path)


def kept_bundle(path: Path) -> Path:
    """Where the bundle of a GGUF file is kept, whether it is there or not; another place once the file has changed.

    Raises what reading the file raises.
    """
    place, state = _keys(path)
    return _folder() / f"{place}-{state}" / f"{name(path)}.edgert"


def bundle_of(path: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """The bundle of a GGUF file, made if it is not there; progress(done, total) counts bytes of the file.

    Bundles are kept in settings.cache()/converted; the one of what the file was before is removed. Raises what converting it
    raises.
    """
    from edgert.converters.convert import convert

    bundle = kept_bundle(path)
    if (bundle / "manifest.json").is_file():
        return bundle
    try:
        bundle.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{bundle.parent}: cannot be made: {error.strerror}") from None
    try:
        convert(path, bundle, progress=progress)
    except BaseException:
        _remove_if_empty(bundle.parent)
        raise
    if kept_bundle(path) != bundle:
        shutil.rmtree(bundle.parent, ignore_errors=True)
        raise StorageError(f"{path}: changed while it was converted")
    place, _ = _keys(path)
    for other in _folder().glob(f"{place}-*"):
        if other != bundle.parent:
            shutil.rmtree(other, ignore_errors=True)
    return bundle


def _keys(path: Path) -> tuple[str, str]:
    """Of where the file is, and of what it is: names, sizes and times of all its parts."""
    from edgert.converters.gguf import part_paths

    parts = [part.resolve() for part in part_paths(path)]
    states = [
        (part.name, (status := part.stat()).st_size, status.st_mtime_ns, status.st_ino) for part in parts
    ]
    return _digest(str(parts[0])), _digest(json.dumps([_GENERATION, states]))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def name(path: Path) -> str:
    """The file's, in the letters that a bundle's name has."""
    from edgert.converters.gguf import part_paths

    stem = part_paths(path)[0].stem.partition("-00001-of-")[0]
    kept = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem
    )
    return kept.lstrip(".-") or "model"


def is_kept(bundle: Path) -> bool:
    """Whether bundle_of() keeps it."""
    return bundle.parent.parent == _folder()


def _folder() -> Path:
    return settings.cache() / "converted"


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
