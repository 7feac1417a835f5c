"""Eviction policies seen from Python: the simulation counts what the engine counts, and nothing beats the optimum."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from bundles import bits, minimum_bytes, open_model, read_manifest

from edgert import _native, eviction, routing
from edgert.errors import InvalidArgumentError
from edgert.roof import Footprint, chunks

LAYERS = [(32, 4)] * 4  # of the shape "tiny"
EQUAL = [[1] * 32] * 4


def skewed(positions: int, seed: int = 1) -> routing.Table:
    """Some experts more likely than others, and the last token's more than those."""
    draw = np.random.default_rng(seed)
    table: routing.Table = []
    for position in range(positions):
        step = []
        for layer, (count, top) in enumerate(LAYERS):
            weights = 1 / np.arange(1, count + 1)
            if position:
                weights[table[-1][layer]] += 0.5
            step.append(sorted(map(int, draw.choice(count, top, replace=False, p=weights / sum(weights)))))
        table.append(step)
    return table


@pytest.mark.parametrize("policy", eviction.policies())
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_simulation_counts_what_the_engine_counts(tiny_shape: Path, policy: str, share: float) -> None:
    footprint = Footprint.of(read_manifest(tiny_shape))
    memory = minimum_bytes(tiny_shape) + int(share * sum(map(sum, footprint.experts)))
    model = open_model(tiny_shape, memory=memory, eviction=policy, prefetch="none")
    table = skewed(80)
    model.impose_routing(table)
    sequence = model.sequence()
    prompt = 3  # tokens: at most 12 of 32 experts, so no scan
    model.step([(sequence, list(range(prompt)), None)])
    for position in range(prompt, 80):
        model.step([(sequence, [position], None)])
    plan = model.plan()
    steps = [*chunks(table[:prompt], plan["chunk"]), *table[prompt:]]
    simulated = _native.StoreSimulation(footprint.experts, plan["slots_bytes"], policy).run(steps)
    counted = model.statistics()
    assert simulated["evictions"] > 100
    assert simulated == {
        "hits": counted["expert_hits"],
        "misses": counted["expert_misses"],
        "evictions": counted["evictions"],
        "bytes": counted["expert_bytes_read"],
    }


def test_every_policy_gives_the_same_bits(tiny_shape: Path) -> None:
    whole = open_model(tiny_shape)
    tokens = [(7 * i * i) % 1024 for i in range(30)]
    expected = bits(whole.logits(whole.sequence(), tokens))
    for policy in eviction.policies():
        model = open_model(tiny_shape, memory=minimum_bytes(tiny_shape) + (1 << 18), eviction=policy)
        assert model.eviction == policy
        assert not model.resident
        assert (bits(model.logits(model.sequence(), tokens)) == expected).all()
        assert model.statistics()["evictions"] > 0


def test_lru_drops_what_was_used_longest_ago() -> None:
    store = _native.StoreSimulation([[1] * 8], 3, "lru")
    assert store.run([[[0]], [[1]], [[2]]])["bytes"] == 3
    assert store.run([[[0]]])["bytes"] == 0  # 1 is the oldest now
    assert store.run([[[3]], [[2]], [[0]]])["bytes"] == 1
    assert store.run([[[1]]])["bytes"] == 1
    assert _native.StoreSimulation([[2, 4, 4]], 4, "lru").run([[[0]], [[1]], [[0]]])["bytes"] == 8


def test_a_step_with_more_experts_than_the_store_holds_keeps_what_it_can() -> None:
    store = _native.StoreSimulation([[1] * 6], 3, "lru")
    everything = [[list(range(6))]]
    assert store.run(everything)["bytes"] == 6
    assert store.run(everything)["bytes"] == 3


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_beats_the_optimum(seed: int) -> None:
    steps = skewed(150, seed)
    misses = {}
    for slots in (20, 40, 80):
        found = eviction.compare(EQUAL, slots, steps, [True] * len(steps))
        assert min(counts.misses for counts in found.values()) == found[eviction.OPTIMUM].misses
        misses[slots] = found[eviction.OPTIMUM].misses
    assert all(more > fewer for more, fewer in pairwise(misses.values()))


def test_only_counted_steps_are_counted() -> None:
    steps = skewed(20)
    every = eviction.replay(EQUAL, 30, steps, eviction="lfu")
    assert eviction.total(every).hits + eviction.total(every).misses == 20 * 16
    later = eviction.replay(EQUAL, 30, steps, [False] * 15 + [True] * 5, "lfu")
    assert later == every[15:]
    assert eviction.total([]).hit_rate == 1


def test_recency_and_frequency_are_weighed_as_the_routing_asks() -> None:
    """Uses that come from frequency alone, and from the last token alone: neither lru nor lfu suits both."""
    frequent = [[sorted({0, 1, 2, 3 + i % 29})] for i in range(200)]  # three always, the rest in turn
    draw = np.random.default_rng(3)
    sticky = [[[0, 1, 2, 3]]]
    for _ in range(400):
        kept = {id for id in sticky[-1][0] if draw.random() < 0.8}
        while len(kept) < 4:
            kept.add(int(draw.integers(32)))
        sticky.append([sorted(kept)])
    for steps, good in ((frequent, "lfu"), (sticky, "lru")):
        found = eviction.compare([[1] * 32], 8, steps, [True] * len(steps))
        assert found["forecast"].hit_rate > found[good].hit_rate - 0.02


def test_other_words_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"eviction: found 'fifo', allowed .*lru"):
        _native.StoreSimulation(EQUAL, 30, "fifo")
