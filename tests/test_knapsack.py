"""The knapsack that shares bytes among experts: exact against every choice there is, bounded where it is not."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.converters.knapsack import choose
from edgert.errors import InvalidArgumentError

options = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=4)


def brute_force(items: list[list[tuple[int, int]]], budget: int) -> int:
    return min(
        sum(loss for _, loss in choice)
        for choice in itertools.product(*items)
        if sum(size for size, _ in choice) <= budget
    )


@settings(deadline=None, max_examples=300)
@given(st.lists(options, min_size=1, max_size=5), st.integers(0, 30))
def test_no_choice_within_the_budget_loses_less(items: list[list[tuple[int, int]]], spare: int) -> None:
    sizes = [[size for size, _ in item] for item in items]
    losses = [[float(loss) for _, loss in item] for item in items]
    budget = sum(map(min, sizes)) + spare

    choice = choose(sizes, losses, budget)

    assert choice.bytes == sum(size[i] for size, i in zip(sizes, choice.options, strict=True)) <= budget
    assert choice.loss == sum(loss[i] for loss, i in zip(losses, choice.options, strict=True))
    assert choice.loss == pytest.approx(brute_force(items, budget), abs=1e-9)
    assert choice.gap == 0


@settings(deadline=None, max_examples=100)
@given(st.lists(options, min_size=1, max_size=5), st.integers(0, 30))
def test_a_choice_cut_short_states_how_far_it_may_be_off(
    items: list[list[tuple[int, int]]], spare: int
) -> None:
    sizes = [[size for size, _ in item] for item in items]
    losses = [[float(loss) for _, loss in item] for item in items]
    budget = sum(map(min, sizes)) + spare

    choice = choose(sizes, losses, budget, states=0)

    best = brute_force(items, budget)
    assert choice.bytes <= budget
    assert choice.bound <= best + 1e-9
    assert best <= choice.loss + 1e-9 and choice.loss - choice.gap <= best + 1e-9


def test_all_experts_of_a_large_model_are_chosen_among_exactly() -> None:
    draw = random.Random(1)
    bits = [2.5, 2.75, 3.375, 3.5625, 4.375, 4.5, 6.5625, 8.5]
    sizes = [[int(b * 196608) for b in bits]] * (48 * 128 * 3)
    scales = [draw.lognormvariate(0, 2) for _ in sizes]
    losses = [[scale * 4.0**-b * draw.uniform(0.8, 1.2) for b in bits] for scale in scales]

    choice = choose(sizes, losses, int(3.0 * 196608 * len(sizes)))

    assert choice.gap == 0
    assert choice == choose(sizes, losses, int(3.0 * 196608 * len(sizes)))


def test_equal_experts_do_not_take_forever() -> None:
    choice = choose([[2, 3, 5]] * 2000, [[9.0, 4.0, 1.0]] * 2000, 6001)

    assert choice.bytes <= 6001
    assert choice.loss - choice.gap <= choice.loss


def test_a_budget_below_the_smallest_choice_is_refused_with_it() -> None:
    with pytest.raises(InvalidArgumentError, match="budget: 4 bytes; the smallest choice takes 5"):
        choose([[2, 9], [3]], [[1.0, 0.0], [0.0]], 4)
