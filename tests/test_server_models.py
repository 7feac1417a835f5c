"""Several models under one budget: what is loaded when, and what a request may hold."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edgert.errors import (
    BudgetError,
    CorruptError,
    EdgertError,
    InvalidArgumentError,
    NotFoundError,
    StorageError,
    UnsupportedError,
)
from edgert.server import errors
from edgert.server.configuration import ServedAdapter, ServedModel, served_model
from edgert.server.models import ModelRegistry, Opened, Opener, UnknownModelError

MIB = 1 << 20


@dataclass
class FakeModel:
    name: str
    closed: bool = False
    backend: str = "edgert"

    def close(self) -> None:
        self.closed = True

    def adapters(self) -> list[Any]:
        return []


@dataclass
class House:
    """Opens fakes, and remembers."""

    needs: dict[str, tuple[int, int]] = field(default_factory=dict)
    opened: list[tuple[str, int]] = field(default_factory=list)
    fails: set[str] = field(default_factory=set)
    reason: EdgertError | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    loading: int = 0
    at_once: int = 0

    def open(self, served: ServedModel, budget_bytes: int) -> Opened:
        self.loading += 1
        self.at_once = max(self.at_once, self.loading)
        assert self.gate.wait(30)
        self.loading -= 1
        if served.name in self.fails:
            raise self.reason or CorruptError(f"{served.name}: is damaged")
        self.opened.append((served.name, budget_bytes))
        model: Any = FakeModel(served.name)
        return Opened(model, None, budget_bytes)

    def registry(self, *served: str, budget: int = 100 * MIB, **options: Any) -> ModelRegistry:
        self.gate.set()
        models = [served_model(text) for text in served]
        opener = Opener(lambda one: self.needs.get(one.name, (10 * MIB, 60 * MIB)), self.open)
        return ModelRegistry(models, opener, budget_bytes=budget, **options)


@pytest.fixture
def house() -> House:
    return House()


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(bounded())


def loaded(registry: ModelRegistry) -> dict[str, int]:
    return {name: opened.budget_bytes for name, opened in registry.opened()}


def test_an_only_model_gets_the_whole_budget(house: House) -> None:
    async def work() -> None:
        registry = house.registry("a")
        async with registry.acquire("a") as model:
            assert model.name == "a" and loaded(registry) == {"a": 100 * MIB}
        async with registry.acquire(None) as model:
            assert model.name == "a"
        assert house.opened == [("a", 100 * MIB)]

    run(work)


def test_models_that_fit_stay_beside_each_other(house: House) -> None:
    house.needs = {"a": (10 * MIB, 30 * MIB), "b": (10 * MIB, 50 * MIB)}

    async def work() -> None:
        registry = house.registry("a", "b", "c,memory=20MiB")
        for name in ("a", "b", "c", "a"):
            await registry.load(name)
        assert loaded(registry) == {"a": 30 * MIB, "b": 50 * MIB, "c": 20 * MIB}
        assert len(house.opened) == 3

    run(work)


def test_the_least_recently_used_makes_room(house: House) -> None:
    house.needs = dict.fromkeys("abc", (10 * MIB, 40 * MIB))

    async def work() -> None:
        registry = house.registry("a", "b", "c")
        for name in ("a", "b", "a", "c"):
            await registry.load(name)
        assert set(loaded(registry)) == {"a", "c"}

    run(work)


def test_a_pinned_model_and_one_at_work_stay(house: House) -> None:
    house.needs = dict.fromkeys("abc", (10 * MIB, 45 * MIB))

    async def work() -> None:
        registry = house.registry("a,pin", "b", "c")
        assert registry.to_preload() == ["a"]
        await registry.load("a")
        async with registry.acquire("b") as held:
            await registry.load("c")  # into what is left
            assert loaded(registry) == {"a": 45 * MIB, "b": 45 * MIB, "c": 10 * MIB}
            assert not held.model.closed

    run(work)


def test_a_model_waits_until_another_is_let_go(house: House) -> None:
    house.needs = {"a": (80 * MIB, 80 * MIB), "b": (80 * MIB, 80 * MIB)}

    async def work() -> None:
        registry = house.registry("a", "b")
        async with registry.acquire("a") as held:
            waiting = asyncio.create_task(registry.load("b"))
            await asyncio.sleep(0.1)
            assert not waiting.done() and not held.model.closed
        await waiting
        assert held.model.closed and set(loaded(registry)) == {"b"}

    run(work)


def test_without_room_in_time_the_request_is_told(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.server.models._WAIT_FOR_ROOM_S", 0.1)
    house.needs = {"a": (80 * MIB, 80 * MIB), "b": (80 * MIB, 80 * MIB), "c": (200 * MIB, 200 * MIB)}

    async def work() -> None:
        registry = house.registry("a", "b", "c")
        async with registry.acquire("a"):
            for name in ("b", "c"):
                with pytest.raises(BudgetError, match="needs at least"):
                    await registry.load(name)
            assert set(loaded(registry)) == {"a"}

    run(work)


def test_one_that_cannot_be_loaded_harms_nobody(house: House) -> None:
    house.fails = {"bad"}
    house.needs = {"good": (10 * MIB, 40 * MIB), "bad": (10 * MIB, 40 * MIB)}

    async def work() -> None:
        registry = house.registry("good", "bad")
        async with registry.acquire("good") as held:
            for _ in range(3):
                with pytest.raises(CorruptError, match="is damaged"):
                    await registry.load("bad")
            assert not held.model.closed
        assert {card.id: card.state for card in registry.cards()} == {"good": "ready", "bad": "failed"}

    run(work)


def test_many_requests_load_a_model_once_and_one_that_leaves_ends_no_other(house: House) -> None:
    async def work() -> None:
        registry = house.registry("a", "b")
        house.gate.clear()
        requests = [asyncio.create_task(registry.load(name)) for name in ("a", "a", "b", "a")]
        await asyncio.sleep(0.05)
        requests[0].cancel()
        house.gate.set()
        await asyncio.gather(*requests[1:])
        assert sorted(name for name, _ in house.opened) == ["a", "b"]
        assert house.at_once == 1

    run(work)


def test_unloading_races_no_request(house: House) -> None:
    """Requests of models that keep pushing each other out always hold an open one."""
    house.needs = dict.fromkeys("abc", (40 * MIB, 60 * MIB))

    async def work() -> None:
        registry = house.registry("a", "b", "c", keep_alive_s=1e-6)

        async def ask(number: int) -> None:
            for turn in range(20):
                async with registry.acquire("abc"[(number + turn) % 3]) as held:
                    await asyncio.sleep(0.001 * (number % 3))
                    assert not held.model.closed
                await registry.unload_idle()

        await asyncio.gather(*(ask(number) for number in range(8)))
        assert sum(loaded(registry).values()) <= 100 * MIB
        await registry.close()
        assert not loaded(registry)

    run(work)


def test_an_idle_model_is_unloaded_after_its_time_and_comes_back(house: House) -> None:
    async def work() -> None:
        registry = house.registry("a,memory=20MiB", "b,pin", keep_alive_s=0.05)
        for name in ("a", "b"):
            await registry.load(name)
        await registry.unload_idle()
        assert set(loaded(registry)) == {"a", "b"}
        await asyncio.sleep(0.1)
        await registry.unload_idle()
        assert set(loaded(registry)) == {"b"}
        await registry.load("a")
        assert set(loaded(registry)) == {"a", "b"}

    run(work)


@pytest.mark.parametrize("name", ["x", "", "a:none", "../a", "/etc/passwd", "a" * 10_000, "a\x00", "A"])
def test_only_what_is_served_is_found(house: House, name: str) -> None:
    async def work() -> None:
        registry = house.registry("a")
        with pytest.raises(NotFoundError) as caught:
            await registry.load(name)
        assert "a" in str(caught.value) and len(str(caught.value)) < 400

    run(work)


def test_models_that_are_installed_later_are_found(house: House) -> None:
    there = [ServedModel("a", "a")]

    async def work() -> None:
        registry = house.registry("a", found=lambda: there)
        there.append(ServedModel("b", "b"))
        await registry.load("b")
        assert [card.id for card in registry.cards()] == ["a", "b"]

    run(work)


def test_the_words_of_a_model() -> None:
    assert served_model("docs-moe") == ServedModel("docs-moe", "docs-moe")
    assert served_model("/models/qwen3.edgert,pin") == ServedModel(
        "qwen3", "/models/qwen3.edgert", None, True
    )
    assert served_model("hf:org/name:x.gguf").name == "hf-org/name-x"
    assert served_model("a,name=b,memory=1GiB,adapter=/x/c.adapter:0.5,adapter=d=/y") == ServedModel(
        "b",
        "a",
        1 << 30,
        False,
        (ServedAdapter("c", Path("/x/c.adapter"), 0.5), ServedAdapter("d", Path("/y"), 0.0)),
    )


def test_a_failure_is_tried_again_after_a_while(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.server.models._RETRY_FAILED_S", 0.05)
    house.fails = {"a"}

    async def work() -> None:
        registry = house.registry("a", "b")
        with pytest.raises(CorruptError):
            await registry.load("a")
        assert registry.failure(["b", "a"]) == "a: is damaged"
        house.fails.clear()
        until = time.monotonic() + 0.06
        while time.monotonic() < until:
            await asyncio.sleep(0.01)
        await registry.load("a")
        assert registry.failure(["b", "a"]) is None

    run(work)


@pytest.mark.parametrize("kind", [NotFoundError, UnsupportedError, InvalidArgumentError])
def test_what_is_wrong_with_a_served_model_is_not_the_requests_fault(
    house: House, kind: type[EdgertError]
) -> None:
    house.reason = kind("a.edgert/dense.bin: is not there")
    house.fails = {"a"}

    async def work() -> None:
        registry = house.registry("a", "b")
        for _ in range(2):
            with pytest.raises(StorageError, match="dense.bin: is not there") as caught:
                await registry.load("a")
            assert errors.of(caught.value).status == 500
        with pytest.raises(UnknownModelError) as unknown:
            await registry.load("c")
        assert errors.of(unknown.value).status == 404

    run(work)
