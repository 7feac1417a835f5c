"""The adapters of a loaded model: which there are, which are in memory, and which are on."""

import itertools
import math
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from edgert import _native
from edgert.errors import BudgetError, CorruptError, InvalidArgumentError, NotFoundError, UnsupportedError

if TYPE_CHECKING:
    from edgert.converters.adapter import Part

# One by its name, several, or each with its scale; None: those that are on.
AdapterChoice = str | Sequence[str] | Mapping[str, float] | None
Mix = list[tuple[_native.Adapter, float]]
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter. `kind` as PEFT calls it; `bytes` of the budget while it is `resident`, of its file until it first
    was; `scale` 0 where it is off."""

    name: str
    kind: str
    path: Path
    bytes: int
    matrices: int
    scale: float
    resident: bool


class Source(Protocol):
    """Where an adapter is read from, again and again."""

    @property
    def path(self) -> Path: ...
    @property
    def kind(self) -> str: ...
    @property
    def targets(self) -> list[str]: ...
    @property
    def bytes(self) -> int: ...
    def check_shapes(self, shape_of: Callable[[str], tuple[int, int]]) -> None:
        """Against the model's, as far as can be told without reading."""

    def read(self) -> "list[Part]": ...


@dataclass
class _Entry:
    source: Source
    order: int  # in which a row's adapters add, in memory or not
    matrices: int
    bytes: int
    native: _native.Adapter | None = None  # while it is in memory
    fingerprint: int | None = None  # once it was
    used: int = 0  # when last


class AdapterSet:
    """By name, with the ones that are on and their scales. Thread-safe; sequences keep what they began with.

    Any number may be there; their numbers are read when a sequence first needs them. Those that no sequence uses leave the
    memory, the least recently used first, where another one or the budget wants it, and where they take more than
    `limit_bytes` together (0: the budget alone bounds them).
    """

    def __init__(self, limit_bytes: int = 0) -> None:
        self._lock = threading.RLock()
        self._limit_bytes = limit_bytes
        self._entries: dict[str, _Entry] = {}
        self._on: dict[str, float] = {}
        self._enabled = True
        self._count = itertools.count(1)
        self._clock = itertools.count(1)
        self._evictions = 0

    def add(self, native: _native.Model, name: str, source: Source) -> AdapterInfo:
        """A PEFT directory is read now, so that what is wrong with it is said now.

        Raises InvalidArgumentError for a name that is taken, or empty; what reading raises, and BudgetError.
        """
        if not name or name != name.strip():
            raise InvalidArgumentError(
                f"adapter name: found {name!r:.60}, allowed is text without spaces around it"
            )
        with self._lock:
            if name in self._entries:
                raise InvalidArgumentError(f"adapter {name}: is loaded already; unload it first")
            source.check_shapes(native.target)
            entry = _Entry(source, next(self._count), len(source.targets), source.bytes)
            if isinstance(source, PeftDirectory):
                self._bring(native, name, entry, keep={name})
            self._entries[name] = entry
            return self._info(name)

    def remove(self, name: str, native: _native.Model) -> None:
        """Its memory is free once the sequences that use it are closed."""
        with self._lock:
            self._known(name)
            del self._entries[name]
            self._on.pop(name, None)
        native.trim_adapters()

    def set(self, choice: AdapterChoice) -> None:
        with self._lock:
            self._on = self._scales(choice)
            self._enabled = True

    def enable(self, on: bool) -> None:
        with self._lock:
            self._enabled = on

    def check(self, choice: AdapterChoice) -> None:
        """Refuse names that are not there and scales that are none."""
        with self._lock:
            self._scales(choice)

    def sequence(self, native: _native.Model, choice: AdapterChoice, make: Callable[[Mix], _Made]) -> _Made:
        """What `make` makes of the chosen adapters, in memory, and their scales. Where it raises BudgetError, adapters that
        are not in use make room."""
        with self._lock:
            scales = (self._on if self._enabled else {}) if choice is None else self._scales(choice)
            scales = {name: scale for name, scale in scales.items() if scale != 0}
            mix: Mix = []
            for name, scale in scales.items():
                mix.append((self._bring(native, name, self._known(name), keep=scales.keys()), scale))
        return self._with_room(lambda: make(mix), native, keep=scales.keys())  # may wait for a step

    def info(self, name: str) -> AdapterInfo:
        with self._lock:
            return self._info(name)

    def all(self) -> list[AdapterInfo]:
        with self._lock:
            return [self._info(name) for name in self._entries]

    def statistics(self) -> dict[str, int]:
        with self._lock:
            resident = [entry.native for entry in self._entries.values() if entry.native is not None]
            return {
                "adapters": len(self._entries),
                "adapters_resident": len(resident),
                "adapter_bytes": sum(native.bytes for native in resident),
                "adapter_evictions": self._evictions,
            }

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._on.clear()

    # --- memory; the lock is held, but for _with_room() ---------------------------------------------

    def _bring(
        self, native: _native.Model, name: str, entry: _Entry, keep: Collection[str]
    ) -> _native.Adapter:
        entry.used = next(self._clock)
        if entry.native is not None:
            return entry.native
        parts = [part.native() for part in entry.source.read()]
        self._keep_to_limit(entry.bytes, keep)
        made = self._with_room(lambda: native.adapter(name, parts, entry.order), native, keep)
        if entry.fingerprint not in (None, made.fingerprint):
            raise CorruptError(
                f"{entry.source.path}: adapter {name}: has changed since it was loaded; unload it first"
            )
        entry.native, entry.fingerprint, entry.bytes = made, made.fingerprint, made.bytes
        self._keep_to_limit(0, keep)  # a file takes more in memory, which is not known before
        return made

    def _keep_to_limit(self, more_bytes: int, keep: Collection[str]) -> None:
        while self._limit_bytes and self._resident_bytes() + more_bytes > self._limit_bytes:
            if not self._evict(keep):
                return

    def _with_room(self, make: Callable[[], _Made], native: _native.Model, keep: Collection[str]) -> _Made:
        while True:
            try:
                return make()
            except BudgetError:
                with self._lock:
                    evicted = self._evict(keep)
                if not evicted:
                    native.trim_adapters()
                    return make()

    def _evict(self, keep: Collection[str]) -> bool:
        """The one that was used longest ago, of those that no sequence uses; False where there is none."""
        idle = [
            entry
            for name, entry in self._entries.items()
            if entry.native is not None and name not in keep and not entry.native.in_use
        ]
        if not idle:
            return False
        min(idle, key=lambda entry: entry.used).native = None
        self._evictions += 1
        return True

    def _resident_bytes(self) -> int:
        return sum(entry.bytes for entry in self._entries.values() if entry.native is not None)

    # --- names --------------------------------------------------------------------------------------

    def _info(self, name: str) -> AdapterInfo:
        entry = self._known(name)
        scale = self._on.get(name, 0.0) if self._enabled else 0.0
        source = entry.source
        return AdapterInfo(
            name, source.kind, source.path, entry.bytes, entry.matrices, scale, entry.native is not None
        )

    def _scales(self, choice: AdapterChoice) -> dict[str, float]:
        if choice is None:
            return {}
        if isinstance(choice, str):
            choice = [choice]
        scales = dict(choice.items()) if isinstance(choice, Mapping) else dict.fromkeys(choice, 1.0)
        for name, scale in scales.items():
            self._known(name)
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
                raise InvalidArgumentError(f"adapter {name}: scale: found {scale!r:.40}, allowed is a number")
        return scales

    def _known(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            there = ", ".join(itertools.islice(self._entries, 20)) or "none"
            more = f" and {len(self._entries) - 20} more" if len(self._entries) > 20 else ""
            raise NotFoundError(f"adapter {name!r:.80}: is not loaded; there are {there}{more}")
        return entry


class Adapters:
    """What a model does with adapters, for engines that take any: those give _adapter_set and _load_adapter()."""

    _adapter_set: AdapterSet | None = None

    def load_adapter(self, path: str | os.PathLike[str], name: str | None = None) -> AdapterInfo:
        """Load an adapter file (see `edgert adapter convert`) or a PEFT directory under `name`, by default the path's own.
        It is off until set_adapter() or a call's `adapter` turns it on; its memory counts towards the budget. Of a file the
        header alone is read, its numbers when a sequence first needs them, so that hundreds can be loaded; what is not
        in use leaves the memory where another needs it, and is read again.

        Raises UnsupportedError by name for what cannot be run, InvalidArgumentError for an adapter of another model or a
        name that is taken, BudgetError where it does not fit.
        """
        return self._load_adapter(Path(path), Path(path).stem if name is None else name)

    def unload_adapter(self, name: str) -> None:
        """Raises NotFoundError. What runs with it runs on."""
        self._adapters()
        self._unload_adapter(name)

    def set_adapter(self, adapter: AdapterChoice) -> None:
        """Turn these on, and no others, for what begins from now on: a name, several, or {name: scale}."""
        self._adapters().set(adapter)

    def disable_adapters(self) -> None:
        """Run as without them, until set_adapter() or enable_adapters()."""
        self._adapters().enable(False)

    def enable_adapters(self) -> None:
        self._adapters().enable(True)

    def adapters(self) -> list[AdapterInfo]:
        """Those that are loaded, and with which scale they are on."""
        return self._adapters().all()

    def _adapters(self) -> AdapterSet:
        if self._adapter_set is None:
            raise self._unable("it takes no adapters")
        return self._adapter_set

    def check_adapter(self, adapter: AdapterChoice) -> None:
        """Refuse names of adapters that are not there."""
        if adapter is not None:
            self._adapters().check(adapter)

    def _load_adapter(self, path: Path, name: str) -> AdapterInfo:
        raise self._unable("it takes no adapters")

    def _unload_adapter(self, name: str) -> None:
        raise self._unable("it takes no adapters")

    def _unable(self, why: str) -> UnsupportedError:
        raise NotImplementedError


class PeftDirectory:
    """A PEFT adapter as it is, compiled for a bundle whenever it is read."""

    def __init__(self, path: Path, bundle_path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self._bundle_path = bundle_path
        self._manifest = manifest
        self._parts: list[Part] | None = None
        self._parts = self._compiled()
        self.targets = [part.target for part in self._parts]
        self.bytes = sum(info.stat().st_size for info in path.iterdir() if info.name.endswith(".safetensors"))

    def _compiled(self) -> "list[Part]":
        from edgert.converters.adapter import compile_adapter
        from edgert.converters.peft import read_peft

        adapter = read_peft(self.path)
        self.kind = adapter.kind
        return compile_adapter(adapter, self._bundle_path, self._manifest)

    def check_shapes(self, shape_of: Callable[[str], tuple[int, int]]) -> None:
        """Compiling it has seen to that."""

    def read(self) -> "list[Part]":
        parts, self._parts = self._parts, None  # what it was made with serves the first time
        return self._compiled() if parts is None else parts


def open_adapter(path: str | os.PathLike[str], bundle_path: Path, manifest: dict[str, Any]) -> Source:
    """An adapter file, whose header alone is read, or a PEFT directory, for a bundle."""
    from edgert.converters.adapter_file import AdapterFile
    from edgert.converters.peft import is_peft

    place = Path(path)
    if not place.is_dir():
        return AdapterFile.open(place, manifest)
    if not is_peft(place):
        raise NotFoundError(f"{place}: no PEFT adapter (there is no adapter_config.json)")
    return PeftDirectory(place, bundle_path, manifest)


def read_parts(
    path: str | os.PathLike[str], bundle_path: Path, manifest: dict[str, Any]
) -> "tuple[str, list[Part]]":
    """Kind and parts of an adapter file or a PEFT directory, for a bundle."""
    source = open_adapter(path, bundle_path, manifest)
    return source.kind, source.read()
