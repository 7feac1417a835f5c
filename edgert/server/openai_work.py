"""A request at work: its sampling, its jobs on the engine, and their pieces on the event loop."""

import asyncio
import contextlib
import functools
import hashlib
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import edgert
from edgert.backends.native import NativeModel
from edgert.errors import ContextLengthError, QueueFullError, UnsupportedError
from edgert.generation import Piece
from edgert.sampling import Sampling
from edgert.server.errors import ApiError, unavailable
from edgert.server.models import LoadedModel
from edgert.server.openai_fields import refused
from edgert.server.state import summarise
from edgert.server.threads import on_thread

if TYPE_CHECKING:
    from edgert.adapters import AdapterChoice
    from edgert.engine import Job
    from edgert.model import Model
    from edgert.prompts import Prompts
    from edgert.server.metrics import Metrics
    from edgert.server.openai_messages import Conversation
    from edgert.structured import Constraint

_AT_ONCE = 8  # of one request's jobs; the others leave room for other requests
_FULL_S = 0.02  # until a taken request asks again for a place in a full queue
_CANCEL_S = 30.0  # a cancelled job ends within a token
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "logit_bias",
    "ignore_eos",
)


async def texts_of(loaded: LoadedModel, adapter: "AdapterChoice") -> "Prompts":
    """Tokenizer and vocabulary of a request: the model's own, or those of its adapters, which take a moment when they are first
    asked for."""
    return await on_thread(loaded.model.prompts, adapter) if loaded.adapters else loaded.model


def sampling_of(
    fields: Mapping[str, Any], model: "Model", texts: "Prompts", max_tokens: int | None, logprobs: int | None
) -> Sampling:
    """The client's values, then the bundle's own. Without a seed every request draws anew."""
    options = {name: fields[name] for name in _SAMPLING if name in fields}
    if options.get("top_k") == -1:
        options["top_k"] = 0
    seed = fields.get("seed")
    options["seed"] = secrets.randbits(64) if seed is None else seed % 2**64
    options |= {"max_tokens": max_tokens, "logprobs": logprobs}
    return Sampling.of(options, model.sampling_defaults, texts.vocab_size)


def adapter_of(fields: Mapping[str, Any], loaded: LoadedModel) -> "AdapterChoice":
    """From `lora`, as llama.cpp has it (ids count the loaded adapters, names do too), or the model's id NAME:ADAPTER."""
    if "lora" not in fields:
        return loaded.adapter
    if loaded.adapter is not None:
        raise refused(f"lora: the model {loaded.id!r} names an adapter already; say one of them", "lora")
    chosen = {}
    for index, one in enumerate(fields["lora"]):
        name = one["id"]
        if isinstance(name, int):
            if name >= len(loaded.adapters):
                raise refused(
                    f"lora[{index}].id: found {name}, there are {len(loaded.adapters)} adapters",
                    f"lora[{index}].id",
                )
            name = loaded.adapters[name]
        if name in chosen:
            raise refused(f"lora[{index}].id: the adapter {name!r:.80} comes twice", f"lora[{index}].id")
        chosen[name] = float(one["scale"])
    return chosen


def too_long(error: ContextLengthError, texts: "Prompts", param: str) -> ApiError:
    """In the words by which clients know it."""
    found = str(error).removeprefix("prompt: ")
    return refused(
        f"{param}: this model's maximum context length is {texts.context} tokens; {found}",
        param,
        "context_length_exceeded",
    )


def check_length(tokens: int, texts: "Prompts", param: str) -> None:
    if tokens >= texts.context:
        raise refused(
            f"{param}: this model's maximum context length is {texts.context} tokens, and the prompt has {tokens}; "
            "an answer needs at least one more. Shorten it.",
            param,
            "context_length_exceeded",
        )


@functools.lru_cache(maxsize=64)
def _fingerprint(*about: str) -> str:
    return "fp_" + hashlib.sha256("\0".join(about).encode()).hexdigest()[:12]


def fingerprint(model: "Model") -> str:
    """The same where the same request with the same seed gives the same answer: version, weights, lossy modes."""
    modes = ",".join(f"{name}={value}" for name, value in sorted(model.lossy_modes.items()))
    weights = f"{model.native.state_fingerprint:x}" if isinstance(model, NativeModel) else str(model.path)
    return _fingerprint(edgert.__version__, weights, modes)


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(16)}"


@dataclass(frozen=True)
class Work:
    """One choice to be made: `stream` tells the choices of one prompt apart."""

    tokens: Sequence[int]
    sampling: Sampling
    stream: int = 0
    primed: bool = False
    constraint: "Callable[[], Constraint | None] | None" = None


@dataclass
class Usage:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def chat(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


class Jobs:
    """The jobs of one request. batches() gives their pieces as they come; leaving the context cancels what still runs.

    The queue takes the request whole or not at all: once one of its jobs is in, the others get their turns, however full it is.

    The engine's thread appends to a queue and wakes the loop once, however many pieces wait.
    """

    def __init__(
        self, loaded: LoadedModel, adapter: "AdapterChoice", works: Sequence[Work], metrics: "Metrics"
    ) -> None:
        if loaded.engine is None:
            raise UnsupportedError(f"model {loaded.name}: generates no text; see /v1/embeddings")
        self._engine = loaded.engine
        self._model = loaded.model.name
        self._adapter = adapter
        self._reads = bool(loaded.adapters)  # submit() may read one, and wait for a step
        self._waiting = deque(enumerate(works))
        self._works = works
        self._jobs: dict[int, Job] = {}  # those that run
        self._taken = False  # the request, by the queue
        self._loop = asyncio.get_running_loop()
        self._pieces: deque[tuple[int, Piece]] = deque()
        self._woken = asyncio.Event()
        self._waking = False
        self._metrics = metrics
        self._since = time.perf_counter()
        self._last: dict[int, float] = {}
        self.usage = Usage()

    async def __aenter__(self) -> "Jobs":
        """Raises what Engine.submit raises."""
        await self._submit()
        return self

    async def __aexit__(self, *error: object) -> None:
        jobs = list(self._jobs.items())
        for _, job in jobs:
            job.cancel()
        for index, job in jobs:
            if not job.done.is_set():  # what it uses may be unloaded once this returns
                await on_thread(job.done.wait, _CANCEL_S)
            self._settle(index, "cancelled")

    async def batches(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """(index of the work, piece) as they come. Raises the error of a job that failed, and ApiError 503 where the
        server cancelled one."""
        while self._jobs or self._waiting:
            await self._woken.wait()
            self._woken.clear()
            self._waking = False
            batch: list[tuple[int, Piece]] = []
            failed = None
            while self._pieces and failed is None:
                index, piece = self._pieces.popleft()
                failed = self._count(index, piece)
                if failed is None:
                    batch.append((index, piece))
            if batch:
                yield batch
            if failed is not None:
                raise failed
            await self._submit()

    async def _submit(self) -> None:
        while self._waiting and len(self._jobs) < _AT_ONCE:
            index, work = self._waiting[0]
            constraint = None
            if work.constraint is not None:
                constraint = await on_thread(work.constraint)
            try:
                self._jobs[index] = await self._begin(index, work, constraint)
            except QueueFullError:
                if self._jobs:
                    return  # again when one of ours has ended
                if not self._taken:
                    raise
                await asyncio.sleep(_FULL_S)  # others' requests have come between
                continue
            self._taken = True
            self._waiting.popleft()

    async def _begin(self, index: int, work: Work, constraint: "Constraint | None") -> "Job":
        submit = functools.partial(
            self._engine.submit,
            work.tokens,
            work.sampling,
            functools.partial(self._deliver, index),
            adapter=self._adapter,
            constraint=constraint,
            primed=work.primed,
            stream=work.stream,
        )
        if not self._reads:
            return submit()
        begun = asyncio.ensure_future(on_thread(submit))
        try:
            return await asyncio.shield(begun)
        except asyncio.CancelledError:  # the client has left meanwhile
            begun.add_done_callback(_cancel)
            raise

    def _deliver(self, index: int, piece: Piece) -> None:
        """On the engine's thread."""
        self._pieces.append((index, piece))
        if not self._waking:
            self._waking = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._woken.set)

    def _count(self, index: int, piece: Piece) -> BaseException | None:
        """Measure one piece; the error that it ends with."""
        now = time.perf_counter()
        before = self._last.get(index)
        if before is None:
            self._metrics.first_token_seconds.observe(now - self._since)
        else:
            self._metrics.inter_token_seconds.observe(now - before)
        self._last[index] = now
        reason = piece.finish_reason
        if reason is None:
            return None
        job = self._settle(index, reason)
        if reason == "error":
            return job.error or ApiError(500, "the engine failed", kind="server_error", code="internal")
        return (
            unavailable("the server has cancelled this request", "cancelled")
            if reason == "cancelled"
            else None
        )

    def _settle(self, index: int, reason: str) -> "Job":
        job = self._jobs.pop(index)
        known = job.statistics()
        self.usage.completion_tokens += known["generated_tokens"]
        if self._works[index].stream == 0:  # the choices of a prompt share it
            self.usage.prompt_tokens += known["prompt_tokens"]
            self.usage.cached_tokens += known["cached_tokens"]
        metrics = self._metrics
        metrics.prompt_tokens.add(known["prompt_tokens"], self._model)
        metrics.cached_tokens.add(known["cached_tokens"], self._model)
        metrics.generated_tokens.add(known["generated_tokens"], self._model)
        metrics.finished.add(1, self._model, reason)
        summarise(prompt_tokens=known["prompt_tokens"], generated_tokens=known["generated_tokens"])
        return job


def _cancel(begun: "asyncio.Future[Job]") -> None:
    if not begun.cancelled() and begun.exception() is None:
        begun.result().cancel()


def constraint_maker(
    texts: "Prompts", fields: Mapping[str, Any], conversation: "Conversation | None" = None, prompt: str = ""
) -> "Callable[[], Constraint | None] | None":
    """What makes the form that a request asks for, anew for each choice; None where it asks for none."""
    form = fields.get("response_format")
    if form is not None and form["type"] == "text":
        form = None
    tools = None if conversation is None else conversation.tools
    if form is None and tools is None and "grammar" not in fields:
        return None
    from edgert.structured import constraint_of

    return functools.partial(
        constraint_of,
        texts,
        response_format=form,
        tools=tools,
        tool_choice=None if conversation is None else conversation.tool_choice,
        parallel_tool_calls=fields.get("parallel_tool_calls", True),
        grammar=fields.get("grammar"),
        prompt=prompt,
        reasoning="none" if conversation is None else "auto",
    )
