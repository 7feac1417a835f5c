"""Which format every matrix of every routed expert gets, under a number of bytes or as few as a measured loss allows.

Three ways, each a ladder of allocations from the smallest to the largest:

  knapsack   every matrix by itself: the least predicted error of all choices that fit (knapsack.py)
  uniform    all matrices alike
  edgemoe    all experts in int2, then one after the other in int4, then in int8, the most important first
             (arXiv 2308.14352); importance is the loss measured with this expert in int2 and all others in int4
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from edgert.errors import InvalidArgumentError

from .expert_errors import PROJECTIONS, ErrorTable
from .formats import Chosen
from .knapsack import choose

EDGEMOE_FORMATS = ("int2", "int4", "int8")
_RUNGS_A_BIT = 16

Loss = Callable[[Chosen], float]  # measured: perplexity over the unquantised model's, less 1


@dataclass(frozen=True)
class Allocation:
    """`chosen` takes `bytes` (packed, scales and padding of tiles included; the bundle's alignment is not) and `bits` a
    weight; `error` is predicted; no choice of as many bytes has a smaller one than `bound`."""

    chosen: Chosen
    bytes: int
    bits: float
    error: float
    bound: float


class Ladder(Protocol):
    """Allocations by rising bytes."""

    def __len__(self) -> int: ...
    def __getitem__(self, rung: int) -> Allocation: ...


class Knapsack:
    """Rungs are sixteenths of a bit."""

    def __init__(self, table: ErrorTable) -> None:
        self._table = table
        self._smallest, self._largest = extremes(table)

    def __len__(self) -> int:
        return 1 + math.ceil((self._bits(self._largest) - self._bits(self._smallest)) * _RUNGS_A_BIT)

    def __getitem__(self, rung: int) -> Allocation:
        weights = int(self._table.weights.sum())
        return self.within(min(self._largest, self._smallest + rung * weights // (8 * _RUNGS_A_BIT)))

    def within(self, budget: int) -> Allocation:
        """The best of at most `budget` bytes."""
        experts, projections, formats = self._table.errors.shape
        flat = experts * projections
        possible = np.isfinite(self._table.errors).reshape(flat, formats)
        columns = [np.flatnonzero(row) for row in possible]
        sizes, errors = self._table.sizes.reshape(flat, formats), self._table.errors.reshape(flat, formats)
        choice = choose(
            [row[some].tolist() for row, some in zip(sizes, columns, strict=True)],
            [row[some].tolist() for row, some in zip(errors, columns, strict=True)],
            budget,
        )
        picked = [int(some[option]) for some, option in zip(columns, choice.options, strict=True)]
        result = allocation(self._table, np.array(picked).reshape(experts, projections))
        return Allocation(result.chosen, result.bytes, result.bits, result.error, choice.bound)

    def _bits(self, size: int) -> float:
        return 8 * size / int(self._table.weights.sum())


class Uniform:
    """Rungs are the formats that every matrix can have, without those that others beat in bytes and in error."""

    def __init__(self, table: ErrorTable) -> None:
        everywhere = np.flatnonzero(np.isfinite(table.errors).all(axis=(0, 1)))
        rows = [allocation(table, np.full(table.errors.shape[:2], number)) for number in everywhere]
        rows.sort(key=lambda row: (row.bytes, row.error))
        self._rungs: list[Allocation] = []
        for row in rows:
            if not self._rungs or row.error < self._rungs[-1].error:
                self._rungs.append(row)

    def __len__(self) -> int:
        return len(self._rungs)

    def __getitem__(self, rung: int) -> Allocation:
        return self._rungs[rung]


class EdgeMoe:
    """`loss` measures an allocation; it is asked once for each expert, `progress(done, total)` in between."""

    def __init__(
        self, table: ErrorTable, loss: Loss, progress: Callable[[int, int], None] | None = None
    ) -> None:
        missing = [name for name in EDGEMOE_FORMATS if name not in table.formats]
        if missing:
            raise InvalidArgumentError(
                f"allocation: edgemoe chooses among {', '.join(EDGEMOE_FORMATS)}; {missing[0]} is not a candidate"
            )
        self._table = table
        self._loss = loss
        self._progress = progress
        self._formats = [table.formats.index(name) for name in EDGEMOE_FORMATS]

    def __len__(self) -> int:
        return 1 + 2 * len(self._table.experts)

    def __getitem__(self, rung: int) -> Allocation:
        experts = len(self._table.experts)
        step = min(1, rung // experts)  # from int2 to int4, or from int4 to int8
        numbers = np.full(experts, self._formats[step])
        numbers[self._order[: rung - step * experts]] = self._formats[step + 1]
        return self._of(numbers)

    @cached_property
    def _order(self) -> "Sequence[int]":
        """Experts by falling importance."""
        experts = len(self._table.experts)
        losses = []
        for expert in range(experts):
            numbers = np.full(experts, self._formats[1])
            numbers[expert] = self._formats[0]
            losses.append(self._loss(self._of(numbers).chosen))
            if self._progress is not None:
                self._progress(expert + 1, experts)
        return sorted(range(experts), key=lambda expert: (-losses[expert], expert))

    def _of(self, numbers: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> Allocation:
        return allocation(self._table, np.repeat(numbers[:, None], len(PROJECTIONS), axis=1))


def allocation(table: ErrorTable, numbers: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> Allocation:
    """`numbers` [experts, 3]: indices of the table's formats."""
    names = [[table.formats[number] for number in row] for row in numbers]
    size = int(np.take_along_axis(table.sizes, numbers[:, :, None], axis=2).sum())
    error = math.fsum(np.take_along_axis(table.errors, numbers[:, :, None], axis=2).ravel())
    return Allocation(
        {expert: (gate, up, down) for expert, (gate, up, down) in zip(table.experts, names, strict=True)},
        size,
        8 * size / int(table.weights.sum()),
        error,
        0.0,
    )


def extremes(table: ErrorTable) -> tuple[int, int]:
    """Bytes of the smallest allocation, and of the smallest that none is better than."""
    possible = np.isfinite(table.errors)
    smallest = np.where(possible, table.sizes, np.iinfo(np.int64).max).min(axis=2)
    best = table.errors == table.errors.min(axis=2, keepdims=True)
    largest = np.where(best, table.sizes, np.iinfo(np.int64).max).min(axis=2)
    return int(smallest.sum()), int(largest.sum())


def budget_bytes(table: ErrorTable, bits: float) -> int:
    """Raises InvalidArgumentError for less than the least and more than the most, with what is possible."""
    weights = int(table.weights.sum())
    smallest, largest = (8 * size / weights for size in extremes(table))
    if not smallest <= bits <= largest:  # NaN too
        raise InvalidArgumentError(
            f"expert_bits: {bits:g}; the experts of this model take {_up(smallest):.3f} to {largest:.3f} bits a weight in "
            f"the formats {', '.join(table.formats)}"
        )
    return min(int(bits * weights / 8), extremes(table)[1])


def largest_within(ladder: Ladder, budget: int) -> Allocation:
    """Raises InvalidArgumentError where not even the first rung fits."""
    if isinstance(ladder, Knapsack):
        return ladder.within(budget)
    if ladder[0].bytes > budget:
        raise InvalidArgumentError(
            f"expert_bits: {budget} bytes; the smallest allocation of this kind takes {ladder[0].bytes}, "
            f"{ladder[0].bits:.3f} bits a weight"
        )
    low, high = 0, len(ladder)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ladder[middle].bytes <= budget else (low, middle)
    return ladder[low]


def smallest_within_loss(
    ladder: Ladder, loss: Loss, most: float, tell: Callable[[Allocation, float], None]
) -> Allocation:
    """The first rung that loses at most `most`, by halves: losses are taken to fall along the ladder. `tell` hears of
    every rung that is measured. Raises InvalidArgumentError where even the last one loses more."""

    def passes(rung: int) -> bool:
        row = ladder[rung]
        lost = loss(row.chosen)
        tell(row, lost)
        if lost > most and rung == len(ladder) - 1:
            raise InvalidArgumentError(
                f"max_loss: {most:.2%}; with {row.bits:.3f} bits a weight of the experts, the most there are, the model "
                f"loses {lost:.2%}: allow more, or give the other weights a better format"
            )
        return lost <= most

    low, high = -1, len(ladder) - 1
    passes(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return ladder[high]


def _up(value: float) -> float:
    """To three digits, so that what is printed can be asked for."""
    return math.ceil(value * 1000) / 1000
