"""The multiple-choice knapsack: one option of every item, the least loss within a number of bytes.

Lagrange's bound (equal to the linear relaxation's) and a greedy solution near it leave a gap; options that cost more than
the gap are out, and what is left is solved exactly by dynamic programming over pairs of bytes and loss. Where that would
take more states than are allowed, the greedy solution stands and the bound says how far it is from the best at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from edgert.errors import InvalidArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_STATES = 1 << 24  # of all items together; each keeps 5 bytes to find the way back
_EPSILON = 1e-12  # of the losses' sum: what rounding may move


@dataclass(frozen=True, slots=True)
class Choice:
    """`options[i]` is the option of item i. No choice within the budget loses less than `bound`."""

    options: tuple[int, ...]
    bytes: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How far from the best the loss is at most."""
        return max(0.0, self.loss - self.bound)


def choose(
    sizes: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    budget: int,
    *,
    states: int = _MAX_STATES,
) -> Choice:
    """The option of each item (its size in bytes and its loss, both not negative) with the least sum of losses.

    Equal inputs give equal choices. Raises InvalidArgumentError where not even the smallest options fit.
    """
    if not sizes:
        return Choice((), 0, 0.0, 0.0)
    smallest = sum(min(item) for item in sizes)
    if smallest > budget:
        raise InvalidArgumentError(f"budget: {budget} bytes; the smallest choice takes {smallest}")
    problem = _Problem(sizes, losses, budget)
    price, chosen = problem.relax()
    loss, bound = problem.loss(chosen), problem.bound(price)
    exact = problem.improve(chosen, price, bound, states)
    if exact is not None:
        chosen = exact
        loss = bound = problem.loss(chosen)
    return Choice(tuple(int(i) for i in chosen), problem.bytes(chosen), loss, min(bound, loss))


class _Problem:
    """Items in rows, their options in columns; a row with fewer options than others is filled with impossible ones."""

    def __init__(
        self, sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
    ) -> None:
        shape = (len(sizes), max(map(len, sizes)))
        self.sizes: NDArray[np.int64] = np.zeros(shape, np.int64)
        self.losses: NDArray[np.float64] = np.full(shape, np.inf)
        for item, (item_sizes, item_losses) in enumerate(zip(sizes, losses, strict=True)):
            self.sizes[item, : len(item_sizes)] = item_sizes
            self.losses[item, : len(item_losses)] = item_losses
        self.budget = budget
        self._items = np.arange(shape[0])

    def bytes(self, chosen: "NDArray[np.int64]") -> int:
        return int(self.sizes[self._items, chosen].sum())

    def loss(self, chosen: "NDArray[np.int64]") -> float:
        return float(self.losses[self._items, chosen].sum())

    def bound(self, price: float) -> float:
        """What no choice can go below, by Lagrange, at `price` a byte."""
        return float((self.losses + price * self.sizes).min(axis=1).sum()) - price * self.budget

    def relax(self) -> tuple[float, "NDArray[np.int64]"]:
        """The price of a byte at which the relaxation spends the budget, and a choice near it that fits."""
        steps, chosen = self._steps()
        left = self.budget - self.bytes(chosen)
        price, stuck = 0.0, set()
        for gain, item, option in steps:
            more = int(self.sizes[item, option] - self.sizes[item, chosen[item]])
            if item in stuck:
                continue
            if more <= left:
                chosen[item], left = option, left - more
                continue
            price = price or gain
            stuck.add(item)
        return price, chosen

    def _steps(self) -> tuple[list[tuple[float, int, int]], "NDArray[np.int64]"]:
        """Every step along the items' lower convex hulls (loss saved a byte, item, option), the best first; and where
        they begin."""
        steps = []
        start = np.zeros(len(self._items), np.int64)
        for item, (sizes, losses) in enumerate(zip(self.sizes.tolist(), self.losses.tolist(), strict=True)):
            hull = _hull(sizes, losses)
            start[item] = hull[0]
            for before, after in pairwise(hull):
                gain = (losses[before] - losses[after]) / (sizes[after] - sizes[before])
                steps.append((gain, item, after))
        steps.sort(
            key=lambda step: -step[0]
        )  # stable: along a hull gains fall, and equal ones keep their order
        return steps, start

    def improve(
        self, chosen: "NDArray[np.int64]", price: float, bound: float, states: int
    ) -> "NDArray[np.int64] | None":
        """The best choice; None where too many states would be needed to find it.

        A choice loses bound + (the regrets of its options) + price * (bytes left), so within the gap no other counts.
        """
        priced = self.losses + price * self.sizes
        rounding = _EPSILON * (float(priced.min(axis=1).sum()) + price * self.budget)
        gap = max(0.0, self.loss(chosen) - bound) + rounding
        best = priced.argmin(axis=1)
        regret = priced - priced[self._items, best][:, None]
        room = self.budget - self.bytes(best)
        open_items = [item for item in range(len(best)) if (regret[item] <= gap).sum() > 1]
        open_items.sort(key=lambda item: (np.partition(regret[item], 1)[1], item))
        extra = np.where(regret <= gap, self.sizes - self.sizes[self._items, best][:, None], 0)
        # What the items to come can still free; a state beyond it can no longer fit.
        frees = np.cumsum([0, *(-extra[item].min() for item in reversed(open_items))])[::-1]
        used, cost = np.zeros(1, np.int64), np.zeros(1)
        trail = []
        total = 0
        for item, later in zip(open_items, frees[1:], strict=True):
            options = np.flatnonzero(regret[item] <= gap)
            all_used = (used[None, :] + extra[item, options][:, None]).ravel()
            all_cost = (cost[None, :] + regret[item, options][:, None]).ravel()
            kept = _undominated(all_used, all_cost, price, all_used <= room + later, gap)
            total += len(kept)
            if total > states:
                return None
            trail.append(
                (item, options[kept // len(used)].astype(np.int8), (kept % len(used)).astype(np.int32))
            )
            used, cost = all_used[kept], all_cost[kept]
        result: NDArray[np.int64] = best.copy()
        state = int(np.argmin(cost + price * (room - used)))
        for item, option, before in reversed(trail):
            result[item] = option[state]
            state = int(before[state])
        return result


def _undominated(
    used: "NDArray[np.int64]",
    cost: "NDArray[np.float64]",
    price: float,
    fits: "NDArray[np.bool_]",
    gap: float,
) -> "NDArray[np.int64]":
    """Indices, by bytes used, of the states that may lead to the best: none other uses and loses less."""
    kept: NDArray[np.int64] = np.flatnonzero(fits & (cost <= gap))
    loss = cost[kept] - price * used[kept]
    order = np.lexsort((kept, loss, used[kept]))
    least = np.minimum.accumulate(loss[order])
    better = np.r_[True, loss[order][1:] < least[:-1]]
    result: NDArray[np.int64] = kept[order[better]]
    return result


def _hull(sizes: list[int], losses: list[float]) -> list[int]:
    """The options on the lower convex hull, by size."""
    hull: list[int] = []
    for option in sorted(range(len(sizes)), key=lambda i: (sizes[i], losses[i], i)):
        if losses[option] == np.inf or (hull and losses[option] >= losses[hull[-1]]):
            continue  # the smaller one is as good
        while len(hull) > 1 and _above(hull[-2], hull[-1], option, sizes, losses):
            hull.pop()
        if hull and sizes[hull[-1]] == sizes[option]:
            continue
        hull.append(option)
    return hull


def _above(a: int, b: int, c: int, sizes: list[int], losses: list[float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (losses[a] - losses[b]) * (sizes[c] - sizes[a]) <= (losses[a] - losses[c]) * (sizes[b] - sizes[a])
