"""Loading a model and using it."""

import operator
import os
import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from edgert import _native
from edgert.bundle import Bundle, locate
from edgert.errors import (
    CorruptError,
    EdgertError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)
from edgert.generation import Generation, Stream
from edgert.machine import measured
from edgert.sampling import Sampling, defaults_from
from edgert.settings import Layers, knobs
from edgert.tokenizer import Tokenizer
from edgert.units import format_bytes

if TYPE_CHECKING:
    import numpy
    import numpy.typing

Prompt = str | Sequence[int]
Messages = str | Sequence[Mapping[str, Any]]

_RUNTIME_KNOBS = {
    "memory": "memory_bytes",
    "threads": "threads",
    "io_threads": "io_threads",
    "io_backend": "io_backend",
    "direct_io": "direct_io",
    "isa": "isa",
}
_MODEL_KNOBS = ("context", "parallel", "chunk", "kv_format", "eviction")
_LONG_TOKEN = 32  # characters; few texts have so many a token
_PRIMING_TOKENS = 32  # of the prompt, so that text goes on where it ended


def load(
    path_or_name: str | os.PathLike[str] | None = None,
    *,
    memory: int | str | None = None,
    threads: int | str | None = None,
    context: int | str | None = None,
    **others: Any,
) -> "Model":
    """Load a bundle: a path, a name (see `edgert list`), or None for the embedded model.

    `memory` bounds all native memory and the tokenizer's: bytes, "10MiB", "1.5GB", or "auto" (what the machine can
    spare); `threads` and `context` (tokens) likewise take a number or "auto"; `others` are the remaining knobs, such as
    io_threads. What is not given comes from the variable EDGERT_<NAME>, the configuration file, the bundle's own
    defaults, what `edgert devices probe` found best here, or the knob's default, in this order.

    Raises InvalidArgumentError for a knob outside its range, BudgetError naming the smallest budget that works,
    NotFoundError, CorruptError, UnsupportedError or StorageError for the bundle.
    """
    given = {"memory": memory, "threads": threads, "context": context, **others}
    values = knob_values(given)
    bundle = Bundle.open(locate(path_or_name))
    machine = measured()
    stated = {} if machine is None else machine.knobs(bundle.path)
    for name, value in bundle.knobs().items():
        if values[name] is None:
            values[name] = value
    for name, value in stated.items():
        if values[name] in (None, "auto"):
            values[name] = value
    return Model(bundle, values)


def knob_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs as flag, variable and file say; None where none does."""
    rows = {setting.name: setting for setting in knobs()}
    for name in given:
        if name not in rows:
            raise InvalidArgumentError(f"unknown knob {name!r}; the knobs are {', '.join(sorted(rows))}")
    layers = Layers.read()
    return {name: layers.value(setting, given.get(name)) for name, setting in rows.items()}


class Model:
    """A loaded model; made by load(). A context manager: leaving it frees the memory.

    Attributes: name; context (tokens a sequence can hold); vocab_size; resident (every expert fits);
    minimum_bytes (the smallest budget that works); eos_token_ids. Methods may be called from several threads: steps
    take turns.
    """

    def __init__(self, bundle: Bundle, knob_values: Mapping[str, Any]) -> None:
        self.name = bundle.name
        self.path: Path = bundle.path
        self._lock = threading.Lock()
        self._stepping: Stream | None = None
        self._load_counted = False  # whether a generation has counted what loading read
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        stated = {name: value for name, value in knob_values.items() if value not in (None, "auto")}
        self._tokenizer = tokenizer_of(bundle)
        for_runtime = {arg: stated[name] for name, arg in _RUNTIME_KNOBS.items() if name in stated}
        for_model = {name: stated[name] for name in _MODEL_KNOBS if name in stated}
        self._runtime = _native.Runtime(**for_runtime)
        if self._tokenizer is not None:
            self._runtime.reserve(self._tokenizer.memory_bytes)
        self._pid = os.getpid()
        self._native: _native.Model | None = _native.Model(self._runtime, str(bundle.path), **for_model)
        self.context = self._native.context
        self.vocab_size = self._native.vocab_size
        self.minimum_bytes = self._native.minimum_bytes
        self.resident = self._native.resident
        plan = self._native.plan()
        if plan["slots_bytes"] < min(plan["token_bytes"], plan["expert_bytes"]):
            warnings.warn(
                f"{self.name}: the budget leaves {format_bytes(plan['slots_bytes'])} for experts, and one token uses up to "
                f"{format_bytes(plan['token_bytes'])}: every token will wait for storage",
                RuntimeWarning,
                stacklevel=3,
            )
        generation_config = bundle.json_asset("generation_config.json")
        where = str(bundle.path / "generation_config.json")
        self.sampling_defaults = defaults_from(generation_config, where)
        self.eos_token_ids = _eos_tokens(generation_config, self._tokenizer, where)

    # --- generation ---------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, **sampling: Any) -> Generation:
        """Continue `prompt` (text or token ids) and return the whole continuation.

        `sampling`: max_tokens (default: what the context leaves), temperature, top_k, top_p, min_p, repetition_penalty,
        presence_penalty, frequency_penalty, seed (default 0, so runs repeat), stop (a string or a list), logit_bias
        {token: number}, logprobs (number of alternatives), ignore_eos. What is not given comes from the bundle's
        generation_config.json; without one decoding is greedy.

        Raises InvalidArgumentError for an option outside its range, an empty prompt where the model has no
        beginning-of-sequence token, and a prompt that leaves no room in the context.
        """
        return _finished(self.stream(prompt, **sampling))

    def stream(self, prompt: Prompt, **sampling: Any) -> Stream:
        """Like generate(), but returns an iterator over Piece, one a token; its `result` sums up."""
        return self._start(self._prompt_tokens(prompt), sampling, primed=True)

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        template: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Generation: ...
    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[True],
        template: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Stream: ...
    def chat(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        template: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Generation | Stream:
        """Answer a conversation: [{"role": "user", "content": ...}, …], or a string for one user message.

        The bundle's chat template makes the prompt; `template` holds variables for it (tools, enable_thinking, …).
        Raises UnsupportedError where the bundle has no template.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.tokenizer.apply_chat_template(messages, **(template or {}))
        # The template writes the special tokens itself; an answer begins a text of its own.
        tokens = self._encoded(text, add_special_tokens=False)
        answer = self._start(tokens, sampling, primed=False)
        return answer if stream else _finished(answer)

    def cancel(self) -> None:
        """End every running generation of this model, each with finish_reason "cancelled". From any thread."""
        for stream in list(self._streams):
            stream.cancel()

    # --- the parts ----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises NotFoundError where the bundle has none; token ids still work."""
        if self._tokenizer is None:
            raise NotFoundError(
                f"{self.path}: the bundle has no tokenizer.json: pass token ids instead of text"
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def closed(self) -> bool:
        return self._native is None

    @property
    def native(self) -> _native.Model:
        """The engine's own model, for work by steps. Raises InvalidArgumentError once closed."""
        if self._native is None:
            raise InvalidArgumentError(f"the model {self.name} is closed")
        if os.getpid() != self._pid:  # the threads that it would wait for stayed behind
            raise InvalidArgumentError(
                f"the model {self.name} was loaded before this process was forked; load it here"
            )
        return self._native

    def logits(self, token_ids: Sequence[int]) -> "numpy.typing.NDArray[numpy.float32]":
        """Run `token_ids` from an empty sequence; return float32 [len(token_ids), vocab_size].

        Raises InvalidArgumentError for ids outside the vocabulary and for more of them than the context holds.
        """
        tokens = self._checked(token_ids)
        if len(tokens) > self.context:
            raise InvalidArgumentError(
                f"token_ids: found {len(tokens)} tokens, the context holds {self.context}"
            )
        sequence = self.native.sequence()
        try:
            with self._lock:
                return self.native.logits(sequence, tokens)  # type: ignore[no-any-return]
        finally:
            sequence.close()

    def counters_to_start_from(self) -> dict[str, Any]:
        """stats() as a generation is to count from: the first one answers for the reads of loading."""
        before = self.stats()
        with self._lock:
            if not self._load_counted:
                before["bytes_read"] = 0
            self._load_counted = True
        return before

    def stats(self) -> dict[str, Any]:
        """Counters since loading (expert_hits, expert_misses, bytes_read, stall_s, …) and the state now: budget_bytes,
        used_bytes, peak_bytes, threads, io_backend, isa, context, resident, minimum_bytes."""
        native = self.native
        return {
            **native.statistics(),
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

    def close(self) -> None:
        """Cancel what runs and free the memory. May be repeated."""
        self.cancel()
        with self._lock:
            self._native = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<edgert.Model {self.name}>"

    # --- for Stream ---------------------------------------------------------------------------------

    def step(
        self, stream: Stream, sequence: _native.Sequence, tokens: list[int], sampler: _native.Sampler
    ) -> _native.Sample:
        """Run `tokens` of one stream and draw the next. Raises CancelledError when interrupt(stream) came."""
        with self._lock:
            self._stepping = stream
            try:
                (sample,) = self.native.step([(sequence, tokens, sampler)])
            finally:
                self._stepping = None
        assert sample is not None  # the row has a sampler
        return sample

    def interrupt(self, stream: Stream) -> None:
        """Stop the step in progress if it is `stream`'s. Takes no lock, so a signal handler may call it."""
        native = self._native
        if self._stepping is stream and native is not None:
            native.cancel()

    def _start(self, tokens: list[int], options: Mapping[str, Any], primed: bool) -> Stream:
        sampling = Sampling.of(options, self.sampling_defaults, self.vocab_size)
        if len(tokens) >= self.context:
            raise InvalidArgumentError(self._too_long(str(len(tokens))))
        if sampling.stop and self._tokenizer is None:
            raise UnsupportedError(f"{self.path}: stop strings need a tokenizer, and the bundle has none")
        detokenizer = self._tokenizer.stream() if self._tokenizer is not None else None
        if primed and detokenizer is not None:
            for token in tokens[-_PRIMING_TOKENS:]:
                detokenizer.push(token)
        stream = Stream(self, tokens, sampling, detokenizer)
        self._streams.add(stream)
        return stream

    def _prompt_tokens(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return self._checked(prompt)
        tokens = self._encoded(prompt)
        if tokens:
            return tokens
        bos = self.tokenizer.bos_token_id
        if bos is None:
            raise InvalidArgumentError(
                "prompt: it is empty, and the model has no beginning-of-sequence token"
            )
        return [bos]

    def _encoded(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a prompt; one that is much too long is refused by its beginning, at bounded cost."""
        enough = _LONG_TOKEN * self.context
        if len(text) > enough:
            found = len(self.tokenizer.encode(text[:enough], add_special_tokens=False))
            if found > self.context:
                raise InvalidArgumentError(self._too_long(f"more than {found}"))
        tokens = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return self._checked(tokens) if tokens else []

    def _too_long(self, found: str) -> str:
        return (
            f"prompt: found {found} tokens, allowed are {self.context - 1}: the context holds {self.context} with the answer "
            "(see context=, --context)"
        )

    def _checked(self, tokens: Iterable[int]) -> list[int]:
        if not isinstance(tokens, Iterable):
            raise InvalidArgumentError(f"prompt: found {type(tokens).__name__}, allowed is text or token ids")
        ids = []
        for index, token in enumerate(tokens):
            number = _whole(token)
            if number is None or not 0 <= number < self.vocab_size:
                raise InvalidArgumentError(
                    f"token ids: found {token!r:.60} at {index}, allowed are 0 to {self.vocab_size - 1}"
                )
            ids.append(number)
        if not ids:
            raise InvalidArgumentError("token ids: found none, at least one is needed")
        return ids


def _whole(value: object) -> int | None:
    """`value` as an int; None for what is no whole number, such as a row of a 2-D array."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def memory_needs(bundle: Bundle) -> dict[str, int]:
    """What `bundle` needs with the default knobs: minimum_bytes, the smallest budget that works; resident_bytes, the one
    from which on every expert stays in memory; context (tokens)."""
    from edgert.footprint import sizes_of_bundle

    tokenizer = tokenizer_of(bundle)
    return sizes_of_bundle(bundle, 0 if tokenizer is None else tokenizer.memory_bytes).needs()


def _finished(stream: Stream) -> Generation:
    for _ in stream:
        pass
    return stream.result


def tokenizer_of(bundle: Bundle) -> Tokenizer | None:
    """Raises the errors of Tokenizer, naming the bundle."""
    content = bundle.asset("tokenizer.json")
    if content is None:
        return None
    try:
        return Tokenizer(
            content, bundle.json_asset("tokenizer_config.json"), bundle.text_asset("chat_template.jinja")
        )
    except EdgertError as error:
        raise type(error)(f"{bundle.path}: {error}") from None


def _eos_tokens(
    generation_config: Mapping[str, Any], tokenizer: Tokenizer | None, where: str
) -> frozenset[int]:
    stated = generation_config.get("eos_token_id")
    if stated is None and tokenizer is not None:
        stated = tokenizer.eos_token_id
    tokens = [] if stated is None else stated if isinstance(stated, list) else [stated]
    if not all(isinstance(token, int) for token in tokens):
        raise CorruptError(f"{where}: eos_token_id: found {stated!r}, allowed are token ids")
    return frozenset(tokens)
