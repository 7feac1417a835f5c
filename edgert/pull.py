"""From a name on the hub to a bundle that runs by name."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import settings
from edgert.bundle import models_dir
from edgert.caches import resolve
from edgert.errors import InvalidArgumentError, StorageError
from edgert.hub import Hub, RemoteFile, Spec, choose, is_offline, is_safe, parse_spec
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.converters.component import ComponentReport
    from edgert.converters.convert import ConversionReport
    from edgert.converters.shards import Shards

_SPARE_BYTES = 64 << 20
_HEADER_LENGTH = 8  # of a safetensors file
_MAX_HEADER_BYTES = 16 << 20

Progress = Callable[[int, int], None]


def pull(
    model: str,
    /,
    *,
    name: str | None = None,
    keep: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> "ConversionReport | ComponentReport":
    """Fetch `model`, hf:ORG/NAME[@REVISION][:FILE], and convert it to a bundle in models_dir(), called `name`.

    Shards of safetensors are converted one after the other and removed, so the disk holds the bundle and one of them;
    with `keep` everything stays in the cache of Hugging Face. `offline`: from that cache alone. `options` are those of
    convert(). Raises InvalidArgumentError, NotFoundError, StorageError, CorruptError, or what converting raises.
    """
    spec = parse_spec(model)
    name = name or spec.name
    if not is_safe(name) or "/" in name:
        raise InvalidArgumentError(
            f"name: found {name[:80]!r}, allowed are letters, digits, '.', '_' and '-'"
        )
    output = models_dir() / f"{name}.edgert"
    output.parent.mkdir(parents=True, exist_ok=True)
    hub = Hub()
    if offline or is_offline():
        return _convert(resolve(model), output, progress, options)
    commit, there = hub.files(spec)
    files = choose(there, spec)
    total = sum(file.bytes for file in files)
    tell(f"{model}: {len(files)} files, {format_bytes(total)}")
    if keep:
        for file in files:
            path = hub.keep(spec, commit, file)
        root = Path(os.path.abspath(path)).parents[file.path.count("/")]
        return _convert(_source(root, files), output, progress, options)
    # Kept after a failure, so that the next try goes on from there.
    directory = settings.cache() / "pull" / f"{spec.repo.replace('/', '--')}@{commit}"
    with _held(directory):
        report = _fetch_and_convert(hub, spec, commit, files, directory, output, progress, tell, options)
        shutil.rmtree(directory, ignore_errors=True)
    return report


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Makes the directory and keeps others out: a second pull would put the beginnings of shards, which read as zeros,
    where the first one reads whole ones."""
    descriptor = _locked(directory)
    while descriptor is None:  # the pull that ended meanwhile has taken the directory with it
        descriptor = _locked(directory)
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(directory: Path) -> int | None:
    """The directory, open and locked; None where what was locked is no longer what stands there."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
            return descriptor
    except FileNotFoundError:
        pass
    except BlockingIOError:
        os.close(descriptor)
        raise StorageError(f"{directory}: another pull is fetching this model; wait for it") from None
    os.close(descriptor)
    return None


def _fetch_and_convert(
    hub: Hub,
    spec: Spec,
    commit: str,
    files: Sequence[RemoteFile],
    directory: Path,
    output: Path,
    progress: Progress | None,
    tell: Callable[[str], None],
    options: Mapping[str, Any],
) -> "ConversionReport | ComponentReport":
    shards = [file for file in files if file.path.endswith(".safetensors")]
    others = [file for file in files if file not in shards]
    _require_space(directory, others, directory)
    for file in others:
        place = directory / file.path
        if not place.exists() or place.stat().st_size != file.bytes:  # what is there was checked
            hub.fetch(spec, commit, file, place)
    if shards:
        with _arriving(hub, spec, commit, shards, directory, tell) as arriving:
            return _convert(directory, output, progress, {**options, "shards": arriving})
    return _convert(_source(directory, files), output, progress, options)


def _arriving(
    hub: Hub,
    spec: Spec,
    commit: str,
    shards: Sequence[RemoteFile],
    directory: Path,
    tell: Callable[[str], None],
) -> "Shards":
    """The shards of `directory`: their headers now, the rest when it is read."""
    from edgert.converters.shards import Shard, Shards

    by_path = {directory / file.path: file for file in shards}

    def fetch(path: Path) -> None:
        file = by_path[path]
        _require_space(directory, [file], directory)
        tell(f"fetching {file.path}, {format_bytes(file.bytes)}")
        hub.fetch(spec, commit, file, path)

    starts = []
    for path, file in by_path.items():
        length = int.from_bytes(hub.start(spec, commit, file, min(_HEADER_LENGTH, file.bytes)), "little")
        start = min(file.bytes, _HEADER_LENGTH + min(length, _MAX_HEADER_BYTES))
        starts.append(Shard(path, hub.start(spec, commit, file, start), file.bytes))
    return Shards(starts, fetch)


def _source(root: Path, files: Sequence[RemoteFile]) -> Path:
    """What to convert of the chosen files: the directory, or the one model file."""
    models = sorted(file.path for file in files if file.path.endswith((".gguf", ".onnx")))
    return root / models[0] if models else root


def _convert(
    source: Path, output: Path, progress: Progress | None, options: Mapping[str, Any]
) -> "ConversionReport | ComponentReport":
    from edgert.converters.source import convert_source

    return convert_source(source, output, progress=progress, **options)


def _require_space(place: Path, files: Sequence[RemoteFile], where: Path) -> None:
    needed = sum(file.bytes for file in files) + _SPARE_BYTES
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(f"{where}: {needed} bytes are needed to fetch into, but only {free} are free")
