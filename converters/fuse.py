"""Several adapters as one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgert.errors import InvalidArgumentError, UnsupportedError

from .adapter_part import Part
from .peft_reader import MAX_RANK

if TYPE_CHECKING:
    from numpy.typing import NDArray


def fuse(adapters: Sequence[tuple[Sequence[Part], float]]) -> list[Part]:
    """The parts of one adapter that adds what all of these add, each times its scale: factors side by side, sparse values
    summed where they meet, gains multiplied, shifts added.

    Raises UnsupportedError by name for what does not fuse, InvalidArgumentError for scales beyond reason.
    """
    fused: dict[str, Part] = {}
    for parts, scale in adapters:
        for part in parts:
            into = fused.setdefault(part.target, Part(part.target))
            _add_factors(into, part, scale)
            _add_sparse(into, part, scale)
            _add_gain(into, part, scale)
            _add_shift(into, part, scale)
            _add_weights(into, part, scale)
    for part in fused.values():
        check_fused(part)
        part.widen()  # factors are f32 now
    return list(fused.values())


def _alike(one: "NDArray[Any]", other: "NDArray[Any]") -> "list[NDArray[Any]]":
    """Both with as many rows: one may have those of added tokens, which the other leaves alone."""
    import numpy as np

    rows = max(len(one), len(other))
    return [np.pad(array, [(0, rows - len(array)), *[(0, 0)] * (array.ndim - 1)]) for array in (one, other)]


def check_fused(part: Part) -> None:
    """Raises UnsupportedError and InvalidArgumentError for numbers that nobody could read again."""
    import numpy as np

    if part.a is not None and len(part.a) > MAX_RANK:
        raise UnsupportedError(
            f"{part.target}: fused, its rank is {len(part.a)}; at most {MAX_RANK} is allowed (the other methods make sparse values)"
        )
    for array in (part.b, part.values, part.gain, part.shift):
        if array is not None and not np.isfinite(array).all():
            raise InvalidArgumentError(f"{part.target}: fused at these scales, its numbers are not finite")


def _add_factors(into: Part, part: Part, scale: float) -> None:
    import numpy as np

    factors = part.factors()
    if factors is None:
        return
    a, b = factors[0], factors[1] * np.float32(scale)
    into.a = a if into.a is None else np.concatenate([into.a, a], axis=0)
    into.b = b if into.b is None else np.concatenate(_alike(into.b, b), axis=1)


def _add_sparse(into: Part, part: Part, scale: float) -> None:
    import numpy as np

    if part.rows is None or part.cols is None or part.values is None:
        return
    rows, cols = part.rows.astype(np.int64), part.cols.astype(np.int64)
    values, remainders = part.values * np.float32(scale), part.remainders
    if into.rows is not None and into.cols is not None and into.values is not None:
        rows, cols = np.concatenate([into.rows, rows]), np.concatenate([into.cols, cols])
        values = np.concatenate([into.values, values])
        if into.remainders is None or remainders is None:
            remainders = None
        else:
            remainders = np.concatenate([into.remainders, remainders])
    places, first, index = np.unique(rows << 32 | cols, return_index=True, return_inverse=True)
    into.rows, into.cols = (places >> 32).astype(np.int32), (places & 0xFFFFFFFF).astype(np.int32)
    into.values = np.bincount(index, weights=values).astype(np.float32)
    into.remainders = None if remainders is None else remainders[first]  # all of a place are the same


def _add_gain(into: Part, part: Part, scale: float) -> None:
    import numpy as np

    if part.gain is None:
        return
    factor = 1 + part.gain * np.float32(scale)
    if into.gain is not None:
        more, before = _alike(part.gain, into.gain)
        factor, into.gain = 1 + more * np.float32(scale), before
        if into.gain_spares_bias != part.gain_spares_bias:
            raise UnsupportedError(
                f"{part.target}: the gains of DoRA and IA3 do not fuse: one leaves the bias out"
            )
        factor = factor * (1 + into.gain)
    into.gain = (factor - 1).astype(np.float32)
    into.gain_spares_bias = part.gain_spares_bias


def _add_shift(into: Part, part: Part, scale: float) -> None:
    import numpy as np

    if part.shift is not None:
        shift = part.shift * np.float32(scale)
        into.shift = shift if into.shift is None else np.add(*_alike(into.shift, shift))


def _add_weights(into: Part, part: Part, scale: float) -> None:
    if part.weights is None:
        return
    if into.weights is not None or scale != 1:
        raise UnsupportedError(
            f"{part.target}: weights in place of the base's are fused at a scale of 1, and of one adapter alone"
        )
    into.weights, into.weight_rows = part.weights, part.weight_rows
