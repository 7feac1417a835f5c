"""The adapters of a loaded model: which there are, which are in memory, and which are on."""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edgert import _native
from edgert.adapter_sources import PeftDirectory, Source, estimate_of, estimate_of_counts, naming
from edgert.bundle import Bundle
from edgert.errors import (
    BudgetError,
    CorruptError,
    EdgertError,
    InvalidArgumentError,
    NotFoundError,
)
from edgert.patches import (
    MAX_LOSS,
    AdapterMode,
    Decision,
    Mix,
    PatchEstimate,
    PatchSets,
    check_mode,
    decide,
    decide_stored,
    expected_loss,
    same_adapters,
    too_much,
)
from edgert.vocabulary import AdapterVocabulary, together

# One by its name, several, or each with its scale; None: those that are on.
AdapterChoice = str | Sequence[str] | Mapping[str, float] | None
_Made = TypeVar("_Made")
_MOST_SCALE = 3.4e38  # of f32
_FIRST_TAKEN_BYTES = 256 << 10  # from the experts; then twice as many each time
_MOST_TAKEN_BYTES = 1 << 44


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter. `kind` as PEFT calls it; `bytes` of the budget while it is `resident`, of its file until it first
    was; `scale` 0 where it is off. `mode`: "patch" where its sparse values are in the weights, "gated" where tokens choose,
    else "overlay"; empty where it is off. `why`: why it is no patch. `patch_counts`: of the patches of all that are on, as far as they were used: see
    _native.Patches.counts()."""

    name: str
    kind: str
    path: Path
    bytes: int
    matrices: int
    scale: float
    resident: bool
    mode: str = ""
    why: str = ""
    patch_counts: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Entry:
    source: Source
    order: int  # in which a row's adapters add, in memory or not
    matrices: int
    bytes: int
    native: _native.Adapter | None = None  # while it is in memory
    stored: _native.Adapter | None = None  # once it ran as patches of its file: nothing but what it is called
    fingerprint: int | None = None  # once it was
    estimate: PatchEstimate = field(default_factory=PatchEstimate)  # once it was
    used: int = 0  # when last


class AdapterSet:
    """By name, with the ones that are on and their scales. Thread-safe; sequences keep what they began with.

    Any number may be there; their numbers are read when a sequence first needs them. Those that no sequence uses leave the
    memory, the least recently used first, where another one or the budget wants it, and where they take more than
    `limit_bytes` together (0: the budget alone bounds them).
    """

    def __init__(self, bundle: Bundle, limit_bytes: int = 0) -> None:
        self._bundle = bundle
        self._lock = threading.RLock()  # never held while a step is waited for, but where memory is short
        self._switching = (
            threading.Lock()
        )  # taken before the other: held until weights are as they were asked for
        self._limit_bytes = limit_bytes
        self._entries: dict[str, _Entry] = {}
        self._on: dict[str, float] = {}
        self._enabled = True
        self._count = itertools.count(1)
        self._clock = itertools.count(1)
        self._evictions = 0
        self._sets = PatchSets()
        self._runs = Decision(None)
        self._mode: AdapterMode = "auto"  # in which they were turned on

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
            with naming(source.path):
                source.check_shapes(native.target)
            entry = _Entry(source, next(self._count), len(source.targets), source.bytes)
            if isinstance(source, PeftDirectory):
                self._bring(native, name, entry, keep={name})
            self._entries[name] = entry
            return self._info(name)

    def remove(self, native: _native.Model, name: str) -> None:
        """Its memory is free once the sequences that use it are closed."""
        with self._switching:
            with self._lock:
                entry = self._known(name)
                del self._entries[name]
                dropped = [
                    patches
                    for adapter in (entry.native, entry.stored)
                    if adapter is not None
                    for patches in self._sets.forget(adapter)
                ]
                if self._on.pop(name, None) is not None and self._runs.top_k == 0:
                    self._runs = self._decide_again(native)
            while dropped:
                native.remove_patches(dropped.pop())
            entry.native = entry.stored = None  # or its memory would stay
        native.trim_adapters()
        native.return_to_experts()

    def set(
        self, native: _native.Model, choice: AdapterChoice, mode: AdapterMode = "auto", top_k: int = 2
    ) -> None:
        """Raises InvalidArgumentError and BudgetError where `mode` is "patch" or "gated" and that cannot be."""
        check_mode(mode)
        if type(top_k) is not int or top_k < 1:
            raise InvalidArgumentError(f"top_k: found {top_k!r:.40}, allowed is a whole number from 1")
        with self._switching:
            with self._lock:
                on = {name: scale for name, scale in self._scales(choice).items() if scale != 0}
                self.said(choice)
                rescaled = self._enabled and same_adapters(on, self._on)
                runs = self._decide(native, on, mode, rescaled=rescaled, top_k=top_k)
                before = self._runs, self._on, self._mode, self._enabled
                self._runs, self._on, self._mode, self._enabled = runs, on, mode, True
            try:
                native.use_patches(runs.patches)  # sequences that begin meanwhile have them anyway
            except EdgertError:  # of reading them
                with self._lock:
                    self._runs, self._on, self._mode, self._enabled = before
                raise
            if runs.patches is None or mode == "patch":
                return
            loss = float(runs.patches.counts()["loss"])  # of the dense matrices at these scales
            if loss > MAX_LOSS:
                with self._lock:
                    self._runs = too_much(loss)
                native.use_patches(None)

    def _decide_again(self, native: _native.Model) -> Decision:
        """For those that are left on."""
        if any(self._entries[name].native is None for name in self._on):  # none is read for this
            return Decision(None)
        try:
            return self._decide(native, self._on, self._mode, rescaled=False)
        except (BudgetError, InvalidArgumentError):  # "patch" was possible for all of them
            return self._decide(native, self._on, "auto", rescaled=False)

    def _decide(
        self,
        native: _native.Model,
        on: Mapping[str, float],
        mode: AdapterMode,
        *,
        rescaled: bool,
        top_k: int = 0,
    ) -> Decision:
        """Brings those that are to be on into memory: what patches would make of them is not known before."""
        if mode == "overlay":
            return Decision(None, "asked for" if on else "")
        stored = None if mode == "gated" else self._stored(native, on, mode)
        if stored is not None:
            return stored
        mix = self._mix_of(native, on)
        if mode == "gated":
            for adapter, _ in mix:
                if adapter.added_tokens:
                    raise InvalidArgumentError(
                        f"mode: 'gated' is not possible: adapter {adapter.name} brings tokens"
                    )
                if adapter.ungated:
                    raise InvalidArgumentError(
                        f"mode: 'gated' is not possible: adapter {adapter.name}: {adapter.ungated} has no gate"
                    )
            return Decision(None, "tokens choose by their gates", top_k)
        estimates = [self._entries[name].estimate for name in on]
        return decide(
            native, self._sets, mix, estimates, mode,
            rescaled=rescaled, make_room=lambda: self._evict(native, on.keys()),
        )  # fmt: skip

    def _stored(self, native: _native.Model, on: Mapping[str, float], mode: AdapterMode) -> Decision | None:
        """By patches that a file has, of one adapter as it is: nothing else of it is read. None where that cannot be."""
        (name, scale), *others = on.items() or [("", 0.0)]
        entry = self._entries.get(name)
        patches = None if entry is None else entry.source.patches
        if entry is None or patches is None or others or scale != 1:
            return None
        estimate = estimate_of_counts(patches.counts)
        loss = expected_loss([scale], [estimate])
        if mode == "auto" and (loss is None or loss > MAX_LOSS):
            return None
        entry.used, entry.estimate = next(self._clock), estimate
        path = os.path.realpath(entry.source.path)

        def spare(make: Callable[[], _Made]) -> _Made:
            return self.with_room(make, native, keep=on.keys())

        try:
            adapter = entry.stored or spare(
                lambda: native.stored_adapter(name, entry.order, patches.fingerprint)
            )
            entry.stored = adapter
            return decide_stored(
                native, self._sets, adapter,
                lambda keep: native.stored_patches(adapter, path, patches.places, patches.counts, keep),
                spare=spare,
            )  # fmt: skip
        except BudgetError:
            if mode == "patch":
                raise
            return None

    def enable(self, native: _native.Model, on: bool) -> None:
        with self._switching:
            with self._lock:
                self._enabled = on
                patches = self._runs.patches if on else None
            native.use_patches(patches)

    def check(self, choice: AdapterChoice) -> None:
        """Refuse names that are not there, scales that are none, and adapters that cannot run together."""
        self.said(choice)

    def sequence(
        self,
        native: _native.Model,
        choice: AdapterChoice,
        make: Callable[[Mix, _native.Patches | None, int], _Made],
    ) -> _Made:
        """What `make` makes of the chosen adapters, in memory, and their scales, of their patches, and of how many a token
        takes: those that are on as they are on, others beside the weights. Where it raises BudgetError, adapters that are not in use make room."""
        runs = Decision(None)
        with self._lock:
            if choice is not None:
                scales = self._scales(choice)
            elif self._enabled:
                scales, runs = self._on, self._runs
            else:
                scales = {}
            scales = {name: scale for name, scale in scales.items() if scale != 0}
            mix = list(runs.mix) or self._mix_of(native, scales)
        return self.with_room(
            lambda: make(mix, runs.patches, runs.top_k), native, keep=scales.keys()
        )  # may wait for a step

    def _mix_of(self, native: _native.Model, scales: Mapping[str, float]) -> Mix:
        return [
            (self._bring(native, name, self._known(name), keep=scales.keys()), scale)
            for name, scale in scales.items()
        ]

    def said(self, choice: AdapterChoice) -> AdapterVocabulary:
        """What the chosen adapters say of text, or those that are on. Raises InvalidArgumentError where they cannot run together."""
        with self._lock:
            on = self._on if self._enabled else {}
            scales = on if choice is None else self._scales(choice)
            chosen = [
                (entry.order, name, entry)
                for name, scale in scales.items()
                if scale
                for entry in (self._known(name),)
            ]
            return together(
                {name: entry.source.vocabulary for _, name, entry in sorted(chosen, key=lambda one: one[0])}
            )

    def all_said(self) -> Collection[AdapterVocabulary]:
        """What each of those that are loaded says."""
        with self._lock:
            return {entry.source.vocabulary for entry in self._entries.values()}

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
            self._sets.clear()
            self._runs = Decision(None)

    # --- memory; the lock is held, but for make_way() and with_room() ---------------------------------------------

    def _bring(
        self, native: _native.Model, name: str, entry: _Entry, keep: Collection[str]
    ) -> _native.Adapter:
        from edgert.converters.remainders import add_remainders

        entry.used = next(self._clock)
        if entry.native is not None:
            return entry.native
        read = entry.source.read()
        with naming(entry.source.path):
            add_remainders(read, self._bundle.path, self._bundle.manifest)
        parts = [part.native() for part in read]
        self._keep_to_limit(native, entry.bytes, keep)
        rows = entry.source.vocabulary.rows
        with naming(entry.source.path):
            made = self.with_room(lambda: native.adapter(name, parts, entry.order, rows), native, keep)
        if entry.fingerprint not in (None, made.fingerprint):
            raise CorruptError(
                f"{entry.source.path}: adapter {name}: has changed since it was loaded; unload it first"
            )
        entry.native, entry.fingerprint, entry.bytes = made, made.fingerprint, made.bytes
        entry.estimate = estimate_of(read)
        self._keep_to_limit(native, 0, keep)  # a file takes more in memory, which is not known before
        return made

    def _keep_to_limit(self, native: _native.Model, more_bytes: int, keep: Collection[str]) -> None:
        while self._limit_bytes and self._resident_bytes() + more_bytes > self._limit_bytes:
            if not self._evict(native, keep):
                return

    def make_way(self, native: _native.Model, work: Callable[[], None]) -> None:
        """Do `work`. Where it raises BudgetError, adapters that are neither on nor in use leave the memory for it."""
        while True:
            try:
                return work()
            except BudgetError:
                with self._lock:
                    evicted = self._evict(native, self._on.keys())
                if not evicted:
                    native.trim_adapters()
                    return work()

    def with_room(
        self, make: Callable[[], _Made], native: _native.Model, keep: Collection[str] | None = None
    ) -> _Made:
        """What `make` makes. Where it raises BudgetError, adapters that are not in use go, and then experts. `keep`:
        those that stay; None: those that are on."""
        taken_bytes = _FIRST_TAKEN_BYTES
        try:
            return make()
        except BudgetError:
            native.seek_room(True)  # or others would give back what this takes
        try:
            while True:
                with self._lock:
                    evicted = self._evict(native, self._on.keys() if keep is None else keep)
                if not evicted:
                    native.trim_adapters()
                    # Others may give back what was taken, again and again.
                    if taken_bytes > _MOST_TAKEN_BYTES or not native.take_from_experts(taken_bytes):
                        return make()
                    taken_bytes *= 2
                with contextlib.suppress(BudgetError):
                    return make()
        finally:  # more went than was needed
            native.seek_room(False)
            native.return_to_experts()

    def _evict(self, native: _native.Model, keep: Collection[str]) -> bool:
        """The one that was used longest ago, of those that no sequence and no patches use; where there is none, patches
        that are not on. False where there are none either."""
        idle = [
            entry
            for name, entry in self._entries.items()
            if entry.native is not None and name not in keep and not entry.native.in_use
        ]
        if not idle:
            return self._sets.drop_oldest(native, but=self._runs.patches)
        min(idle, key=lambda entry: entry.used).native = None
        self._evictions += 1
        return True

    def _resident_bytes(self) -> int:
        return sum(entry.bytes for entry in self._entries.values() if entry.native is not None)

    # --- names --------------------------------------------------------------------------------------

    def _info(self, name: str) -> AdapterInfo:
        entry = self._known(name)
        scale = self._on.get(name, 0.0) if self._enabled else 0.0
        source, patches = entry.source, self._runs.patches
        patched = patches is not None and entry.estimate.carried > 0
        counts = patches.counts() if patches is not None and scale else {}
        beside = "gated" if self._runs.top_k else "overlay"
        mode, why = ("patch" if patched else beside, self._runs.why) if scale else ("", "")
        resident = entry.native is not None or (scale != 0 and bool(self._runs.mix))
        return AdapterInfo(
            name, source.kind, source.path, entry.bytes, entry.matrices, scale, resident, mode, why, counts,
        )  # fmt: skip

    def _scales(self, choice: AdapterChoice) -> dict[str, float]:
        if choice is None:
            return {}
        if isinstance(choice, str):
            choice = [choice]
        if not isinstance(choice, Collection) or not all(isinstance(name, str) for name in choice):
            raise InvalidArgumentError(
                f"adapter: found {choice!r:.60}, allowed is a name, several, or an object of names and scales"
            )
        scales = dict(choice.items()) if isinstance(choice, Mapping) else dict.fromkeys(choice, 1.0)
        for name, scale in scales.items():
            self._known(name)
            number = isinstance(scale, int | float) and not isinstance(scale, bool)
            if not number or not abs(scale) <= _MOST_SCALE:
                raise InvalidArgumentError(f"adapter {name}: scale: found {scale!r:.40}, allowed is a number")
        return scales

    def _known(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            there = ", ".join(itertools.islice(self._entries, 20)) or "none"
            more = f" and {len(self._entries) - 20} more" if len(self._entries) > 20 else ""
            raise NotFoundError(f"adapter {name!r:.80}: is not loaded; there are {there}{more}")
        return entry
