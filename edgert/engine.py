"""Many requests at once on one loaded model.

An Engine has a thread of its own: submit() returns at once, and the pieces of the reply are handed to the request's
`deliver` one by one. What a request gets is what it would get alone, bit for bit.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from edgert import _native
from edgert.backends.native import NativeModel
from edgert.errors import InvalidArgumentError, QueueFullError
from edgert.generation import Piece, Reply
from edgert.sampling import Sampling

if TYPE_CHECKING:
    from edgert.adapters import AdapterChoice
    from edgert.model import Model
    from edgert.structured import Constraint

Deliver = Callable[[Piece], None]


def _nothing() -> None:
    pass


class Job:
    """A request under way. `done` is set after the last piece was delivered; `error` says why it ended with "error"."""

    def __init__(
        self,
        tokens: list[int],
        reply: Reply,
        deliver: Deliver,
        adapter: "AdapterChoice",
        stream: int,
        constraint: "Constraint | None",
    ) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.tokens = tokens
        self.reply = reply
        self.adapter = adapter
        self.constraint = constraint
        self.sampler = _native.Sampler(reply.sampling.native(), stream=stream)
        self.sampler.accept(tokens)
        if constraint is not None:
            self.sampler.allow(constraint.mask())
        self.cancelled = False
        self.on_cancel: Callable[[], None] = _nothing
        self.on_ready: Callable[[], None] = _nothing  # the sampler knows which tokens may come next
        self.on_done: Callable[[], None] = _nothing
        self.cached_tokens = 0
        self.queue_s: float | None = None
        self._deliver = deliver
        self._submitted = time.perf_counter()
        self._first: float | None = None
        self._ended: float | None = None

    def cancel(self) -> None:
        """End it with finish_reason "cancelled", within a token. From any thread; may be repeated."""
        self.cancelled = True
        self.on_cancel()

    def statistics(self) -> dict[str, Any]:
        """prompt_tokens, cached_tokens (of them, those that were remembered and did not have to run), generated_tokens;
        seconds: queue_s (until it began to run), time_to_first_token_s (None before it), duration_s."""
        elapsed = (self._ended or time.perf_counter()) - self._submitted
        return {
            "prompt_tokens": len(self.tokens),
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.reply.count,
            "queue_s": elapsed if self.queue_s is None else self.queue_s,
            "time_to_first_token_s": None if self._first is None else self._first - self._submitted,
            "duration_s": elapsed,
        }

    # --- for what runs it ---------------------------------------------------------------------------

    def begin(self) -> None:
        self.queue_s = time.perf_counter() - self._submitted

    def take(self, sample: _native.Sample) -> bool:
        """Hand out what a drawn token adds; True where another is to follow."""
        if self.done.is_set():
            return False
        if self.cancelled:
            self.end("cancelled")
            return False
        try:
            complete = self.constraint is not None and not self.constraint.accept(sample.token)
            piece = self.reply.take(sample, last=complete)
            if piece.finish_reason is None and self.constraint is not None:
                self.sampler.allow(self.constraint.mask())
                self.on_ready()
        except Exception as error:  # noqa: BLE001 - whatever the form met, it is this request's
            self.fail(error)
            return False
        self._push(piece)
        return not self.done.is_set()

    def end(self, reason: str) -> None:
        if not self.done.is_set():
            self._push(self.reply.end(reason))

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.end("error")

    def _push(self, piece: Piece) -> None:
        now = time.perf_counter()
        if self._first is None and piece.token is not None:
            self._first = now
        last = piece.finish_reason is not None
        try:
            self._deliver(piece)
        except Exception as error:  # noqa: BLE001 - nobody takes what comes
            self.error, last = error, True
        if last:
            self._ended = now
            self.constraint = None  # large, and looked for by nobody before cycles are
            self.done.set()
            self.on_done()
            self.on_cancel = self.on_ready = self.on_done = _nothing


class Runner(Protocol):
    """What answers the jobs of an Engine."""

    def add(self, job: Job) -> bool:
        """Begin with it, later or now; False where too many wait."""

    def stats(self) -> dict[str, int]:
        """At least requests_running and requests_waiting."""

    def close(self) -> None:
        """Cancel what is left."""


class Engine:
    """Runs the requests of one model. Thread-safe. close() it before the model.

    `queue` is how many requests may wait besides those that run.
    """

    def __init__(self, model: "Model", *, queue: int = 64) -> None:
        self._model = model
        self._queue = queue
        self._changed = threading.Condition()
        self._jobs: set[Job] = set()
        self._draining = False
        self._closed = False
        self._runner: Runner
        if isinstance(model, NativeModel):
            from edgert.batches import Batches

            self._runner = Batches(model, queue)
        else:
            from edgert.turns import Turns

            self._runner = Turns(model, queue)

    def submit(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        deliver: Deliver,
        *,
        adapter: "AdapterChoice" = None,
        constraint: "Constraint | None" = None,
        primed: bool = False,
        stream: int = 0,
    ) -> Job:
        """Begin to answer the prompt `tokens`.

        `deliver` gets a Piece a token, on the engine's thread: it must neither block nor raise. The last one has a
        finish_reason: "stop", "length", "cancelled" or "error" (see Job.error). `primed`: the reply's text goes on from the
        prompt's (a completion; not so a chat's answer). `stream` tells the n choices of one request apart: their draws
        differ, and the prompt is run once. `constraint` holds the reply to a form, and belongs to this request.

        Raises QueueFullError where too many wait or the engine drains, InvalidArgumentError for what can never run,
        NotFoundError for an adapter that is not loaded.
        """
        texts = self._model.prompts(adapter)
        checked = texts.checked(tokens)
        reply = texts.reply(checked, sampling, primed=primed or constraint is not None)
        job = Job(checked, reply, deliver, adapter, stream, constraint)
        job.on_done = lambda: self._remove(job)
        with self._changed:
            if self._closed:
                raise InvalidArgumentError(f"the engine of {self._model.name} is closed")
            if self._draining:
                raise QueueFullError(f"{self._model.name}: takes no more requests; it is about to end")
            self._jobs.add(job)
        added = False
        try:
            added = self._runner.add(job)
        finally:
            if not added:
                self._remove(job)
        if not added:
            raise QueueFullError(
                f"{self._model.name}: {self._queue} requests wait already, which is as many as may; try again later"
            )
        return job

    def stats(self) -> dict[str, int]:
        """requests_running and requests_waiting; of edgert's own engine also, since it began, prompt_tokens,
        prefix_cache_hit_tokens (of them, those that were remembered), requests_preempted, steps."""
        return self._runner.stats()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests and wait for those that are there; False where some are left after `timeout_s`."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._jobs, timeout_s)

    def close(self) -> None:
        """Cancel what is left and end the thread. May be repeated; not from a `deliver`."""
        with self._changed:
            self._closed = True
        self._runner.close()

    def _remove(self, job: Job) -> None:
        with self._changed:
            self._jobs.discard(job)
            self._changed.notify_all()
