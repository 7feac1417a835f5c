"""An Engine: many requests at once, each answered as if it were alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgert.engine import Engine, Job
from edgert.errors import InvalidArgumentError, QueueFullError
from edgert.generation import Piece
from edgert.model import Model, load
from edgert.sampling import Sampling


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[Model]:
    with load(tiny_bundle, memory="64MiB", context=256, parallel=4, threads=2) as model:
        yield model


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    engine = Engine(model)
    yield engine
    engine.close()


class Asked:
    """A request, and what came of it."""

    def __init__(
        self, engine: Engine, tokens: list[int], *, sampling: dict[str, Any] | None = None, **others: Any
    ) -> None:
        self.pieces: queue.Queue[Piece] = queue.Queue()
        options = Sampling(**{"max_tokens": 8, "ignore_eos": True, **(sampling or {})})
        self.job: Job = engine.submit(tokens, options, self.pieces.put, **others)

    def wait(self) -> list[Piece]:
        assert self.job.done.wait(60)
        return list(self.pieces.queue)

    def tokens(self) -> list[int]:
        return [piece.token for piece in self.wait() if piece.token is not None]

    def reason(self) -> str | None:
        return self.wait()[-1].finish_reason


def prompts(count: int) -> list[list[int]]:
    return [[(7 * i + 3 * j) % 60 + 2 for j in range(3 + 5 * i % 40)] for i in range(count)]


def test_a_reply_is_the_models_own(model: Model, engine: Engine) -> None:
    (prompt,) = prompts(1)
    assert Asked(engine, prompt).tokens() == model.generate(prompt, max_tokens=8, ignore_eos=True).tokens


def test_replies_among_others_are_those_alone(model: Model, engine: Engine) -> None:
    alone = [
        model.generate(p, max_tokens=8, ignore_eos=True, seed=i, temperature=0.8)
        for i, p in enumerate(prompts(12))
    ]
    asked = [Asked(engine, p, sampling={"seed": i, "temperature": 0.8}) for i, p in enumerate(prompts(12))]
    assert [a.tokens() for a in asked] == [a.tokens for a in alone]
    assert {a.reason() for a in asked} == {"length"}


def test_a_cancelled_request_ends_within_a_token(engine: Engine) -> None:
    begun, go_on = threading.Event(), threading.Event()
    pieces: list[Piece] = []

    def deliver(piece: Piece) -> None:
        pieces.append(piece)
        begun.set()
        go_on.wait(10)

    job = engine.submit([5, 6, 7], Sampling(max_tokens=200, ignore_eos=True), deliver)
    assert begun.wait(10)
    job.cancel()
    go_on.set()
    assert job.done.wait(10)
    assert pieces[-1].finish_reason == "cancelled"
    assert len(pieces) <= 3


def test_what_can_never_run_is_refused_at_once(model: Model, engine: Engine) -> None:
    with pytest.raises(InvalidArgumentError, match="the context holds 256"):
        Asked(engine, [5] * 256)
    with pytest.raises(InvalidArgumentError, match="token ids"):
        Asked(engine, [])
    with pytest.raises(InvalidArgumentError, match="token ids"):
        Asked(engine, [model.vocab_size])


def test_a_full_queue_is_said_and_a_drained_engine_takes_no_more(model: Model) -> None:
    engine = Engine(model, queue=2)
    go_on = threading.Event()

    def deliver(piece: Piece) -> None:
        go_on.wait(10)

    jobs: list[Job] = []

    def ask() -> None:
        while len(jobs) < 64:
            jobs.append(engine.submit([5, 6], Sampling(max_tokens=200, ignore_eos=True), deliver))

    try:
        with pytest.raises(QueueFullError, match="2 requests wait"):
            ask()
        assert len(jobs) >= 2
        go_on.set()
        assert engine.drain(30)
        assert all(job.done.is_set() for job in jobs)
        with pytest.raises(QueueFullError):
            Asked(engine, [5])
    finally:
        go_on.set()
        engine.close()


def test_closing_cancels(model: Model) -> None:
    engine = Engine(model)
    asked = [Asked(engine, [5, 6], sampling={"max_tokens": 200}) for _ in range(3)]
    engine.close()
    assert all(a.reason() in ("cancelled", "length") for a in asked)
    with pytest.raises(InvalidArgumentError, match="closed"):
        Asked(engine, [5])


def test_a_request_tells_how_it_went(engine: Engine) -> None:
    asked = Asked(engine, [5, 6, 7])
    asked.wait()
    told = asked.job.statistics()
    assert told["prompt_tokens"] == 3
    assert told["generated_tokens"] == 8
    assert 0 <= told["queue_s"] <= told["time_to_first_token_s"] <= told["duration_s"]
