"""What a store of experts would read under each eviction policy, beside the least that any could.

The simulation is the engine's own policies and accounting without storage; prefetch is left out. The optimum is Belady's:
what is needed again last goes. It is exact where experts weigh the same; where they do not, finding the best is a knapsack
problem and the same order stands for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgert import _native

OPTIMUM = "optimum"
Step = Sequence[Sequence[int]]  # the distinct experts that a step uses, by MoE layer


@dataclass(frozen=True)
class Counts:
    """Of the steps that count."""

    hits: int
    misses: int
    bytes: int  # read

    @property
    def hit_rate(self) -> float:
        """1 where nothing was asked for."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0


def policies() -> tuple[str, ...]:
    """The words of the knob `eviction`."""
    return next(tuple(knob["choices"]) for knob in _native.knobs() if knob["name"] == "eviction")


def replay(
    sizes: Sequence[Sequence[int]],
    capacity_bytes: int,
    steps: Sequence[Step],
    counted: Sequence[bool] | None = None,
    eviction: str = OPTIMUM,
) -> list[Counts]:
    """Run `steps` one after the other, from empty slots; one Counts for each of them that is `counted` (all by default).

    `sizes` are bytes of each expert by MoE layer. Raises InvalidArgumentError for steps of another model and an unknown
    policy.
    """
    if eviction == OPTIMUM:
        store = _native.StoreSimulation(sizes, capacity_bytes, future=steps)
    else:
        store = _native.StoreSimulation(sizes, capacity_bytes, eviction)
    results = []
    for step, counts in zip(steps, counted or [True] * len(steps), strict=True):
        result = store.run([step])
        if counts:
            results.append(Counts(result["hits"], result["misses"], result["bytes"]))
    return results


def total(counts: Sequence[Counts]) -> Counts:
    return Counts(
        sum(one.hits for one in counts), sum(one.misses for one in counts), sum(one.bytes for one in counts)
    )


def compare(
    sizes: Sequence[Sequence[int]], capacity_bytes: int, steps: Sequence[Step], counted: Sequence[bool]
) -> Mapping[str, Counts]:
    """Of the `counted` steps, by policy; see replay()."""
    return {
        name: total(replay(sizes, capacity_bytes, steps, counted, name)) for name in (*policies(), OPTIMUM)
    }
