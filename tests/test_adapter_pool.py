"""Hundreds of adapters: registered by their headers, read as they are needed, in a bounded memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from bundles import bits
from peft_directories import Adapter, lora, shira

import edgert
from edgert.adapter_sources import read_adapter
from edgert.adapters import AdapterSet
from edgert.backends.native import NativeModel
from edgert.bundle import Bundle
from edgert.converters.adapter_file import write_adapter
from edgert.engine import Engine
from edgert.errors import BudgetError, InvalidArgumentError, UnsupportedError
from edgert.generation import Piece
from edgert.sampling import Sampling

TOKENS = list(range(3, 23))
COUNT = 12


@pytest.fixture(scope="module")
def files(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("adapters")
    manifest = Bundle.open(tiny_bundle).manifest
    made = []
    for seed in range(COUNT):
        peft = (lora if seed % 2 else shira)(seed).write(directory / f"peft-{seed}")
        read = read_adapter(peft, tiny_bundle, manifest)
        kind, parts = read.kind, read.parts
        write_adapter(directory / f"{seed}.adapter", kind, parts, manifest)
        made.append(directory / f"{seed}.adapter")
    return made


@pytest.fixture(scope="module")
def answers(tiny_bundle: Path, files: list[Path]) -> dict[str, np.ndarray]:
    """Of each adapter, loaded alone."""
    answers = {}
    for file in files:
        with edgert.load(tiny_bundle, memory="64MiB", threads=1) as model:
            model.load_adapter(file)
            answers[file.stem] = bits(model.logits(TOKENS, adapter=file.stem))
    return answers


def test_what_others_give_back_to_the_experts_is_not_taken_for_ever(tiny_bundle: Path) -> None:
    class Full:
        taken: ClassVar[list[int]] = []

        def take_from_experts(self, size: int) -> bool:
            assert size < 1 << 63
            self.taken.append(size)
            return len(self.taken) < 1000

        def trim_adapters(self) -> None: ...
        def return_to_experts(self) -> None: ...
        def seek_room(self, on: bool) -> None: ...

    def make() -> None:
        raise BudgetError("full")

    native: Any = Full()
    with pytest.raises(BudgetError, match="full"):
        AdapterSet(Bundle.open(tiny_bundle)).with_room(make, native, keep=())
    assert 20 < len(native.taken) < 64


def test_registering_reads_headers_alone(tiny_bundle: Path, files: list[Path]) -> None:
    with edgert.load(tiny_bundle, memory="64MiB", threads=1) as model:
        used = model.stats()["used_bytes"]
        for number in range(300):
            model.load_adapter(files[number % COUNT], f"adapter-{number}")
        stats = model.stats()
        assert stats["used_bytes"] == used
        assert (stats["adapters"], stats["adapters_resident"], stats["adapter_bytes"]) == (300, 0, 0)
        with pytest.raises(InvalidArgumentError, match="is loaded already"):
            model.load_adapter(files[0], "adapter-7")
        with pytest.raises(edgert.errors.NotFoundError, match="there are adapter-0, .*and 280 more"):
            model.logits(TOKENS, adapter="another")


def test_whatever_was_evicted_answers_stay_the_same(
    tiny_bundle: Path, files: list[Path], answers: dict[str, np.ndarray]
) -> None:
    limit = 96 << 10
    rng = random.Random(0)
    with edgert.load(tiny_bundle, memory="64MiB", threads=1, adapter_memory=limit) as model:
        for file in files:
            model.load_adapter(file)
        for _ in range(80):
            name = rng.choice(files).stem
            np.testing.assert_array_equal(bits(model.logits(TOKENS, adapter=name)), answers[name])
            assert model.stats()["adapter_bytes"] <= limit
        stats = model.stats()
        assert stats["adapter_evictions"] > 10 and stats["adapters_resident"] > 1
        resident = [info for info in model.adapters() if info.resident]
        assert sum(info.bytes for info in resident) == stats["adapter_bytes"]
        for file in files:
            model.unload_adapter(file.stem)
        assert model.stats()["adapter_bytes"] == 0


def test_the_one_that_was_used_longest_ago_goes_and_none_that_is_in_use(
    tiny_bundle: Path, files: list[Path]
) -> None:
    with edgert.load(tiny_bundle, memory="64MiB", threads=1, adapter_memory="64KiB") as model:
        for file in files:
            model.load_adapter(file)
        held = model.sequence("0")
        for name in ("2", "4", "2", "6"):  # sparse ones, all of a size: three fit
            model.logits(TOKENS, adapter=name)
        first = {info.name for info in model.adapters() if info.resident}
        for file in files[1:]:
            model.logits(TOKENS, adapter=file.stem)
        assert {"0", "2", "6"} <= first
        assert "0" in {info.name for info in model.adapters() if info.resident}
        del held
        for file in files[1:]:
            model.logits(TOKENS, adapter=file.stem)
        assert "0" not in {info.name for info in model.adapters() if info.resident}


def test_where_the_budget_is_full_idle_adapters_make_room(tiny_bundle: Path, files: list[Path]) -> None:
    """And where all are in use, the next one is refused, and those run on."""
    with edgert.load(tiny_bundle, memory="64MiB", threads=1) as model:
        for file in files:
            model.load_adapter(file)
        one = bits(model.logits(TOKENS, adapter="1"))
        runtime: Any = model._runtime  # type: ignore[attr-defined]
        runtime.reserve(runtime.budget_bytes - runtime.used_bytes - (96 << 10))
        for file in files:
            model.logits(TOKENS, adapter=file.stem)
        assert model.stats()["adapter_evictions"] > 0
        held = []
        refused = None
        for file in files:
            try:
                held.append(model.sequence(file.stem))
            except BudgetError as error:
                refused = str(error)
        assert len(held) > 1 and refused is not None
        assert "adapter_memory keeps memory for adapters" in refused
        held.clear()
        np.testing.assert_array_equal(bits(model.logits(TOKENS, adapter="1")), one)


@pytest.mark.filterwarnings("ignore:.*every token will wait")
def test_where_experts_take_the_rest_adapters_take_of_theirs_and_give_it_back(
    tiny_bundle: Path, files: list[Path], answers: dict[str, np.ndarray]
) -> None:
    with edgert.load(tiny_bundle, memory="64MiB", threads=1) as resident:
        least = resident.minimum_bytes
    with edgert.load(tiny_bundle, memory=least + (256 << 10), threads=1) as model:
        whole = model.knobs()["expert_memory"]
        assert not model.resident and model.stats()["used_bytes"] == least + (256 << 10)
        for _ in range(2):
            for file in files[:4]:
                model.load_adapter(file)
            for name in ("0", "1", "2", "3", "0"):
                np.testing.assert_array_equal(bits(model.logits(TOKENS, adapter=name)), answers[name])
            assert model.knobs()["expert_memory"] < whole
            assert model.stats()["used_bytes"] <= least + (256 << 10)
            for file in files[:4]:
                model.unload_adapter(file.stem)
            assert model.knobs()["expert_memory"] == whole
        model.load_adapter(files[0])
        model.logits(TOKENS, adapter="0")
        model.set_knob("memory", least + (260 << 10))
        model.unload_adapter("0")
        assert model.knobs()["expert_memory"] == whole + (4 << 10)
        model.load_adapter(files[0])
        model.logits(TOKENS, adapter="0")
        model.set_knob("expert_memory", lower := model.knobs()["expert_memory"] - 1000)
        model.unload_adapter("0")
        assert model.knobs()["expert_memory"] == lower  # it was set since


@pytest.mark.filterwarnings("ignore:.*every token will wait")
def test_what_one_takes_of_the_experts_no_other_gives_back(tiny_bundle: Path) -> None:
    with edgert.load(tiny_bundle, memory="64MiB", threads=1) as resident:
        least = resident.minimum_bytes
    with edgert.load(tiny_bundle, memory=least + (256 << 10), threads=1) as model:
        whole = model.knobs()["expert_memory"]
        model.native.seek_room(True)
        for _ in range(2):
            assert model.native.take_from_experts(32 << 10)
            lower = model.knobs()["expert_memory"]
            model.native.return_to_experts()
            assert model.knobs()["expert_memory"] == lower < whole
        model.native.seek_room(False)
        model.native.return_to_experts()
        assert model.knobs()["expert_memory"] == whole


def test_idle_adapters_make_way_for_a_smaller_budget(tiny_bundle: Path, files: list[Path]) -> None:
    with edgert.load(tiny_bundle, memory="64MiB", threads=1) as loaded:
        model: Any = loaded
        plain = model.stats()
        least = plain["used_bytes"] - plain["slot_capacity_bytes"] + model.native.least_expert_bytes
        for file in files:
            model.load_adapter(file)
            model.logits(TOKENS, adapter=file.stem)
        model.set_adapter("3")
        assert model.stats()["adapter_bytes"] > 128 << 10
        model.set_knob("memory", least + (96 << 10))
        assert model.stats()["used_bytes"] <= least + (96 << 10)
        assert "3" in {info.name for info in model.adapters() if info.resident}


def test_requests_with_different_adapters_run_together(
    tiny_bundle: Path, files: list[Path], answers: dict[str, np.ndarray]
) -> None:
    """Each gets the tokens that it gets alone."""
    sampling = Sampling.of({"max_tokens": 8, "temperature": 0, "ignore_eos": True}, {}, 320)
    with edgert.load(tiny_bundle, memory="64MiB", threads=1, parallel=8, adapter_memory="128KiB") as model:
        for file in files:
            model.load_adapter(file)
        choices: list[Any] = [[], "0", "1", {"1": 0.5}, ["2", "3"], "4", "5", "1"]
        alone = [
            model.generate(TOKENS, adapter=choice, max_tokens=8, temperature=0, ignore_eos=True).tokens
            for choice in choices
        ]
        together: list[list[Piece]] = [[] for _ in choices]
        engine = Engine(model)
        jobs = [
            engine.submit(TOKENS, sampling, pieces.append, adapter=choice)
            for pieces, choice in zip(together, choices, strict=True)
        ]
        for job in jobs:
            assert job.done.wait(60) and job.error is None
        engine.close()
    assert [[piece.token for piece in pieces] for pieces in together] == alone
    assert len({tuple(tokens) for tokens in alone}) > 4


def soft_prompt(length: int, seed: int = 0) -> Adapter:
    made = Adapter({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": length})
    made.tensors["prompt_embeddings"] = (
        np.random.default_rng(seed).standard_normal((length, 72)).astype(np.float32)
    )
    return made


def test_a_soft_prompt_stands_before_every_sequence(tiny_bundle: Path, tmp_path: Path) -> None:
    """Of the batches of an engine too, which remember it with the prompt."""
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    sampling = Sampling.of(options, {}, 320)
    with edgert.load(tiny_bundle, memory="64MiB", threads=1, parallel=2, context=64) as model:
        model.load_adapter(soft_prompt(17).write(tmp_path / "soft"))
        expected = list(TOKENS)
        for _ in range(6):
            expected.append(int(model.logits(expected, adapter="soft")[-1].argmax()))
        answer = expected[len(TOKENS) :]
        assert model.generate(TOKENS, adapter="soft", **options).tokens == answer
        assert model.generate(TOKENS, **options).tokens != answer
        model.native.forget_prefixes()
        engine = Engine(model)
        for cached in (0, 32):  # 17 of the soft prompt and 15 of TOKENS
            pieces: list[Piece] = []
            job = engine.submit(TOKENS, sampling, pieces.append, adapter="soft")
            assert job.done.wait(60) and job.error is None
            assert [piece.token for piece in pieces] == answer
            assert job.cached_tokens == cached
        drawn = Sampling.of({"max_tokens": 6, "temperature": 1, "seed": 3, "ignore_eos": True}, {}, 320)
        pieces = []
        assert engine.submit(TOKENS, drawn, pieces.append, adapter="soft").done.wait(60)
        alone = model.generate(TOKENS, adapter="soft", max_tokens=6, temperature=1, seed=3, ignore_eos=True)
        assert [piece.token for piece in pieces] == alone.tokens
        engine.close()
        to_the_end = model.generate([5] * 40, adapter="soft", temperature=0, ignore_eos=True)
        assert (len(to_the_end.tokens), to_the_end.finish_reason) == (64 - 40 - 17, "length")
        with pytest.raises(UnsupportedError, match="adapters with a soft prompt"):
            model.session(adapter="soft")
        with pytest.raises(InvalidArgumentError, match="would hold 65 tokens, the context is 64"):
            model.logits([5] * 48, adapter="soft")
        model.load_adapter(soft_prompt(3, seed=1).write(tmp_path / "other"))
        with pytest.raises(InvalidArgumentError, match="its soft prompt would follow another adapter's"):
            model.logits(TOKENS, adapter=["soft", "other"])


def test_threads_may_share_the_pool(
    tiny_bundle: Path, files: list[Path], answers: dict[str, np.ndarray]
) -> None:
    wrong: list[str] = []
    with edgert.load(tiny_bundle, memory="64MiB", threads=1, parallel=4, adapter_memory="64KiB") as model:
        for file in files:
            model.load_adapter(file)

        def use(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(12):
                name = rng.choice(files).stem
                if not np.array_equal(bits(model.logits(TOKENS, adapter=name)), answers[name]):
                    wrong.append(name)

        threads = [threading.Thread(target=use, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_switch_that_waits_for_a_step_holds_nobody_else_up(tiny_bundle: Path, files: list[Path]) -> None:
    class Waiting:
        """A native model whose weights change only once another thread has looked at the adapters and begun with them."""

        def __init__(self, native: Any, other: Callable[[], Any]) -> None:
            self.native, self.other = native, other
            self.seen: list[Any] = []

        def __getattr__(self, name: str) -> Any:
            return getattr(self.native, name)

        def use_patches(self, patches: Any) -> None:
            with ThreadPoolExecutor(1) as pool:
                self.seen.append(pool.submit(self.other).result(timeout=60))
            self.native.use_patches(patches)

    with edgert.load(tiny_bundle, memory="64MiB", threads=1) as model:
        assert isinstance(model, NativeModel)
        adapters = model._adapter_set
        for number in (0, 1):
            model.load_adapter(files[number], str(number))

        def other() -> tuple[int, dict[str, float]]:
            adapters.sequence(model.native, None, lambda mix, patches, top_k: len(mix))
            return adapters.statistics()["adapters"], {one.name: one.scale for one in adapters.all()}

        native: Any = Waiting(model.native, other)
        adapters.set(native, {"0": 0.5, "1": 1.0})
        adapters.enable(native, on=False)
        assert native.seen == [(2, {"0": 0.5, "1": 1.0}), (2, {"0": 0.0, "1": 0.0})]
