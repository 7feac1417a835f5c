"""Merging what several adapters change into one sparse change: TIES (arXiv 2306.01708), DARE (2311.03099) and model
breadcrumbs (2312.06795), matrix by matrix.

All three thin each adapter out first, because what is left then seldom meets. `density` is the share that stays of the values
that an adapter has in a matrix: of low rank these are all of the matrix, of a sparse one its own.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgert.errors import InvalidArgumentError, UnsupportedError

from .adapter_part import Part
from .fuse import check_fused

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float32]

METHODS = ("sum", "ties", "dare", "breadcrumbs")


@dataclass(frozen=True)
class Thinning:
    """`outliers`: of breadcrumbs, the share of the largest values that goes as well; `seed`: of DARE's choice."""

    method: str
    density: float = 0.2
    outliers: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidArgumentError(f"method: found {self.method!r:.40}, allowed are {', '.join(METHODS)}")
        for name in ("density", "outliers"):
            share = getattr(self, name)
            if not 0 <= share <= 1 or (name == "density" and share == 0):
                raise InvalidArgumentError(f"{name}: found {share}, allowed is a share up to 1")
        if self.seed < 0:
            raise InvalidArgumentError(f"seed: found {self.seed}, allowed is 0 or more")

    def thin(self, values: "Array", number: int, target: str) -> "Array":
        """`values` of one adapter's matrix with some of them 0; `number` and `target` tell the draws apart."""
        import numpy as np

        if self.method == "dare":
            random = np.random.default_rng([self.seed, number, zlib.crc32(target.encode())])
            kept = random.random(values.size) < self.density
            return np.where(kept, values / np.float32(self.density), np.float32(0))
        kept = largest(values, self.density)
        if self.method == "breadcrumbs":
            kept = largest(values, self.density + self.outliers) & ~largest(values, self.outliers)
        return np.where(kept, values, np.float32(0))


def largest(values: "Array", share: float) -> "NDArray[numpy.bool_]":
    """Which are the share of `values` that is largest in magnitude; of equal ones the first."""
    import numpy as np

    count = min(int(share * values.size), values.size)
    if count == 0:
        return np.zeros(values.size, bool)
    magnitude = np.abs(values)
    least = np.partition(magnitude, values.size - count)[values.size - count]
    kept: NDArray[numpy.bool_] = magnitude > least
    equal = np.flatnonzero(magnitude == least)
    kept[equal[: count - np.count_nonzero(kept)]] = True
    return kept


def merge(adapters: Sequence[tuple[Sequence[Part], float]], thinning: Thinning) -> list[Part]:
    """One sparse adapter of these, each with its scale. Raises UnsupportedError by name for what is no plain difference."""
    by_target: dict[str, list[tuple[int, Part, float]]] = {}
    for number, (parts, scale) in enumerate(adapters):
        for part in parts:
            if part.gain is not None or part.weights is not None or part.shift is not None:
                raise UnsupportedError(
                    f"{part.target}: {thinning.method} merges LoRA and sparse differences; gains, biases, norms and weights in place of "
                    "the base's are not merged by this version"
                )
            by_target.setdefault(part.target, []).append((number, part, scale))
    merged = [_merged(target, of_target, thinning) for target, of_target in sorted(by_target.items())]
    for part in merged:
        check_fused(part)
    return merged


def _merged(target: str, parts: list[tuple[int, Part, float]], thinning: Thinning) -> Part:
    import numpy as np

    shape = _shape([part for _, part, _ in parts])
    thinned = []
    for number, part, _ in parts:
        values, places = _difference(part, shape)
        values = thinning.thin(values, number, target)
        thinned.append((values, places))
    size = shape[0] * shape[1]
    total, count, sign = np.zeros(size, np.float32), np.zeros(size, np.float32), np.zeros(size, np.float32)
    if thinning.method == "ties":  # the sign that has more behind it
        for values, places in thinned:
            sign[places] += values
        sign = np.where(sign >= 0, np.float32(1), np.float32(-1))
    for (values, places), (_, _, scale) in zip(thinned, parts, strict=True):
        if thinning.method == "ties":
            agrees = np.sign(values) == sign[places]
            count[places] += agrees
            total[places] += np.where(agrees, values, np.float32(0)) * np.float32(scale)
        else:
            total[places] += values * np.float32(scale)
    if thinning.method == "ties":  # the mean of those that agree
        total /= np.maximum(count, 1)
    places = np.flatnonzero(total)
    rows, cols = np.divmod(places, shape[1])
    return Part(target, rows=rows.astype(np.int32), cols=cols.astype(np.int32), values=total[places])


def _shape(parts: list[Part]) -> tuple[int, int]:
    """Of the matrix, as far as the parts reach."""
    rows, cols = 0, 0
    for part in parts:
        if part.a is not None and part.b is not None:
            rows, cols = max(rows, part.b.shape[0]), max(cols, part.a.shape[1])
        if part.rows is not None and part.cols is not None:
            rows = max(rows, int(part.rows.max(initial=-1)) + 1)
            cols = max(cols, int(part.cols.max(initial=-1)) + 1)
    return rows, cols


def _difference(part: Part, shape: tuple[int, int]) -> "tuple[Array, Any]":
    """What a part adds to the matrix: values, and where they stand in it, flat."""
    import numpy as np

    factors = part.factors()
    sparse = None
    if part.values is not None and part.rows is not None and part.cols is not None:
        sparse = part.rows.astype(np.int64) * shape[1] + part.cols
    if factors is None:
        assert sparse is not None and part.values is not None
        return part.values, sparse
    dense = np.zeros(shape, np.float32)
    a, b = factors
    dense[: b.shape[0], : a.shape[1]] = b @ a
    flat = dense.reshape(-1)
    if sparse is not None:
        flat[sparse] += part.values
    return flat, slice(None)
