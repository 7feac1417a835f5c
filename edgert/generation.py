"""One generation: tokens drawn step by step, given out as pieces of text, with its statistics."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert.detokenizer import Detokenizer, StopStrings
from edgert.errors import CancelledError
from edgert.sampling import Sampling

if TYPE_CHECKING:
    from edgert.adapters import AdapterChoice
    from edgert.model import Model
    from edgert.session import Session
    from edgert.structured.constraint import Constraint

_LOOKUPS = ("expert_hits", "expert_prefetch_hits", "expert_misses")
_READS = ("bytes_read", "expert_bytes_read", "expert_bytes_prefetched")
_COUNTERS = (
    *_LOOKUPS,
    *_READS,
    "stall_s",
    "evictions",
    "experts_replaced",
    "experts_skipped",
    "experts_low_precision",
)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds: `text` may be empty while a character or a stop string is incomplete.

    The last piece has a `finish_reason`: "stop" (end of sequence, a stop string or a form that is complete), "length",
    "cancelled" or, of an Engine, "error"; its `token` is None where no token came with it. `logprob` and `top_logprobs`
    [(token, logprob), …] are of the distribution
    before temperature and penalties, None unless asked for.
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Generation:
    """A finished generation. `tokens` are all that were drawn, an end-of-sequence token included; `logprobs` holds one
    (logprob, [(token, logprob), …]) a token, None unless asked for. `statistics` is described in Stream.statistics."""

    text: str
    tokens: list[int]
    finish_reason: str | None
    statistics: dict[str, Any]
    logprobs: list[tuple[float, list[tuple[int, float]]]] | None = None


@dataclass
class _Clock:
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0


class Reply:
    """From drawn tokens to pieces of text: where stop strings cut it and when it is at its end.

    `detokenizer` has seen what the text goes on from; None: no text, tokens only. `limit` is the most tokens.
    """

    def __init__(
        self, sampling: Sampling, detokenizer: Detokenizer | None, limit: int, ends: frozenset[int]
    ) -> None:
        self.sampling = sampling
        self.limit = limit
        self.ends = ends
        self.count = 0
        self._detokenizer = detokenizer
        self._stops = StopStrings(sampling.stop)

    def take(self, sample: _native.Sample, *, last: bool = False) -> Piece:
        """What `sample` adds; it has a finish_reason where it is the last one, and where `last` says so."""
        self.count += 1
        text = self._stops.push(self._detokenizer.push(sample.token)) if self._detokenizer else ""
        reason = None
        if last or sample.token in self.ends or self._stops.found is not None:
            reason = "stop"
        elif self.count >= self.limit:
            reason = "length"
        if reason is not None:
            text += self.rest()
            if self._stops.found is not None:
                reason = "stop"
        if self.sampling.logprobs is None:
            return Piece(text, sample.token, finish_reason=reason)
        return Piece(text, sample.token, sample.logprob, sample.top, reason)

    def end(self, reason: str) -> Piece:
        """The last piece where it comes without a token."""
        return Piece(self.rest(), finish_reason=reason)

    def rest(self) -> str:
        """What was held back, at the end."""
        held = self._stops.push(self._detokenizer.finish()) if self._detokenizer else ""
        return held + self._stops.finish()


@dataclass
class _Drawn:
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    finish_reason: str | None = None


class Stream(Iterator[Piece]):
    """Iterator over the pieces of one generation; `result` sums up what came so far.

    cancel() may be called from any thread or signal handler: the stream then ends with finish_reason "cancelled".
    Iterate from one thread. close(), or the end, frees the sequence's memory.
    """

    def __init__(
        self,
        model: "Model",
        prompt: Sequence[int],
        reply: Reply,
        adapter: "AdapterChoice" = None,
        constraint: "Constraint | None" = None,
        session: "Session | None" = None,
    ) -> None:
        self._constraint = constraint
        self._model = model
        self._session = session
        self._adapter = adapter
        self._prompt = list(prompt)
        self._reply = reply
        self._clock = _Clock()
        self._drawn = _Drawn()
        self._before = model.counters_to_start_from()
        self._after: dict[str, Any] | None = None
        self._cached = 0
        self._cancelled = False
        self._pieces = self._run()

    def __next__(self) -> Piece:
        piece = next(self._pieces)
        self._drawn.texts.append(piece.text)
        self._drawn.finish_reason = piece.finish_reason
        return piece

    def cancel(self) -> None:
        self._cancelled = True
        self._model.interrupt(self)

    def close(self) -> None:
        self._pieces.close()

    @property
    def result(self) -> Generation:
        """What came so far; finish_reason is None while the stream goes on."""
        drawn = self._drawn
        wanted = self._reply.sampling.logprobs is not None
        return Generation(
            "".join(drawn.texts),
            list(drawn.tokens),
            drawn.finish_reason,
            self.statistics(),
            list(drawn.logprobs) if wanted else None,
        )

    def statistics(self) -> dict[str, Any]:
        """Counts, seconds and bytes of this generation; cached_tokens are those of the prompt that were remembered and did
        not have to run. The expert counters are the model's while it ran, so they include what other streams of the model
        did meanwhile; a model's first generation counts the bytes that loading read as its own, so that bytes_read adds up to
        what storage was asked for. Another engine than edgert's own counts neither. budget_bytes and peak_bytes are of the
        whole Runtime."""
        after = self._after or self._model.stats()
        clock, generated = self._clock, len(self._drawn.tokens)
        counted = {name: after[name] - self._before[name] for name in _COUNTERS if name in after}
        if all(name in counted for name in _LOOKUPS):
            looked_up = sum(counted[name] for name in _LOOKUPS)
            counted["hit_rate"] = counted["expert_hits"] / looked_up if looked_up else 1.0
        return {
            "prompt_tokens": len(self._prompt),
            "cached_tokens": self._cached,
            "generated_tokens": generated,
            "prefill_tokens_per_s": (len(self._prompt) - self._cached) / clock.prefill_s
            if clock.prefill_s
            else 0.0,
            "decode_tokens_per_s": clock.decode_steps / clock.decode_s if clock.decode_s else 0.0,
            "prefill_s": clock.prefill_s,
            "decode_s": clock.decode_s,
            "budget_bytes": after["budget_bytes"],
            "peak_bytes": after["peak_bytes"],
            **counted,
            "resident": after["resident"],
            "threads": after["threads"],
            "context": after["context"],
        }

    def _run(self) -> Generator[Piece, None, None]:
        if self._session is not None:
            self._session.go_to(self._prompt)
            sequence = self._session.sequence
        else:
            sequence = self._model.sequence(self._adapter, self._prompt)
            soft = getattr(sequence, "soft_tokens", 0)  # edgert's own engine alone has any
            self._reply.limit = min(self._reply.limit, self._model.context - len(self._prompt) - soft)
        self._cached = sequence.length
        try:
            yield from self._draw(sequence)
        finally:
            if self._session is not None:
                self._session.tokens += self._drawn.tokens
            else:
                sequence.close()
            if not self._model.closed:
                self._after = self._model.stats()

    def _draw(self, sequence: Any) -> Iterator[Piece]:
        sampler = _native.Sampler(self._reply.sampling.native())
        sampler.accept(self._prompt)
        tokens = self._prompt[self._cached :]
        while True:
            if self._constraint is not None:
                sampler.allow(self._constraint.mask())
            sample = self._step(sequence, tokens, sampler)
            if sample is None:
                yield self._reply.end("cancelled")
                return
            complete = self._constraint is not None and not self._constraint.accept(sample.token)
            piece = self._reply.take(sample, last=complete)
            if piece.logprob is not None and piece.top_logprobs is not None:
                self._drawn.logprobs.append((piece.logprob, piece.top_logprobs))
            yield piece
            if piece.finish_reason is not None:
                return
            tokens = [sample.token]

    def _step(self, sequence: Any, tokens: list[int], sampler: _native.Sampler) -> _native.Sample | None:
        """Run `tokens` and draw the next; None when cancelled."""
        clock, first = self._clock, not self._drawn.tokens
        start = time.perf_counter()
        try:
            sample = self._uncancelled(sequence, tokens, sampler)
        finally:
            elapsed = time.perf_counter() - start
            if first:
                clock.prefill_s += elapsed
            else:
                clock.decode_s += elapsed
        if sample is not None:
            clock.decode_steps += not first
            self._drawn.tokens.append(sample.token)
        return sample

    def _uncancelled(
        self, sequence: Any, tokens: list[int], sampler: _native.Sampler
    ) -> _native.Sample | None:
        while not self._cancelled:
            try:
                return self._model.step(self, sequence, tokens, sampler)
            except CancelledError:  # meant for this stream, or came too late for the one before: then again
                continue
        return None
