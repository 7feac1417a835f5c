"""A checkpoint that arrives file by file: each is fetched when it is first read and removed when it is done with, so that
little more than the largest is ever on disk.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from .files import partial_file
from .layout import Extent


@dataclass(frozen=True)
class Shard:
    """A file of the checkpoint: its place, its size and its first bytes, which hold the header."""

    path: Path
    start: bytes
    total_bytes: int


class Shards:
    """A context manager: while it lasts, conversions find the files whole, whenever they read them.

    Files are fetched from any thread, one at a time. `fetch(path)` puts a whole file at `path`, in one step.
    """

    def __init__(self, shards: Sequence[Shard], fetch: Callable[[Path], None]) -> None:
        self._shards: Mapping[Path, Shard] = {shard.path: shard for shard in shards}
        self._fetch = fetch
        self._lock = threading.Lock()
        self._here: set[Path] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for shard in self._shards.values():
            self._put_start(shard)
            self._stack.enter_context(
                partial_file(shard.path, len(shard.start), partial(self._bring, shard.path))
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def groups(self, extents: Sequence[Extent]) -> Iterator[list[int]]:
        """Indices of extents to pack together, file after file; what only they need is removed once the next are asked
        for. An extent with parts in several files comes with the last of them."""
        order = sorted(self._shards)
        needs = [self._needs(extent) for extent in extents]
        for shard in order:
            group = [index for index, need in enumerate(needs) if need and max(need) == shard]
            yield group
            later = {path for need in needs if need and max(need) > shard for path in need}
            for path in [path for path in self._here if path not in later]:
                self._remove(path)
        yield [index for index, need in enumerate(needs) if not need]

    def peak_bytes(self, extents: Sequence[Extent]) -> int:
        """The most that is on disk at a time."""
        needs = [self._needs(extent) for extent in extents]
        peak = 0
        for shard in self._shards:
            held = {path for need in needs if need and max(need) >= shard for path in need if path <= shard}
            peak = max(peak, sum(self._shards[path].total_bytes for path in held | {shard}))
        return peak

    def _needs(self, extent: Extent) -> set[Path]:
        return {part.source.tensor.path for part in extent.parts if part.source.tensor.path in self._shards}

    def _bring(self, path: Path) -> None:
        with self._lock:
            if path not in self._here:
                self._fetch(path)
                self._here.add(path)

    def _remove(self, path: Path) -> None:
        """Leave the beginning: what still reads the whole file has it open, and who comes later fetches it again."""
        with self._lock:
            self._here.discard(path)
            self._put_start(self._shards[path])

    def _put_start(self, shard: Shard) -> None:
        beside = shard.path.with_name(f".{shard.path.name}.start")
        with open(beside, "wb") as file:
            file.write(shard.start)
            file.truncate(shard.total_bytes)
        os.replace(beside, shard.path)
