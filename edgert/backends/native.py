"""edgert's own engine: decoders in a bundle, whose experts may stay in storage."""

import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert.adapter_sources import open_adapter
from edgert.adapters import AdapterChoice, AdapterInfo, AdapterSet
from edgert.bundle import Bundle
from edgert.errors import BudgetError, InvalidArgumentError, UnsupportedError
from edgert.lossy import names
from edgert.model import Model
from edgert.patches import AdapterMode, Mix
from edgert.prompts import AdaptedPrompts, Prompts
from edgert.session import Session, restore, save
from edgert.tokenizer import Tokenizer, extended_tokenizer, tokenizer_of
from edgert.units import format_bytes
from edgert.vocabulary import AdapterVocabulary, AddedToken

if TYPE_CHECKING:
    import numpy
    import numpy.typing

_RUNTIME_KNOBS = {
    "memory": "memory_bytes",
    "threads": "threads",
    "io_threads": "io_threads",
    "io_backend": "io_backend",
    "direct_io": "direct_io",
    "isa": "isa",
}
_KEPT_PROMPTS = 16
_PART_BYTES = 8 << 20  # of f32 logits at a time
_MODEL_KNOBS = (
    "context", "parallel", "chunk", "kv_format", "eviction", "prefetch", "adapter_memory", "expert_memory",
)  # fmt: skip
_SET_AFTER_LOADING = ("prefetch_depth", "token_interval_ms")


class NativeModel(Model):
    backend = "edgert"

    def __init__(self, bundle: Bundle, knob_values: Mapping[str, Any], *, moments: str = "none") -> None:
        self._stepping: object | None = None
        stated = {name: value for name, value in knob_values.items() if value not in (None, "auto")}
        tokenizer = tokenizer_of(bundle)
        for_runtime = {arg: stated[name] for name, arg in _RUNTIME_KNOBS.items() if name in stated}
        for_model = {name: stated[name] for name in _MODEL_KNOBS if name in stated}
        self._runtime = _native.Runtime(**for_runtime)
        if tokenizer is not None:
            self._runtime.reserve(tokenizer.memory_bytes)
        self._pid = os.getpid()
        lossy = {name: stated[name] for name in names() if name in stated}
        self._bundle = bundle
        self.splits_experts = bundle.splits_experts
        self._adapter_set: AdapterSet = AdapterSet(bundle, stated.get("adapter_memory", 0))
        self._adapted_prompts = _AdaptedPromptsOf(self)
        native = _native.Model(self._runtime, str(bundle.path), lossy=lossy, moments=moments, **for_model)
        self._native: _native.Model | None = native
        super().__init__(
            bundle.name,
            bundle.path,
            tokenizer,
            bundle.json_asset("generation_config.json"),
            context=native.context,
            vocab_size=native.vocab_size,
            resident=native.resident,
            minimum_bytes=native.minimum_bytes,
        )
        for knob in _SET_AFTER_LOADING:
            if knob in stated:
                self.set_knob(knob, stated[knob])
        self._warn_of(lossy, stacklevel=5)
        plan = native.plan()
        if plan["slots_bytes"] < min(plan["token_bytes"], plan["expert_bytes"]):
            warnings.warn(
                f"{self.name}: the budget leaves {format_bytes(plan['slots_bytes'])} for experts, and one token uses up to "
                f"{format_bytes(plan['token_bytes'])}: every token will wait for storage",
                RuntimeWarning,
                stacklevel=4,
            )

    @property
    def closed(self) -> bool:
        return self._native is None

    @property
    def native(self) -> _native.Model:
        if self._native is None:
            raise InvalidArgumentError(f"the model {self.name} is closed")
        if os.getpid() != self._pid:  # the threads that it would wait for stayed behind
            raise InvalidArgumentError(
                f"the model {self.name} was loaded before this process was forked; load it here"
            )
        return self._native

    @property
    def lossy_modes(self) -> dict[str, float]:
        return self.native.lossy()

    def knobs(self) -> dict[str, Any]:
        native, runtime = self.native, self._runtime
        lossy_shares = native.lossy()
        return {
            "memory": runtime.budget_bytes,
            "expert_memory": native.statistics()["slot_capacity_bytes"],
            "threads": runtime.active_threads,
            "io_threads": runtime.io_depth,
            "prefetch_depth": native.prefetch_depth,
            "token_interval_ms": native.token_interval_ms,
            **{name: lossy_shares.get(name, 0.0) for name in names()},
        }

    def _set_knob(self, name: str, value: Any) -> None:
        native, runtime = self.native, self._runtime
        if name == "memory":
            size = value or _native.available_memory_bytes()
            self._adapter_set.make_way(native, lambda: native.set_memory(size))
        elif name == "expert_memory":
            native.set_expert_memory(value or native.plan()["slots_bytes"])
        elif name == "threads":
            runtime.active_threads = value or runtime.threads
        elif name == "io_threads":
            runtime.io_depth = value
        elif name == "prefetch_depth":
            native.prefetch_depth = value
        elif name == "token_interval_ms":
            native.token_interval_ms = value
        else:
            native.set_lossy({**native.lossy(), name: value})
            self._warn_of({name: value}, stacklevel=4)

    def _warn_of(self, lossy: Mapping[str, float], stacklevel: int) -> None:
        """Where a mode has nothing to work on."""
        if lossy.get("low_precision_misses", 0) > 0 and not self.splits_experts:
            warnings.warn(
                f"{self.name}: low_precision_misses changes nothing: the bundle's experts are not split (edgert convert "
                "--split-experts)",
                RuntimeWarning,
                stacklevel=stacklevel,
            )

    def sequence(self, adapter: AdapterChoice = None, prompt: Sequence[int] = ()) -> _native.Sequence:
        native = self.native
        return self._adapter_set.sequence(
            native, adapter, lambda mix, patches, top_k: native.sequence(mix, prompt, patches, top_k)
        )

    def mix(self, adapter: AdapterChoice) -> tuple[Mix, _native.Patches | None, int]:
        """What a sequence with `adapter` is made with. Raises NotFoundError."""
        return self._adapter_set.sequence(self.native, adapter, lambda *runs: runs)

    def session(self, *, adapter: AdapterChoice = None) -> Session:
        return Session(self._plain_sequence(adapter), prompts=self.prompts(adapter))

    def save_session(self, session: Session, path: str | os.PathLike[str]) -> None:
        save(session, path, self._session_key(session.sequence, session.prompts or self))

    def restore_session(self, path: str | os.PathLike[str], *, adapter: AdapterChoice = None) -> Session:
        sequence, prompts = self._plain_sequence(adapter), self.prompts(adapter)
        session = restore(sequence, path, self._session_key(sequence, prompts))
        session.prompts = prompts
        return session

    def _plain_sequence(self, adapter: AdapterChoice) -> _native.Sequence:
        """One whose tokens are all its text's, as a session counts them."""
        sequence = self.sequence(adapter)
        if sequence.soft_tokens:
            sequence.close()
            raise UnsupportedError("session: adapters with a soft prompt are not kept by this version")
        return sequence

    def _session_key(self, sequence: _native.Sequence, prompts: Prompts) -> dict[str, Any]:
        native = self.native
        return {
            "bundle_id": self._bundle.manifest["bundle_id"],
            "adapters": f"{sequence.fingerprint:016x}",
            "kv_format": native.kv_format,
            "state": f"{native.state_fingerprint:016x}",
            "kv_block_bytes": native.kv_block_bytes,
            "state_bytes": native.state_bytes,
            "vocab_size": prompts.vocab_size,
        }

    def prompts(self, adapter: AdapterChoice = None) -> Prompts:
        said = self._adapter_set.said(adapter)
        return self._adapted_prompts.of(said) if said else self

    def extended_tokenizer(self, tokens: Sequence[AddedToken]) -> Tokenizer:
        """The model's with added tokens; its memory is the budget's. Raises BudgetError."""
        tokenizer, runtime = extended_tokenizer(self._bundle, tokens), self._runtime
        tokenizer.charge = self._adapter_set.with_room(
            lambda: runtime.charge(tokenizer.memory_bytes, "a tokenizer with added tokens"), self.native
        )
        return tokenizer

    def unload_adapter(self, name: str) -> None:
        self._adapter_set.remove(self.native, name)
        self._adapted_prompts.keep(self._adapter_set.all_said())

    def set_adapter(self, adapter: AdapterChoice, mode: AdapterMode = "auto", *, top_k: int = 2) -> None:
        self._adapter_set.set(self.native, adapter, mode, top_k)

    def disable_adapters(self) -> None:
        self._adapter_set.enable(self.native, False)

    def enable_adapters(self) -> None:
        self._adapter_set.enable(self.native, True)

    def _load_adapter(self, path: Path, name: str) -> AdapterInfo:
        source = open_adapter(path, self._bundle.path, self._bundle.manifest)
        return self._adapter_set.add(self.native, name, source)

    def step(
        self, stream: object, sequence: _native.Sequence, tokens: list[int], sampler: _native.Sampler
    ) -> _native.Sample:
        with self._lock:
            self._stepping = stream
            try:
                (sample,) = self.native.step([(sequence, tokens, sampler)])
            finally:
                self._stepping = None
        assert sample is not None  # the row has a sampler
        return sample

    def interrupt(self, stream: object) -> None:
        native = self._native
        if self._stepping is stream and native is not None:
            native.cancel()

    def _logits(self, tokens: list[int], adapter: AdapterChoice) -> "numpy.typing.NDArray[numpy.float32]":
        sequence = self.sequence(adapter)
        try:
            with self._lock:
                return self.native.logits(sequence, tokens)  # type: ignore[no-any-return]
        finally:
            sequence.close()

    def logits_by_parts(
        self, token_ids: Sequence[int], *, first: int = 0, adapter: AdapterChoice = None
    ) -> "Iterator[numpy.typing.NDArray[numpy.float32]]":
        prompts = self.prompts(adapter)
        tokens = prompts.checked(token_ids)
        size = max(1, _PART_BYTES // (4 * prompts.vocab_size))
        with closing(self.sequence(adapter)) as sequence:
            if first > 0:
                with self._lock:
                    self.native.step([(sequence, tokens[:first], None)])
            for begin in range(first, len(tokens), size):
                with self._lock:
                    part = self.native.logits(sequence, tokens[begin : begin + size])
                yield part

    def _stats(self) -> dict[str, Any]:
        return {
            **self.native.statistics(),
            **self._adapter_set.statistics(),
            "budget_bytes": self._runtime.budget_bytes,
            "used_bytes": self._runtime.used_bytes,
            "peak_bytes": self._runtime.peak_bytes,
            "threads": self._runtime.threads,
            "io_backend": self._runtime.io_backend,
            "isa": self._runtime.isa,
            "context": self.context,
            "resident": self.resident,
            "minimum_bytes": self.minimum_bytes,
        }

    def _free(self) -> None:
        self._adapter_set.clear()
        self._adapted_prompts.keep(())
        self._native = None


class _AdaptedPromptsOf:
    """The prompts of a model with adapters, kept for those that come again. Thread-safe."""

    def __init__(self, model: NativeModel) -> None:
        self._model = weakref.proxy(model)
        self._lock = threading.Lock()
        self._kept: OrderedDict[AdapterVocabulary, AdaptedPrompts] = OrderedDict()

    def of(self, said: AdapterVocabulary) -> AdaptedPrompts:
        with self._lock:
            found = self._kept.get(said)
            if found is None and self._kept:
                with suppress(BudgetError):
                    found = self._made(said)
                if found is None:  # tokenizers that nobody uses are free then
                    self._kept.clear()
            found = found or self._made(said)
            self._kept[said] = found
            self._kept.move_to_end(said)
            while len(self._kept) > _KEPT_PROMPTS:
                self._kept.popitem(last=False)
            return found

    def keep(self, still: Collection[AdapterVocabulary]) -> None:
        with self._lock:
            for said in self._kept.keys() - still:
                del self._kept[said]

    def _made(self, said: AdapterVocabulary) -> AdaptedPrompts:
        model = self._model
        if not said.tokens or not model.has_tokenizer:
            return AdaptedPrompts(model, said, model.tokenizer if model.has_tokenizer else None)
        for one in self._kept.values():
            if one.said.tokens == said.tokens:
                return AdaptedPrompts(model, said, one.extended)
        return AdaptedPrompts(model, said, model.extended_tokenizer(said.tokens))
