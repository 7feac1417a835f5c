"""A loaded model, and what is done with it; edgert.loading makes one."""

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, overload

from edgert import _native
from edgert.adapter_methods import Adapters
from edgert.adapters import AdapterChoice
from edgert.errors import CorruptError, InvalidArgumentError, UnsupportedError
from edgert.generation import Generation, Stream
from edgert.prompts import Prompt, Prompts
from edgert.sampling import Sampling, defaults_from
from edgert.session import Session
from edgert.settings import knobs
from edgert.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from edgert.structured.constraint import Constraint

Messages = str | Sequence[Mapping[str, Any]]
Grammar = str | Mapping[str, Any]


class Model(Prompts, Adapters, ABC):
    """A loaded model; made by load(), which picks the engine: edgert's own, llama.cpp or ONNX Runtime (edgert.backends).
    A context manager: leaving it frees the memory.

    Attributes: name; context (tokens a sequence can hold); vocab_size; resident (every expert fits);
    minimum_bytes (the smallest budget that works); eos_token_ids. Methods may be called from several threads: steps
    take turns.
    """

    backend: ClassVar[str]
    splits_experts = False  # whether experts are stored as base and refinement, as low_precision_misses needs

    def __init__(
        self,
        name: str,
        path: Path,
        tokenizer: Tokenizer | None,
        generation_config: Mapping[str, Any],
        *,
        context: int,
        vocab_size: int,
        resident: bool = True,
        minimum_bytes: int = 0,
    ) -> None:
        self.name = name
        self.path = path
        self.context = context
        self.vocab_size = vocab_size
        self.resident = resident
        self.minimum_bytes = minimum_bytes
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._load_counted = False  # whether a generation has counted what loading read
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        where = str(path / "generation_config.json")
        self.sampling_defaults = defaults_from(generation_config, where)
        self.eos_token_ids = _eos_tokens(generation_config, tokenizer, where)

    # --- generation ---------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: AdapterChoice = None,
        response_format: Mapping[str, Any] | None = None,
        grammar: Grammar | None = None,
        session: Session | None = None,
        **sampling: Any,
    ) -> Generation:
        """Continue `prompt` (text or token ids) and return the whole continuation.

        `adapter`: a name, several, or {name: scale}, in place of those that set_adapter() has turned on; [] for none.
        `session`: what of the prompt is in it does not run again, and it holds prompt and reply afterwards; `adapter` is then the
        session's own.
        `sampling`: max_tokens (default: what the context leaves), temperature, top_k, top_p, min_p, repetition_penalty,
        presence_penalty, frequency_penalty, seed (default 0, so runs repeat), stop (a string or a list), logit_bias
        {token: number}, logprobs (number of alternatives), ignore_eos. What is not given comes from the bundle's
        generation_config.json; without one decoding is greedy.

        `response_format` ({"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}) or `grammar`
        (Lark's text, or {"type": "lark" | "regex" | "choice" | "json_schema", "value": ...}) hold the text to a form, which
        it has when finish_reason is "stop" (docs/structured.md; extra serve).

        Raises InvalidArgumentError for an option outside its range, an empty prompt where the model has no
        beginning-of-sequence token, a prompt that leaves no room in the context, and a malformed schema or grammar;
        UnsupportedError for one that is too much work.
        """
        stream = self.stream(
            prompt,
            adapter=adapter,
            response_format=response_format,
            grammar=grammar,
            session=session,
            **sampling,
        )
        return _finished(stream)

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: AdapterChoice = None,
        response_format: Mapping[str, Any] | None = None,
        grammar: Grammar | None = None,
        session: Session | None = None,
        **sampling: Any,
    ) -> Stream:
        """Like generate(), but returns an iterator over Piece, one a token; its `result` sums up."""
        prompts = self._prompts_of(adapter, session)
        form = self._form(prompts, response_format, grammar, reasoning="none")
        tokens = prompts.prompt_tokens(prompt)
        return self._start(prompts, tokens, sampling, adapter, form, primed=True, session=session)

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        template: Mapping[str, Any] | None = None,
        adapter: AdapterChoice = None,
        response_format: Mapping[str, Any] | None = None,
        grammar: Grammar | None = None,
        session: Session | None = None,
        **sampling: Any,
    ) -> Generation: ...
    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[True],
        template: Mapping[str, Any] | None = None,
        adapter: AdapterChoice = None,
        response_format: Mapping[str, Any] | None = None,
        grammar: Grammar | None = None,
        session: Session | None = None,
        **sampling: Any,
    ) -> Stream: ...
    def chat(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        template: Mapping[str, Any] | None = None,
        adapter: AdapterChoice = None,
        response_format: Mapping[str, Any] | None = None,
        grammar: Grammar | None = None,
        session: Session | None = None,
        **sampling: Any,
    ) -> Generation | Stream:
        """Answer a conversation: [{"role": "user", "content": ...}, …], or a string for one user message.

        The chat template of the bundle, or of its adapters, makes the prompt; `template` holds variables for it (tools, enable_thinking, …).
        `response_format` and `grammar` are those of generate(); reasoning in front of the answer stays free.
        Raises UnsupportedError where the bundle has no template.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        prompts = self._prompts_of(adapter, session)
        text = prompts.tokenizer.apply_chat_template(messages, **(template or {}))
        # The template writes the special tokens itself; an answer begins a text of its own.
        tokens = prompts.encoded(text, add_special_tokens=False)
        form = self._form(prompts, response_format, grammar, prompt=text)
        answer = self._start(prompts, tokens, sampling, adapter, form, primed=False, session=session)
        return answer if stream else _finished(answer)

    def cancel(self) -> None:
        """End every running generation of this model, each with finish_reason "cancelled". From any thread."""
        for stream in list(self._streams):
            stream.cancel()

    # --- sessions -----------------------------------------------------------------------------------

    def session(self, *, adapter: AdapterChoice = None) -> Session:
        """An empty one, for the `session` of stream(), generate() and chat(). Its close() frees its memory.

        Raises UnsupportedError where another engine than edgert's own runs the model.
        """
        raise self._unable("it keeps no sessions")

    def save_session(self, session: Session, path: str | os.PathLike[str]) -> None:
        """Write a session to a file, which replaces one that is there, whole or not at all. Raises StorageError."""
        raise self._unable("it keeps no sessions")

    def restore_session(self, path: str | os.PathLike[str], *, adapter: AdapterChoice = None) -> Session:
        """The session that save_session() wrote, with the same bundle, adapters and KV format.

        Raises NotFoundError, CorruptError for a damaged file, UnsupportedError for a newer format, InvalidArgumentError for a session
        of another model, other adapters or another KV format, BudgetError where it does not fit.
        """
        raise self._unable("it keeps no sessions")

    # --- the parts ----------------------------------------------------------------------------------

    @property
    def native(self) -> _native.Model:
        """The engine's own model, for work by steps. Raises InvalidArgumentError once closed, and UnsupportedError where
        another engine runs the model."""
        raise self._unable("this is of edgert's own engine")

    @property
    def lossy_modes(self) -> dict[str, float]:
        """The knobs that are giving up quality for speed, by name; empty where results are exact."""
        return {}

    def knobs(self) -> dict[str, Any]:
        """What the knobs that can change while the model runs stand at, by name; empty where the engine has none."""
        return {}

    def set_knob(self, name: str, value: Any) -> None:
        """Change a knob that knobs() lists, from any thread, while the model runs: memory and expert_memory in bytes, threads
        and io_threads up to what the model was loaded with, prefetch_depth, token_interval_ms, and the lossy modes. No
        result changes but by lossy modes.

        Raises InvalidArgumentError for another knob and outside its range, BudgetError for memory that is too little and
        for more than there is."""
        known = self.knobs()
        if not known:
            raise self._unable("its knobs cannot change while it runs")
        setting = next((row for row in knobs() if row.name == name and row.live), None)
        if setting is None:
            raise InvalidArgumentError(
                f"knob {name!r:.60} cannot change while a model runs; those that can are {', '.join(known)}"
            )
        self._set_knob(name, setting.check(value))

    @property
    @abstractmethod
    def closed(self) -> bool: ...

    def logits(
        self, token_ids: Sequence[int], *, adapter: AdapterChoice = None
    ) -> "numpy.typing.NDArray[numpy.float32]":
        """Run `token_ids` from an empty sequence; return float32 [len(token_ids), vocab_size], of adapters that bring
        tokens with a column more for each.

        Raises InvalidArgumentError for ids outside the vocabulary and for more of them than the context holds.
        """
        tokens = self.prompts(adapter).checked(token_ids)
        if len(tokens) > self.context:
            raise InvalidArgumentError(
                f"token_ids: found {len(tokens)} tokens, the context holds {self.context}"
            )
        return self._logits(tokens, adapter)

    def logits_by_parts(
        self, token_ids: Sequence[int], *, first: int = 0, adapter: AdapterChoice = None
    ) -> "Iterator[numpy.typing.NDArray[numpy.float32]]":
        """logits() of the positions from `first` on, in parts of a bounded size, whatever the vocabulary."""
        yield self.logits(token_ids, adapter=adapter)[first:]

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        batch_size: int = 32,
        prompt: str | None = None,
    ) -> "numpy.typing.NDArray[numpy.float32]":
        """Return the embeddings of `texts`: float32 [len(texts), dimensions].

        `dimensions`: keep the first so many (Matryoshka), then normalise again; `normalize`: to length 1, by default as
        the model states; `prompt` names one of the prompts that the model states, such as "query", to go in front,
        by default the one that the model states for that. What is longer than the model takes is cut. Raises UnsupportedError
        where the model embeds no text and InvalidArgumentError for more dimensions than it has.
        """
        raise self._unable("it embeds no text")

    def encode(self, **arrays: "numpy.typing.ArrayLike") -> "dict[str, numpy.typing.NDArray[Any]]":
        """Run an encoder on arrays by the names of its inputs; return its outputs by name.

        Raises UnsupportedError where the model is no encoder, InvalidArgumentError for an input that is missing,
        unknown or of another type or shape.
        """
        raise self._unable("it is no encoder")

    def prompts(self, adapter: AdapterChoice = None) -> Prompts:
        """What is done with prompts of sequences with `adapter`: tokenizer, vocab_size and eos_token_ids are the model's own
        but where adapters bring tokens, a chat template or ends.

        Raises NotFoundError for an adapter that is not loaded, InvalidArgumentError where they cannot run together, BudgetError where
        their tokenizer does not fit."""
        self.check_adapter(adapter)
        return self

    def _prompts_of(self, adapter: AdapterChoice, session: Session | None) -> Prompts:
        return self.prompts(adapter) if session is None or session.prompts is None else session.prompts

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
        used_bytes, peak_bytes, threads, io_backend, isa, context, resident, minimum_bytes. Another engine than edgert's
        own leaves out what it does not tell."""
        return self._stats()

    def close(self) -> None:
        """Cancel what runs and free the memory. May be repeated."""
        self.cancel()
        with self._lock:
            self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<edgert.Model {self.name}>"

    # --- what an engine does ------------------------------------------------------------------------

    @abstractmethod
    def sequence(self, adapter: AdapterChoice = None, prompt: Sequence[int] = ()) -> Any:
        """A new sequence: what step() continues. Its `length` is how many tokens of `prompt` it begins with, because they
        are remembered; never all of them. Its close() frees its memory."""

    @abstractmethod
    def step(
        self, stream: object, sequence: Any, tokens: list[int], sampler: _native.Sampler
    ) -> _native.Sample:
        """Run `tokens` of one stream and draw the next. Raises CancelledError when interrupt(stream) came."""

    @abstractmethod
    def interrupt(self, stream: object) -> None:
        """Stop the step in progress if it is `stream`'s. Takes no lock, so a signal handler may call it."""

    def _set_knob(self, name: str, value: Any) -> None:
        """Set a knob of knobs() to a value in its range."""
        raise NotImplementedError

    @abstractmethod
    def _logits(self, tokens: list[int], adapter: AdapterChoice) -> "numpy.typing.NDArray[numpy.float32]": ...

    @abstractmethod
    def _stats(self) -> dict[str, Any]: ...

    @abstractmethod
    def _free(self) -> None:
        """Let go of what the engine holds; the lock is held. May be repeated."""

    def _unable(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self.path}: {self.backend} runs this model: {why}")

    # --- from prompts to streams --------------------------------------------------------------------

    def _form(
        self,
        prompts: Prompts,
        response_format: Mapping[str, Any] | None,
        grammar: Grammar | None,
        prompt: str = "",
        reasoning: str = "auto",
    ) -> "Constraint | None":
        if response_format is None and grammar is None:
            return None
        from edgert.structured import constraint_of

        return constraint_of(
            prompts, response_format=response_format, grammar=grammar, prompt=prompt, reasoning=reasoning
        )

    def _start(
        self,
        prompts: Prompts,
        tokens: list[int],
        options: Mapping[str, Any],
        adapter: AdapterChoice,
        form: "Constraint | None",
        *,
        primed: bool,
        session: Session | None = None,
    ) -> Stream:
        sampling = Sampling.of(options, self.sampling_defaults, prompts.vocab_size)
        # A form tells every space.
        reply = prompts.reply(tokens, sampling, primed=primed or form is not None)
        stream = Stream(self, tokens, reply, adapter, form, session)
        self._streams.add(stream)
        return stream


def _finished(stream: Stream) -> Generation:
    for _ in stream:
        pass
    return stream.result


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
