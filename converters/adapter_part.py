"""What an adapter adds to one matrix of a bundle."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgert.errors import InvalidArgumentError

from .stored_values import as_floats

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float32]

_NATIVE_TYPES = {"f4": "f32", "f2": "f16", "u2": "bf16"}


@dataclass
class Part:
    """What an adapter adds to one matrix of a bundle: see native/src/adapters/adapter.h. Factors and weights are f32, f16
    or, as uint16, bf16; the other numbers f32."""

    target: str
    a: "NDArray[Any] | None" = None  # [rank, cols]
    b: "NDArray[Any] | None" = None  # [rows, rank], of the same type
    scale: float = 1.0  # of B A
    rows: "NDArray[numpy.int32] | None" = None
    cols: "NDArray[numpy.int32] | None" = None
    values: "Array | None" = None
    remainders: "NDArray[numpy.int8] | None" = None  # of the base's codes there, see remainders.py
    patch_error: "Array | None" = None  # [2], of a patch at scale 1: apart and beside, see patch.h
    gain: "Array | None" = None  # [rows]
    gain_spares_bias: bool = False
    shift: "Array | None" = None  # [rows]
    weights: "NDArray[Any] | None" = None  # [n, cols], in place of the matrix' own
    weight_rows: "NDArray[numpy.int32] | None" = None  # [n], ascending; None: all
    gate: "Array | None" = None  # [cols], of a mixture in which tokens choose

    def sizes(self) -> dict[str, Any]:
        return {
            "rank": 0 if self.a is None else self.a.shape[0],
            "values": 0 if self.values is None else self.values.size,
            "gain": self.gain is not None,
            "shift": self.shift is not None,
            "weights": 0 if self.weights is None else self.weights.shape[0],
        }

    def arrays(self) -> "list[NDArray[Any]]":
        arrays = (
            self.a,
            self.b,
            self.rows,
            self.cols,
            self.values,
            self.gain,
            self.shift,
            self.weights,
            self.gate,
        )
        return [array for array in arrays if array is not None]

    @property
    def is_shift(self) -> bool:
        others = (self.a, self.values, self.gain, self.weights)
        return self.shift is not None and all(array is None for array in others)

    @property
    def is_sparse(self) -> bool:
        others = (self.a, self.gain, self.shift, self.weights, self.gate)
        return self.values is not None and all(array is None for array in others)

    @property
    def is_weights(self) -> bool:
        others = (self.a, self.values, self.gain, self.shift)
        return self.weights is not None and all(array is None for array in others)

    def widen(self) -> None:
        """Factors and weights as f32, where they are not of one type."""
        stored = {array.dtype for array in (self.a, self.b, self.weights) if array is not None}
        if len(stored) > 1:
            self.a, self.b, self.weights = (
                None if array is None else as_floats(array) for array in (self.a, self.b, self.weights)
            )

    def factors(self) -> "tuple[Array, Array] | None":
        """A and B as f32, the scale in B."""
        import numpy as np

        if self.a is None or self.b is None:
            return None
        return as_floats(self.a), as_floats(self.b) * np.float32(self.scale)

    def native(self) -> dict[str, Any]:
        """As _native.Adapter takes it."""
        import numpy as np

        out: dict[str, Any] = {"target": self.target, "gain_spares_bias": self.gain_spares_bias}
        stored = {"a": self.a, "b": self.b, "weights": self.weights}
        for name, array in stored.items():
            if array is not None:
                out[name] = np.ascontiguousarray(array)
                out["dtype"] = _NATIVE_TYPES[array.dtype.str.lstrip("<=")]
        floats = {"values": self.values, "gain": self.gain, "shift": self.shift, "gate": self.gate}
        whole = {"rows": self.rows, "cols": self.cols, "weight_rows": self.weight_rows}
        for arrays, dtype in ((floats, np.float32), (whole, np.int32)):
            out |= {
                name: np.ascontiguousarray(array, dtype)
                for name, array in arrays.items()
                if array is not None
            }
        if self.a is not None:
            out |= {"rank": self.a.shape[0], "scale": self.scale}
        if self.remainders is not None:
            out["remainders"] = np.ascontiguousarray(self.remainders, np.int8)
        return out

    def sort(self) -> None:
        """Sparse values in the order of packed codes, in which they load fastest."""
        import numpy as np

        if self.rows is None or self.cols is None or self.values is None:
            return
        rows, cols = self.rows.astype(np.int64), self.cols.astype(np.int64)
        places = (rows // 16 << 32) + cols * 16 + rows % 16
        if (np.diff(places) > 0).all():
            return
        order = np.argsort(places, kind="stable")
        twice = np.flatnonzero(np.diff(places[order]) == 0)
        if len(twice):
            at = order[twice[0]]
            raise InvalidArgumentError(
                f"{self.target}: two values stand at {[int(rows[at]), int(cols[at])]}; they must be summed"
            )
        self.rows, self.cols, self.values = self.rows[order], self.cols[order], self.values[order]
        if self.remainders is not None:
            self.remainders = self.remainders[order]
