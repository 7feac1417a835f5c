"""Knobs that change while a model runs: outputs stay the same, memory follows, what cannot be is refused."""

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import edgert
from edgert.errors import BudgetError, InvalidArgumentError
from edgert.settings import knobs

PROMPT = "A file system keeps"


@pytest.fixture
def model() -> Iterator[edgert.Model]:
    with edgert.load(memory="12MiB", threads=2, context=256, parallel=3) as loaded:
        yield loaded


def test_every_live_knob_has_a_position(model: edgert.Model) -> None:
    assert set(model.knobs()) == {row.name for row in knobs() if row.live}
    for name, value in model.knobs().items():
        model.set_knob(name, value)  # where it stands is in its range
    assert model.knobs()["memory"] == 12 << 20


def test_outputs_stay_the_same_while_knobs_change_at_random(model: edgert.Model) -> None:
    expected = model.generate(PROMPT, max_tokens=40).tokens
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: found.append(model.generate(PROMPT, max_tokens=40).tokens))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    draw, least = random.Random(3), model.native.least_expert_bytes
    most = model.native.plan()["slots_bytes"]
    changes: dict[str, Callable[[], float]] = {
        "expert_memory": lambda: draw.randint(least, most),
        "memory": lambda: (12 << 20) - draw.randint(0, most - least),
        "threads": lambda: draw.randint(1, 2),
        "io_threads": lambda: draw.randint(1, 4),
        "prefetch_depth": lambda: draw.randint(0, 4),
        "token_interval_ms": lambda: draw.choice([0.0, 0.5]),
    }
    while any(thread.is_alive() for thread in threads):
        name = draw.choice(list(changes))
        try:
            model.set_knob(name, changes[name]())
        except BudgetError:
            assert name == "expert_memory"  # past a budget that was lowered before
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_what_is_taken_from_the_store_leaves_the_budget_and_the_process(model: edgert.Model) -> None:
    model.generate(PROMPT, max_tokens=20)
    before = model.stats()
    least = model.native.least_expert_bytes
    model.set_knob("expert_memory", least)
    after = model.stats()
    assert after["slot_bytes"] <= least < before["slot_bytes"]
    assert before["used_bytes"] - after["used_bytes"] == before["slot_capacity_bytes"] - least
    model.set_knob("expert_memory", "auto")
    assert model.stats()["used_bytes"] == before["used_bytes"]


def test_what_cannot_be_is_refused(model: edgert.Model) -> None:
    with pytest.raises(InvalidArgumentError, match=r"context.*cannot change"):
        model.set_knob("context", 5)
    with pytest.raises(InvalidArgumentError, match="allowed 1 to 2"):
        model.set_knob("threads", 3)
    with pytest.raises(InvalidArgumentError, match="io_threads"):
        model.set_knob("io_threads", 0)
    with pytest.raises(BudgetError, match="smallest"):
        model.set_knob("memory", "1MiB")
    with pytest.raises(BudgetError, match="least"):
        model.set_knob("expert_memory", 1)


def test_live_knobs_can_be_stated_at_loading() -> None:
    with (
        pytest.warns(RuntimeWarning, match="will wait for storage"),
        edgert.load(memory="12MiB", expert_memory="1MiB", prefetch_depth=0, token_interval_ms=1.5) as model,
    ):
        found = model.knobs()
    assert (found["expert_memory"], found["prefetch_depth"], found["token_interval_ms"]) == (1 << 20, 0, 1.5)
