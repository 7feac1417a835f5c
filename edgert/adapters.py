"""The adapters of a loaded model: which there are, and which are on."""

import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert.errors import InvalidArgumentError, NotFoundError
from edgert.patches import (
    MAX_LOSS,
    AdapterMode,
    Decision,
    Mix,
    PatchEstimate,
    PatchSets,
    check_mode,
    decide,
    same_adapters,
    too_much,
)

if TYPE_CHECKING:
    from edgert.converters.adapter import Part

# One by its name, several, or each with its scale; None: those that are on.
AdapterChoice = str | Sequence[str] | Mapping[str, float] | None


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter. `kind` as PEFT calls it; `bytes` of the budget; `scale` 0 where it is off. `mode`: "patch" where its sparse
    values are in the weights, else "overlay"; empty where it is off. `why`: why it is no patch. `patch_counts`: of the patches of all that are on, as far as they were used: see
    _native.Patches.counts()."""

    name: str
    kind: str
    path: Path
    bytes: int
    matrices: int
    scale: float
    mode: str = ""
    why: str = ""
    patch_counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Loaded:
    native: _native.Adapter
    kind: str
    path: Path
    matrices: int
    estimate: PatchEstimate


class AdapterSet:
    """By name, with the ones that are on and their scales. Thread-safe; sequences keep what they began with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, _Loaded] = {}
        self._on: dict[str, float] = {}
        self._enabled = True
        self._sets = PatchSets()
        self._runs = Decision(None)

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
            self._loaded[name] = _Loaded(made, kind, path, len(parts), _estimate(parts))
        return self.info(name)

    def remove(self, native: _native.Model, name: str) -> None:
        """Its memory is free once the sequences that use it are closed."""
        with self._lock:
            adapter = self._known(name).native
            del self._loaded[name]
            self._sets.forget(native, adapter)
            if self._on.pop(name, None) is not None:
                self._runs = Decision(None)
                self._runs = self._decide(native, self._on, "auto", rescaled=False)

    def set(self, native: _native.Model, choice: AdapterChoice, mode: AdapterMode = "auto") -> None:
        """Raises InvalidArgumentError and BudgetError where `mode` is "patch" and that cannot be."""
        check_mode(mode)
        with self._lock:
            on = {name: scale for name, scale in self._scales(choice).items() if scale != 0}
            rescaled = self._enabled and same_adapters(on, self._on)
            self._runs = self._decide(native, on, mode, rescaled=rescaled)
            self._on = on
            self._enabled = True
            native.use_patches(self._runs.patches)
            if self._runs.patches is None or mode == "patch":
                return
            loss = float(self._runs.patches.counts()["loss"])  # of the dense matrices at these scales
            if loss > MAX_LOSS:
                self._runs = too_much(loss)
                native.use_patches(None)

    def _decide(
        self, native: _native.Model, on: Mapping[str, float], mode: AdapterMode, *, rescaled: bool
    ) -> Decision:
        estimates = [self._loaded[name].estimate for name in on]
        return decide(native, self._sets, self._mix_of(on), estimates, mode, rescaled=rescaled)

    def enable(self, native: _native.Model, on: bool) -> None:
        with self._lock:
            self._enabled = on
            native.use_patches(self._runs.patches if on else None)

    def mix(self, choice: AdapterChoice) -> tuple[Mix, _native.Patches | None]:
        """What a sequence is made with: those that are on as they are on, others beside the weights."""
        with self._lock:
            if choice is None:
                return (self._mix_of(self._on), self._runs.patches) if self._enabled else ([], None)
            return self._mix_of(self._scales(choice)), None

    def _mix_of(self, scales: Mapping[str, float]) -> Mix:
        return [(self._loaded[name].native, scale) for name, scale in scales.items() if scale != 0]

    def info(self, name: str) -> AdapterInfo:
        loaded = self._known(name)
        scale = self._on.get(name, 0.0) if self._enabled else 0.0
        patched = self._runs.patches is not None and loaded.estimate.carried > 0
        counts = self._runs.patches.counts() if self._runs.patches is not None and scale else {}
        mode, why = ("patch" if patched else "overlay", self._runs.why) if scale else ("", "")
        return AdapterInfo(
            name, loaded.kind, loaded.path, loaded.native.bytes, loaded.matrices, scale, mode, why, counts
        )

    def all(self) -> list[AdapterInfo]:
        with self._lock:
            return [self.info(name) for name in self._loaded]

    def clear(self) -> None:
        with self._lock:
            self._loaded.clear()
            self._on.clear()
            self._sets.clear()
            self._runs = Decision(None)

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


def _estimate(parts: "Sequence[Part]") -> PatchEstimate:
    carried = beside = lost = sparse = 0.0
    for part in parts:
        if part.values is None:
            continue
        squares = float((part.values.astype("float64") ** 2).sum())
        sparse += squares
        if part.patch_error is not None:
            carried += squares
            beside += float(part.patch_error[1])
            lost += float(part.patch_error[0] - part.patch_error[1])
    return PatchEstimate(carried, beside, max(0.0, lost), sparse)


def read_parts(
    path: str | os.PathLike[str], bundle_path: Path, manifest: dict[str, Any], weights: Path | None = None
) -> "tuple[str, list[Part]]":
    """Kind and parts of an adapter file or a PEFT directory, for a bundle; with the remainders that its sparse values lack,
    from the checkpoint `weights` or the bundle, where either has them."""
    from edgert.converters.adapter import compile_adapter
    from edgert.converters.adapter_file import read_adapter
    from edgert.converters.peft import is_peft, read_peft
    from edgert.converters.remainders import add_remainders

    place = Path(path)
    if place.is_dir():
        if not is_peft(place):
            raise NotFoundError(f"{place}: no PEFT adapter (there is no adapter_config.json)")
        adapter = read_peft(place)
        kind, parts = adapter.kind, compile_adapter(adapter, bundle_path, manifest)
    else:
        kind, parts = read_adapter(place, manifest)
    add_remainders(parts, bundle_path, manifest, weights)
    return kind, parts
