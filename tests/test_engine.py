"""An Engine: many requests at once, each answered as if it were alone."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import MIB, minimum_bytes
from peft_directories import lora

from edgert.engine import Engine, Job
from edgert.errors import InvalidArgumentError, NotFoundError, QueueFullError, UnsupportedError
from edgert.generation import Piece
from edgert.loading import load
from edgert.model import Model
from edgert.sampling import Sampling
from edgert.turns import Turns


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


# --- with adapters, forms and failures ----------------------------------------------------------------


def test_adapters_mixed_in_a_batch(tiny_bundle: Path, tmp_path: Path) -> None:
    """Each with its own, some with several, some paged: each as alone."""
    choices: list[Any] = [None, "one", "two", {"one": 0.5, "two": 2.0}, [], "one"]
    for memory in (64 * MIB, minimum_bytes(tiny_bundle, parallel=4, context=256) + 4 * MIB):
        with load(tiny_bundle, memory=memory, context=256, parallel=4, adapter_memory="1MiB") as model:
            for name, seed in (("one", 1), ("two", 2)):
                model.load_adapter(lora(seed).write(tmp_path / f"{name}-{memory}"), name)
            alone = [
                model.generate(p, adapter=choice, max_tokens=8, ignore_eos=True).tokens
                for p, choice in zip(prompts(6), choices, strict=True)
            ]
            model.native.forget_prefixes()
            engine = Engine(model)
            asked = [Asked(engine, p, adapter=c) for p, c in zip(prompts(6), choices, strict=True)]
            assert [a.tokens() for a in asked] == alone
            with pytest.raises(NotFoundError, match="three"):
                Asked(engine, [5], adapter="three")
            engine.close()


class OneOf:
    """A form: these tokens one after the other, then the end."""

    def __init__(self, tokens: list[int], vocab_size: int) -> None:
        self.left = list(tokens)
        self.words = (vocab_size + 31) // 32

    def mask(self) -> bytes:
        return (1 << self.left[0]).to_bytes(4 * self.words, "little")

    def accept(self, token: int) -> bool:
        assert token == self.left.pop(0)
        return bool(self.left)


def test_a_form_holds_a_reply_and_no_other(model: Model, engine: Engine) -> None:
    free = model.generate(prompts(2)[1], max_tokens=8, ignore_eos=True).tokens
    held = Asked(engine, [5, 6], constraint=OneOf([9, 8, 7], model.vocab_size))
    other = Asked(engine, prompts(2)[1])
    assert held.tokens() == [9, 8, 7]
    assert held.reason() == "stop"
    assert other.tokens() == free
    assert held.job.constraint is None  # its memory is free again


class Broken(OneOf):
    def accept(self, token: int) -> bool:
        raise UnsupportedError("too much work")


def test_a_failing_request_ends_alone(model: Model, engine: Engine) -> None:
    free = model.generate(prompts(2)[1], max_tokens=8, ignore_eos=True).tokens

    def deliver(piece: Piece) -> None:
        raise RuntimeError("nobody listens")

    broken = Asked(engine, [5, 6], constraint=Broken([9, 8], model.vocab_size))
    deaf = engine.submit([5, 6, 7], Sampling(max_tokens=50, ignore_eos=True), deliver)
    nothing = Asked(engine, [4], sampling={"logit_bias": dict.fromkeys(range(model.vocab_size), -math.inf)})
    other = Asked(engine, prompts(2)[1])
    assert other.tokens() == free
    assert broken.reason() == "error"
    assert isinstance(broken.job.error, UnsupportedError)
    assert deaf.done.wait(10)
    assert isinstance(deaf.error, RuntimeError)
    assert nothing.reason() == "error"
    assert "no token can be sampled" in str(nothing.job.error)


def test_choices_of_one_prompt_run_it_once(engine: Engine) -> None:
    prompt = [(7 * i) % 60 + 2 for i in range(70)]
    asked = [Asked(engine, prompt, sampling={"temperature": 1.0}, stream=i) for i in range(4)]
    assert len({tuple(a.tokens()) for a in asked}) > 1
    assert sorted(a.job.statistics()["cached_tokens"] for a in asked) == [0, 64, 64, 64]


def test_text_stops_and_ends(tiny_bundle: Path) -> None:
    """Stop strings are cut from the text, and end the request."""
    with load(tiny_bundle, memory="64MiB", context=256, parallel=4) as model:
        whole = model.generate("ab", max_tokens=30, ignore_eos=True, temperature=1.0)
        stop = whole.text[8:10]
        expected = model.generate("ab", max_tokens=30, ignore_eos=True, temperature=1.0, stop=stop)
        assert expected.finish_reason == "stop"
        engine = Engine(model)
        sampling = {"max_tokens": 30, "temperature": 1.0, "stop": (stop,)}
        asked = Asked(engine, model.tokenizer.encode("ab"), sampling=sampling, primed=True)
        assert "".join(piece.text for piece in asked.wait()) == expected.text
        assert asked.reason() == "stop"
        engine.close()


def test_other_engines_take_turns(model: Model) -> None:
    """The runner of models that edgert's own engine does not run, here on one that it does."""
    engine = Engine(model)
    engine.close()
    engine._runner = Turns(model, 8)
    engine._closed = False
    alone = [model.generate(p, max_tokens=8, ignore_eos=True).tokens for p in prompts(3)]
    asked = [Asked(engine, p) for p in prompts(3)]
    assert [a.tokens() for a in asked] == alone
    assert engine.stats()["requests_waiting"] == 0
    engine.close()
