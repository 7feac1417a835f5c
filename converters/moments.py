"""Which second moments weigh the errors of which matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from edgert import _native

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


# How much the rows of a tied embedding count beside what it gives as the output head, by the mean of the diagonal. On
# docs-moe between 0.1 and 1 is the least KL divergence, 6 % below that of the head alone at 3 bits.
_ROWS_SHARE = 0.3


class Measured(Protocol):
    """What of a calibration packing needs (see edgert.calibration): f32 [n, n], or [n] where only the diagonal is known.
    MoE layers are counted from 0 among MoE layers."""

    def input_moments(self, m: int, expert: int) -> "Floats": ...
    def inner_moments(self, m: int, expert: int) -> "Floats": ...
    def dense_moments(self, name: str) -> "Floats | None": ...


@dataclass(frozen=True, slots=True)
class InputMoments:
    """Second moments of a matrix's inputs, read when the matrix is packed. Those of equal names are equal."""

    name: str
    read: Callable[[], "Floats | None"]


class MomentsOf:
    """Finds the moments of every matrix of one model."""

    def __init__(self, measured: Measured, recipe: dict[str, Any]) -> None:
        self._measured = measured
        kinds = [recipe["blocks"][block]["ffn"]["kind"] for block in recipe["layers"]]
        moe = [layer for layer, kind in enumerate(kinds) if kind == "moe"]
        self._moe = {layer: m for m, layer in enumerate(moe)}
        self._tied = bool(recipe["output"]["tied"])

    def dense(self, name: str) -> InputMoments:
        """A tied embedding is packed for what it does as the output head and, some, for its rows, which inputs pick."""
        if name == "embedding" and self._tied:
            return InputMoments(name, self._tied_embedding)
        return InputMoments(name, partial(self._measured.dense_moments, name))

    def _tied_embedding(self) -> "Floats | None":
        import numpy as np

        moments = self._measured.dense_moments("output")
        if moments is None:
            return None
        squares = moments if moments.ndim == 1 else np.diagonal(moments)
        rows = np.full(squares.shape, _ROWS_SHARE * squares.mean(), np.float32)
        return moments + (rows if moments.ndim == 1 else np.diag(rows))

    def expert(self, layer: int, expert: int) -> tuple[InputMoments, InputMoments, InputMoments]:
        """Of gate, up and down."""
        m, name = self._moe[layer], f"layers.{layer}.experts.{expert}"
        inputs = InputMoments(f"{name}.input", partial(self._measured.input_moments, m, expert))
        inner = InputMoments(f"{name}.inner", partial(self._measured.inner_moments, m, expert))
        return inputs, inputs, inner


class Factorised:
    """The moments of the last matrix as packing wants them; gate and up, which share theirs, take them in turn."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._moments: _native.Moments | None = None

    def __call__(self, inputs: InputMoments | None, cols: int) -> "_native.Moments | None":
        """Raises InvalidArgumentError for what are no moments of vectors of `cols`."""
        if inputs is None:
            return None
        if inputs.name != self._name:
            self._moments = None  # not two of them at a time
            values = inputs.read()
            self._moments = None if values is None else _native.Moments(values.data, cols)
            self._name = inputs.name
        return self._moments
