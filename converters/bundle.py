"""Writing a device bundle: files of known size, packed on several threads, synced, sealed by the manifest."""

import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .decoder import Decoder
from .layout import Layout
from .manifest import FORMAT_VERSION, build_manifest, quantization_report, seal
from .pack import Packed, Part, pack_extent, pack_split_extent
from .shards import Shards

if TYPE_CHECKING:
    from edgert.cluster import Cluster

MAGIC = b"EDGERT\0\1"

Progress = Callable[[int, int], None]
# pack_extent(), or what writes an extent in its place.
Pack = Callable[[Sequence[Part], int, int, int | None, Callable[[int], None], threading.Event], Packed]

_SYNC_BYTES = 256 << 20  # written between two syncs, so that the last one does not take minutes


def write_bundle(
    directory: Path,
    decoder: Decoder,
    layout: Layout,
    assets: Mapping[str, bytes],
    about: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    threads: int,
    progress: Progress | None,
    pack: Pack = pack_extent,
    shards: Shards | None = None,
    cluster: "Cluster | None" = None,
) -> dict[str, Any]:
    """Write and sync every file of the bundle into `directory`, which is empty; returns the manifest.

    `progress(done, total)` is called on this thread with bytes of the checkpoint; `shards` brings it piece by piece, and a
    `cluster` packs in place of threads of this process.
    """
    with ExitStack() as stack:
        files = []
        for file in layout.files:
            fd = os.open(directory / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, fd)
            os.ftruncate(fd, file.bytes)
            files.append(fd)
        spread = None
        if cluster is not None:
            threads = cluster.cores  # each waits for one
            paths = [directory / file.name for file in layout.files]
            spread = cluster.packing(dict(zip(files, paths, strict=True)))
        packed = _pack_all(layout, files, threads, progress, pack, shards, spread)
        report = quantization_report(layout, packed, options)
        manifest = build_manifest(decoder, layout, packed, assets, {**about, "quantization": report})
        for index, fd in enumerate(files):
            header = MAGIC + struct.pack("<II", FORMAT_VERSION, index) + bytes.fromhex(manifest["bundle_id"])
            os.pwrite(fd, header, 0)
            os.fsync(fd)
    for name, content in assets.items():
        write_file(directory / name, content)
    write_file(directory / "manifest.json", seal(manifest))
    return manifest


def _pack_all(
    layout: Layout,
    files: list[int],
    threads: int,
    progress: Progress | None,
    pack: Pack,
    shards: Shards | None,
    spread: Callable[[Pack], Pack] | None,
) -> list[Packed]:
    """The results in the order of the layout, whatever order the threads finish in."""
    extents = [*layout.dense, *layout.experts]
    total = sum(part.source.bytes for extent in extents for part in extent.parts)
    remainder_file = None if layout.remainder_file is None else files[layout.remainder_file]
    counter = _Counter()
    stop = threading.Event()
    with (
        ThreadPoolExecutor(1, thread_name_prefix="edgert-sync") as syncing,
        ThreadPoolExecutor(threads, thread_name_prefix="edgert-pack") as pool,
    ):
        try:
            waiting: deque[tuple[int, Future[Packed]]] = deque()
            results: dict[int, Packed] = {}
            syncs: list[Future[None]] = []
            unsynced = 0

            def collect() -> None:
                index, future = waiting.popleft()
                results[index] = _wait(future, counter, total, progress)

            for group in [range(len(extents))] if shards is None else shards.groups(extents):
                for index in group:
                    extent = extents[index]
                    arguments = (files[extent.file], extent.offset, remainder_file, counter.add, stop)
                    work = pack if extent.split is None else pack_split_extent
                    work = work if spread is None else spread(work)
                    waiting.append((index, pool.submit(work, extent.parts, *arguments)))
                    unsynced += extent.bytes
                    if unsynced >= _SYNC_BYTES:
                        syncs.append(syncing.submit(os.fdatasync, files[extent.file]))
                        unsynced = 0
                    if len(waiting) > 4 * threads:  # enough ahead to keep the threads busy
                        collect()
                while waiting:
                    collect()
            for sync in syncs:
                sync.result()  # an error is told once, so the sync that ends the writing might not hear of it
        except BaseException:
            stop.set()
            for each in (pool, syncing):
                each.shutdown(wait=True, cancel_futures=True)
            raise
    return [results[index] for index in range(len(extents))]


def _wait(future: Future[Packed], counter: "_Counter", total: int, progress: Progress | None) -> Packed:
    while not future.done():
        wait([future], timeout=0.1)
        if progress is not None:
            progress(counter.value, total)
    result = future.result()
    if progress is not None:
        progress(counter.value, total)
    return result


class _Counter:
    """A sum that several threads add to."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, amount: int) -> None:
        with self._lock:
            self.value += amount


def write_file(path: Path, content: bytes) -> None:
    """A new file, synced."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
