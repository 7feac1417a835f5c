"""Kinds of sequence mixing that keep something else than keys and values: the laws that hold for all of them.

The same bits at any chunk, thread count, budget, batch and instruction set; rewinding to anywhere; all of it paid for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import MIB, bits, convert, minimum_bytes, open_model, runnable_isas, transcript
from checkpoints import prompt_tokens
from variants import VARIANTS, by_name, make_checkpoint

from edgert.errors import BudgetError, CancelledError

KINDS = {
    "latent_attention": "deepseek_v3",
    "latent_attention without q_a": "deepseek_v2",
    "gated_delta": "qwen3_next",
    "short_conv": "lfm2_moe",
}
STATEFUL = ("gated_delta", "short_conv")
VOCAB = 131
PROMPT = prompt_tokens(45, VOCAB)
GENERATED = 30


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the default formats: integers."""
    directory = tmp_path_factory.mktemp("kind")
    source = make_checkpoint(directory / "checkpoint", by_name(VARIANTS, KINDS[kind]))
    return convert(source, directory / "model.edgert")


def whole(model: Any) -> tuple[list[int], np.ndarray]:
    tokens, logits = transcript(model, PROMPT, GENERATED)
    return PROMPT + tokens, logits


@pytest.mark.parametrize("isa", runnable_isas())
def test_chunks_threads_and_budgets(bundle: Path, isa: str) -> None:
    tokens, expected = whole(open_model(bundle, isa=isa))
    for chunk, threads in ((1, 1), (5, 2), (16, 3), (64, 1)):
        memory = minimum_bytes(bundle, isa=isa, threads=threads, chunk=chunk)
        model = open_model(bundle, memory=memory, isa=isa, threads=threads, chunk=chunk)
        assert not model.resident
        assert np.array_equal(whole(model)[1], expected), f"chunk {chunk}, {threads} threads"
        assert np.array_equal(bits(model.logits(model.sequence(), tokens)), expected), f"at once, {chunk}"


@pytest.mark.parametrize("kv_format", ["f32", "f16", "int8"])
def test_kv_formats(bundle: Path, kv_format: str) -> None:
    tokens, expected = whole(open_model(bundle, kv_format=kv_format))
    model = open_model(bundle, kv_format=kv_format, chunk=7)
    assert np.array_equal(bits(model.logits(model.sequence(), tokens)), expected)


def test_batches(bundle: Path) -> None:
    """Three sequences in every step, of unlike lengths: each as if it were alone."""
    from edgert import _native

    def sampler(seed: int) -> _native.Sampler:
        options = _native.SamplerOptions()
        options.temperature, options.seed, options.logprobs = 1.0, seed, 5
        return _native.Sampler(options)

    def run(model: Any, seeds: list[int]) -> list[list[tuple[int, list[tuple[int, float]]]]]:
        rows = [
            (model.sequence(), prompt_tokens(5 + 11 * seed, VOCAB, seed), sampler(seed)) for seed in seeds
        ]
        drawn: list[list[tuple[int, list[tuple[int, float]]]]] = [[] for _ in seeds]
        for _ in range(12):
            samples = model.step(rows)
            for mine, sample in zip(drawn, samples, strict=True):
                mine.append((sample.token, sample.top))
            rows = [(s, [sample.token], p) for (s, _, p), sample in zip(rows, samples, strict=True)]
        return drawn

    together = run(open_model(bundle, parallel=3, chunk=8, threads=2), [0, 1, 2])
    assert together == [run(open_model(bundle), [seed])[0] for seed in range(3)]


def test_rewind(bundle: Path) -> None:
    """To before the last step, to within it, to the start, and twice; then on as one that never went further."""
    model = open_model(bundle, chunk=16)
    tokens, expected = whole(model)
    sequence = model.sequence()
    model.logits(sequence, tokens[:40])
    model.logits(sequence, tokens[40:60])
    for length in (59, 40, 50, 33, 16, 1, 0):
        sequence.rewind(length)
        assert sequence.length == length
        model.logits(sequence, prompt_tokens(9, VOCAB, seed=length))
        sequence.rewind(length + 5)
        sequence.rewind(length)
        assert np.array_equal(bits(model.logits(sequence, tokens[length:60])), expected[length:60]), length
        assert sequence.length == 60


def test_a_step_that_fails_changes_nothing(bundle: Path) -> None:
    model = open_model(bundle, chunk=4)
    tokens, expected = whole(model)
    sequence = model.sequence()
    model.logits(sequence, tokens[:21])
    sequence.rewind(20)
    for _ in range(2):
        model.cancel()
        with pytest.raises(CancelledError):
            model.logits(sequence, tokens[20:40])
        assert sequence.length == 20
    assert np.array_equal(bits(model.logits(sequence, tokens[20:60])), expected[20:60])


def test_states_are_paid_for(kind: str, bundle: Path) -> None:
    from edgert import _native

    runtime = _native.Runtime(256 * MIB)
    one = _native.plan_memory(runtime, str(bundle), parallel=1, chunk=8)
    four = _native.plan_memory(runtime, str(bundle), parallel=4, chunk=8)
    assert (one["state_bytes"] > 0) == (kind in STATEFUL)
    page = _native.page_size()
    assert four["state_bytes"] > 4 * (one["state_bytes"] - page) or not one["state_bytes"]
    assert four["minimum_bytes"] - one["minimum_bytes"] == sum(
        four[part] - one[part] for part in ("kv_bytes", "state_bytes")
    )
    model = open_model(bundle, memory=four["minimum_bytes"], parallel=4, chunk=8)
    sequences = [model.sequence() for _ in range(4)]
    for sequence in sequences:
        model.logits(sequence, PROMPT)


def test_as_many_sequences_as_there_is_room_for(kind: str, bundle: Path) -> None:
    """Where states are of fixed size each sequence needs its own, however short it is; an empty one needs none."""
    if kind not in STATEFUL:
        return
    model = open_model(bundle, parallel=2)
    first, second, third = (model.sequence() for _ in range(3))
    model.logits(first, PROMPT)
    model.logits(second, PROMPT)
    with pytest.raises(BudgetError, match="parallel"):
        model.logits(third, PROMPT)
    first.rewind(0)
    assert np.array_equal(bits(model.logits(third, PROMPT)), whole(open_model(bundle))[1][: len(PROMPT)])


def test_a_plan_before_there_is_a_bundle(kind: str, bundle: Path) -> None:
    """What a configuration alone says is what the bundle then needs."""
    import json

    from edgert.bundle import Bundle
    from edgert.footprint import sizes_of_bundle, sizes_of_config

    config = json.loads((bundle.parent / "checkpoint" / "config.json").read_text())
    expected = sizes_of_bundle(Bundle.open(bundle)).plan(256 * MIB, context=100)
    assert sizes_of_config("model", config, "config.json").plan(256 * MIB, context=100) == expected
    assert (expected["state_bytes"] > 0) == (kind in STATEFUL)
