"""The adapters of a loaded model: which there are, and which are on."""

import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert.errors import InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from edgert.converters.adapter import Part

# One by its name, several, or each with its scale; None: those that are on.
AdapterChoice = str | Sequence[str] | Mapping[str, float] | None


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter. `kind` as PEFT calls it; `bytes` of the budget; `scale` 0 where it is off."""

    name: str
    kind: str
    path: Path
    bytes: int
    matrices: int
    scale: float


@dataclass(frozen=True)
class _Loaded:
    native: _native.Adapter
    kind: str
    path: Path
    matrices: int


class AdapterSet:
    """By name, with the ones that are on and their scales. Thread-safe; sequences keep what they began with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, _Loaded] = {}
        self._on: dict[str, float] = {}
        self._enabled = True

    def add(
        self, native: _native.Model, name: str, kind: str, path: Path, parts: "Sequence[Part]"
    ) -> AdapterInfo:
        """Raises InvalidArgumentError for a name that is taken, or empty; BudgetError where it does not fit."""
        if not name or name != name.strip():
            raise InvalidArgumentError(
                f"adapter name: found {name!r:.60}, allowed is text without spaces around it"
            )
        with self._lock:
            if name in self._loaded:
                raise InvalidArgumentError(f"adapter {name}: is loaded already; unload it first")
            made = native.adapter(name, [part.native() for part in parts])
            self._loaded[name] = _Loaded(made, kind, path, len(parts))
        return self.info(name)

    def remove(self, name: str) -> None:
        """Its memory is free once the sequences that use it are closed."""
        with self._lock:
            self._known(name)
            del self._loaded[name]
            self._on.pop(name, None)

    def set(self, choice: AdapterChoice) -> None:
        with self._lock:
            self._on = self._scales(choice)
            self._enabled = True

    def enable(self, on: bool) -> None:
        with self._lock:
            self._enabled = on

    def mix(self, choice: AdapterChoice) -> list[tuple[_native.Adapter, float]]:
        """What a sequence is made with."""
        with self._lock:
            scales = (self._on if self._enabled else {}) if choice is None else self._scales(choice)
            return [(self._loaded[name].native, scale) for name, scale in scales.items() if scale != 0]

    def info(self, name: str) -> AdapterInfo:
        loaded = self._known(name)
        scale = self._on.get(name, 0.0) if self._enabled else 0.0
        return AdapterInfo(name, loaded.kind, loaded.path, loaded.native.bytes, loaded.matrices, scale)

    def all(self) -> list[AdapterInfo]:
        with self._lock:
            return [self.info(name) for name in self._loaded]

    def clear(self) -> None:
        with self._lock:
            self._loaded.clear()
            self._on.clear()

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

    def _known(self, name: str) -> _Loaded:
        loaded = self._loaded.get(name)
        if loaded is None:
            there = ", ".join(self._loaded) or "none"
            raise NotFoundError(f"adapter {name!r:.80}: is not loaded; there are {there}")
        return loaded


def read_parts(
    path: str | os.PathLike[str], bundle_path: Path, manifest: dict[str, Any]
) -> "tuple[str, list[Part]]":
    """Kind and parts of an adapter file or a PEFT directory, for a bundle."""
    from edgert.converters.adapter import compile_adapter
    from edgert.converters.adapter_file import read_adapter
    from edgert.converters.peft import is_peft, read_peft

    place = Path(path)
    if place.is_dir():
        if not is_peft(place):
            raise NotFoundError(f"{place}: no PEFT adapter (there is no adapter_config.json)")
        adapter = read_peft(place)
        return adapter.kind, compile_adapter(adapter, bundle_path, manifest)
    return read_adapter(place, manifest)
