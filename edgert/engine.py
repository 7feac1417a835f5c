"""Many requests at once on one loaded model.

An Engine has a thread of its own: submit() returns at once, and the pieces of the reply are handed to the request's
`deliver` one by one. What a request gets is what it would get alone, bit for bit.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert.errors import CancelledError, EdgertError, InvalidArgumentError, QueueFullError
from edgert.generation import Piece, Reply
from edgert.sampling import Sampling

if TYPE_CHECKING:
    from edgert.adapters import AdapterChoice
    from edgert.model import Model
    from edgert.structured import Constraint

Deliver = Callable[[Piece], None]


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
        self.deliver = deliver
        self.adapter = adapter
        self.constraint = constraint
        self.sampler = _native.Sampler(reply.sampling.native(), stream=stream)
        self.sampler.accept(tokens)
        self.cancelled = False
        self.cached_tokens = 0
        self._submitted = time.perf_counter()
        self._started: float | None = None
        self._first: float | None = None
        self._ended: float | None = None

    def cancel(self) -> None:
        """End it with finish_reason "cancelled", within a token. From any thread; may be repeated."""
        self.cancelled = True

    def start(self) -> None:
        self._started = time.perf_counter()

    def push(self, piece: Piece) -> None:
        """Hand a piece out; the one with a finish_reason is the last."""
        now = time.perf_counter()
        if self._first is None and piece.token is not None:
            self._first = now
        if piece.finish_reason is not None:
            self._ended = now
        try:
            self.deliver(piece)
        finally:
            if piece.finish_reason is not None:
                self.done.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.push(self.reply.end("error"))

    def statistics(self) -> dict[str, Any]:
        """prompt_tokens, cached_tokens (of them, those found in the prefix cache), generated_tokens; seconds: queue_s (until
        it began to run), time_to_first_token_s (None before it), duration_s."""
        now = self._ended or time.perf_counter()
        return {
            "prompt_tokens": len(self.tokens),
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.reply.count,
            "queue_s": (self._started or now) - self._submitted,
            "time_to_first_token_s": None if self._first is None else self._first - self._submitted,
            "duration_s": now - self._submitted,
        }


class Engine:
    """Runs the requests of one model. Thread-safe. close() before the model's own.

    `queue` is how many requests may wait besides those that run.
    """

    def __init__(self, model: "Model", *, queue: int = 64) -> None:
        self._model = model
        self._queue = queue
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._draining = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="edgert-engine", daemon=True)
        self._thread.start()

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
        differ, and the prompt is run once.

        Raises QueueFullError where too many wait or the engine drains, InvalidArgumentError for what can never run,
        NotFoundError for an adapter that is not loaded.
        """
        checked = self._model.checked(tokens)
        self._model.check_adapter(adapter)
        reply = self._model.reply(checked, sampling, primed=primed)
        job = Job(checked, reply, deliver, adapter, stream, constraint)
        with self._changed:
            if self._closed:
                raise InvalidArgumentError(f"the engine of {self._model.name} is closed")
            if self._draining or len(self._waiting) >= self._queue:
                raise QueueFullError(
                    f"{self._model.name}: {len(self._waiting)} requests wait, allowed are {self._queue}; try again later"
                )
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def stats(self) -> dict[str, int]:
        """requests_running, requests_waiting, prefix_cache_hit_tokens, prefix_cache_tokens."""
        with self._changed:
            return {
                "requests_running": self._running is not None,
                "requests_waiting": len(self._waiting),
                "prefix_cache_hit_tokens": 0,
                "prefix_cache_tokens": 0,
            }

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests and wait for those that are there; False where some are left after `timeout_s`."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._waiting and self._running is None, timeout_s)

    def close(self) -> None:
        """Cancel what is left and end the thread. May be repeated."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.cancel()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --- the thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            try:
                self._answer(job)
            except (EdgertError, MemoryError) as error:
                job.fail(error)

    def _answer(self, job: Job) -> None:
        job.start()
        if job.cancelled:
            job.push(job.reply.end("cancelled"))
            return
        sequence = self._model.sequence(job.adapter)
        tokens = job.tokens
        try:
            while not job.cancelled:
                try:
                    sample = self._model.step(job, sequence, tokens, job.sampler)
                except CancelledError:  # meant for another's step
                    continue
                piece = job.reply.take(sample)
                job.push(piece)
                if piece.finish_reason is not None:
                    return
                tokens = [sample.token]
            job.push(job.reply.end("cancelled"))
        finally:
            sequence.close()
