"""Writing a bundle whose model another engine runs: its files as they are, checked, and a manifest."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert import _native
from edgert.component import FORMAT_VERSION
from edgert.errors import EdgertError, StorageError

from .bundle import write_file
from .files import InputFile
from .manifest import encode, seal
from .output import SPARE_BYTES, BundleOutput
from .pack import write_at

_COPY_BYTES = 8 << 20
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ComponentReport:
    """What was written. `bytes` counts the files and assets."""

    path: Path
    bundle_id: str
    kind: str
    architecture: str
    bytes: int
    notes: Sequence[str] = ()


def write_component(
    source: Path,
    output: str | os.PathLike[str],
    component: Mapping[str, Any],
    files: Mapping[str, Path],
    assets: Mapping[str, bytes],
    *,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> ComponentReport:
    """Write the bundle `output`: copies of `files` by name, `assets` and what `component` says of them.

    Equal inputs give equal bytes. What stands at `output` is replaced as by convert(). Raises an EdgertError.
    """
    try:
        with BundleOutput(output, source) as place:
            total = sum(os.stat(path).st_size for path in files.values())
            place.require_space(total + sum(map(len, assets.values())) + SPARE_BYTES)
            rows, done = [], 0
            for name, path in sorted(files.items()):
                rows.append(_copy(name, path, place.directory, done, total, progress))
                done += rows[-1]["bytes"]
            manifest = {
                "component": dict(component),
                "format_version": FORMAT_VERSION,
                "bundle_id": "",
                "files": rows,
                "assets": [_asset(name, content) for name, content in sorted(assets.items())],
                "provenance": {"converter": f"edgert {_native.__version__}"},
                "device": None,
                "defaults": {},
            }
            manifest["bundle_id"] = hashlib.blake2b(encode(manifest), digest_size=16).hexdigest()
            for name, content in (*assets.items(), ("manifest.json", seal(manifest))):
                write_file(place.directory / name, content)
            place.commit()
    except EdgertError:
        raise
    except OSError as error:
        raise StorageError(f"{error.filename or os.fspath(output)}: {error.strerror or error}") from error
    return ComponentReport(
        place.path,
        str(manifest["bundle_id"]),
        component["kind"],
        component["architecture"],
        total + sum(map(len, assets.values())),
        notes,
    )


def _copy(
    name: str, source: Path, directory: Path, done: int, total: int, progress: Progress | None
) -> dict[str, Any]:
    checksum = _native.Xxh64()
    fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with InputFile(source) as file:
            for offset in range(0, file.bytes, _COPY_BYTES):
                piece = file.read(offset, min(_COPY_BYTES, file.bytes - offset))
                checksum.update(piece)
                write_at(fd, offset, piece)
                if progress is not None:
                    progress(done + offset + len(piece), total)
            os.fsync(fd)
            return {"name": name, "bytes": file.bytes, "checksum": checksum.hexdigest()}
    finally:
        os.close(fd)


def _asset(name: str, content: bytes) -> dict[str, Any]:
    return {"name": name, "bytes": len(content), "checksum": _native.xxh64(content)}
