"""An adapter as signs, and what that costs: its size, and how far what it adds is from what it was."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgert.errors import InvalidArgumentError

from .adapter_part import Part
from .adapter_shapes import Shapes
from .signs import Coded, decode, encode
from .stored_values import as_floats

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float32]


@dataclass(frozen=True)
class Compressed:
    """`parts` with their scales fitted; `signs` stand in the place of arrays of theirs in the file. `error`: the length of the
    difference of what is added to all matrices, over that of what was."""

    parts: list[Part]
    signs: dict[str, Coded]
    error: float


def compress(
    parts: Sequence[Part], density: float, manifest: Mapping[str, Any], added_rows: int = 0
) -> Compressed:
    """Factors and sparse values as signs of the share `density` of their largest values; the rest stays as it is, and so do
    factors of a matrix that is given weights, which a file has in their type.

    `added_rows`: of the vocabulary. Raises InvalidArgumentError for a density outside 0 to 1.
    """
    if not 0 < density <= 1:
        raise InvalidArgumentError(f"compress: found {density}, allowed is a share up to 1")
    signs: dict[str, Coded] = {}
    fitted, error, whole, shapes = [], 0.0, 0.0, Shapes(manifest, added_rows)
    for part in parts:
        own = replace(part)
        if part.a is not None and part.weights is None:  # which would be of its factors' type
            lost, length = _factors(own, density, signs)
            error, whole = error + lost, whole + length
        if part.values is not None:
            lost, length = _sparse(own, density, shapes.of(part.target), signs)
            error, whole = error + lost, whole + length
        fitted.append(own)
    return Compressed(fitted, signs, math.sqrt(max(error, 0.0) / whole) if whole else 0.0)


def _factors(part: Part, density: float, signs: dict[str, Coded]) -> tuple[float, float]:
    """The squared error and length of B A, after fitting its scale to the signs."""
    import numpy as np

    assert part.a is not None and part.b is not None
    before = (as_floats(part.a), as_floats(part.b))
    after = []
    for name, array in zip(("lora_A", "lora_B"), before, strict=True):
        coded = encode(array.reshape(-1), np.arange(array.size), (array.shape[0], array.shape[1]), density)
        signs[f"{part.target}.{name}"] = coded
        places, ones = decode(coded.header, np.frombuffer(coded.data, np.uint8), part.target)
        approximate = np.zeros(array.size, np.float32)
        approximate[places] = ones * np.float32(coded.header.value)
        after.append(approximate.reshape(array.shape))
    length, common, own = (_product(*pair) for pair in ((before, before), (before, after), (after, after)))
    fit = common / own if own else 0.0
    scale = part.scale
    part.scale *= fit
    return scale**2 * (length - fit * common), scale**2 * length


def _product(one: "Sequence[Array]", other: "Sequence[Array]") -> float:
    """The scalar product of B A and B' A'."""
    import numpy as np

    (a, b), (a2, b2) = one, other
    return float(np.sum((b.T.astype(np.float64) @ b2) * (a.astype(np.float64) @ a2.T)))


def _sparse(
    part: Part, density: float, shape: tuple[int, int], signs: dict[str, Coded]
) -> tuple[float, float]:
    import numpy as np

    assert part.rows is not None and part.cols is not None and part.values is not None
    places = part.rows.astype(np.int64) * shape[1] + part.cols
    order = np.argsort(places)
    values = part.values[order]
    coded = encode(values, places[order], shape, density)
    signs[f"{part.target}.shira_signs"] = coded
    part.rows = part.cols = part.values = part.remainders = part.patch_error = None
    length = float(np.sum(values.astype(np.float64) ** 2))
    return length - coded.header.count * coded.header.value**2, length
