"""What routed experts would lose in each weight format: the predicted error of the model's MoE layers.

An error of the weights becomes one of the expert's output y = down h, h = act(gate x, up x), by its first-order effect.
With M the second moments of x, N those of h, and e the error of one row of a matrix after packing:

  down    |dy|^2 = sum over rows of e N e^T
  gate    |dy|^2 = sum over rows i of |down's column i|^2 * mean((dh_i / dg_i)^2) * e M e^T
  up      likewise with dh_i / du_i

Errors of two rows of gate are taken as independent, and the derivatives are averaged apart from x. Their mean squares follow
from M: the pair (g_i, u_i) is taken as normal with the second moments that M gives it. The predicted error of an expert's
matrix is |dy|^2 * (share of tokens that use the expert) * (mean square of its gate weight), which is what the layer's output
is off, over the mean square length of the hidden state behind the layer: the same error does less harm where that is longer.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert import _native
from edgert.errors import CancelledError

from .decoder import Decoder, Expert, Source
from .formats import candidates
from .pack import TILE_ROWS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgert.calibration import Calibration

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

PROJECTIONS = ("gate", "up", "down")
# An expert counts as if so many more tokens had been routed, to all experts alike: one that no token of the calibration used
# is rare, not useless. Its gate weight is the layer's mean, its moments are the calibration's blend (see Calibration).
PRIOR_TOKENS = 256
# Of a matrix at most: rows are packed apart from one another, and 256 of them tell how they fare.
_SAMPLED_TILES = 16
_NODES = 9  # of the quadrature, in each of two directions
_STEP = 1e-4  # of the slopes


@dataclass(frozen=True)
class ErrorTable:
    """By expert, projection (gate, up, down) and format: packed bytes, the predicted error, and the squared error of the
    weights; the error is infinite where a matrix cannot have the format. `importance` by expert: share * gate weight^2."""

    experts: tuple[tuple[int, int], ...]  # layer and index, in the order of the bundle
    formats: tuple[str, ...]
    weights: "NDArray[np.int64]"  # [experts, 3]: how many
    sizes: "NDArray[np.int64]"  # [experts, 3, formats]
    errors: "Doubles"  # likewise
    squared_errors: "Doubles"  # likewise
    squared_weights: "Doubles"  # [experts, 3]
    importance: "Doubles"  # [experts]
    tokens: "NDArray[np.int64]"  # [experts]: that used it in the calibration


def measure(
    decoder: Decoder,
    calibration: "Calibration",
    formats: Sequence[str],
    groups: Sequence[Sequence[int]] | Iterator[Sequence[int]],
    *,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> ErrorTable:
    """Pack every matrix of every expert in each of `formats`, and in the one it is stored in, and weigh what is lost.

    `groups`: indices of experts to read together. Holds a sample of an expert's rows, and its moments, a thread. Equal inputs give equal tables, whatever
    the threads: errors are rounded to nine digits, beyond which sums depend on the machine.
    """
    stored = {source.tensor.stored_format for expert in decoder.experts for source in expert.sources}
    names = (*formats, *sorted(name for name in stored if name is not None and name not in formats))
    moe = {row.layer: m for m, row in enumerate(calibration.model.moe)}
    shape = (len(decoder.experts), len(PROJECTIONS), len(names))
    sizes, errors, squared = np.zeros(shape, np.int64), np.full(shape, np.inf), np.zeros(shape)
    total = sum(source.bytes for expert in decoder.experts for source in expert.sources)
    done = 0
    stop = threading.Event()

    def measured(index: int) -> tuple[int, "_Measured"]:
        expert = decoder.experts[index]
        ffn = decoder.recipe["blocks"][decoder.recipe["layers"][expert.layer]]["ffn"]
        return index, _ExpertErrors(expert, ffn, calibration, moe[expert.layer], names, stop).measure()

    importance = _importance(decoder, calibration, moe)
    squared_weights = np.zeros(shape[:2])
    with ThreadPoolExecutor(threads, thread_name_prefix="edgert-measure") as pool:
        try:
            for group in groups:
                for index, result in pool.map(measured, group):
                    sizes[index], squared[index] = result.sizes, result.squared
                    errors[index] = result.errors * importance[index]
                    squared_weights[index] = result.squared_weights
                    done += sum(source.bytes for source in decoder.experts[index].sources)
                    if progress is not None:
                        progress(done, total)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return ErrorTable(
        experts=tuple((expert.layer, expert.index) for expert in decoder.experts),
        formats=names,
        weights=np.array([[s.rows * s.cols for s in expert.sources] for expert in decoder.experts], np.int64),
        sizes=sizes,
        errors=_rounded(errors),
        squared_errors=_rounded(squared),
        squared_weights=_rounded(squared_weights),
        importance=_rounded(importance),
        tokens=np.array(
            [calibration.expert_tokens[moe[expert.layer]][expert.index] for expert in decoder.experts],
            np.int64,
        ),
    )


def _importance(decoder: Decoder, calibration: "Calibration", moe: Mapping[int, int]) -> "Doubles":
    """Of each expert: share of tokens times the mean square of its gate weight, with the prior's tokens, over the power of
    the hidden state."""
    result = []
    for expert in decoder.experts:
        m = moe[expert.layer]
        row = calibration.model.moe[m]
        uses = calibration.expert_tokens[m].astype(np.float64)
        squares = calibration.gate_weight_squared[m]
        ffn = decoder.recipe["blocks"][decoder.recipe["layers"][expert.layer]]["ffn"]
        if ffn["router"].get("weighs") == "input":
            squares = np.ones_like(squares)  # the moments of the inputs have it already
        prior = PRIOR_TOKENS * row.num_experts_per_tok / row.num_experts
        weighed = uses[expert.index] * squares[expert.index] + prior * float(
            np.average(squares, weights=uses)
        )
        result.append(weighed / (calibration.tokens + PRIOR_TOKENS) / calibration.residual_power[m])
    return np.array(result)


@dataclass(frozen=True)
class _Measured:
    """Of one expert, before its importance."""

    sizes: "NDArray[np.int64]"
    errors: "Doubles"
    squared: "Doubles"
    squared_weights: "Doubles"


class _Inputs:
    """Moments of what a matrix reads, and as packing wants them."""

    def __init__(self, values: "Floats") -> None:
        self.values = values
        self.native = _native.Moments(values.data, values.shape[-1])


class _ExpertErrors:
    def __init__(
        self,
        expert: Expert,
        ffn: Mapping[str, Any],
        calibration: "Calibration",
        m: int,
        formats: Sequence[str],
        stop: threading.Event,
    ) -> None:
        self._expert = expert
        self._ffn = ffn
        self._formats = formats
        self._stop = stop
        self._inputs = _Inputs(calibration.input_moments(m, expert.index))
        self._inner = _Inputs(calibration.inner_moments(m, expert.index))
        shape = (len(PROJECTIONS), len(formats))
        self._sizes, self._errors = np.zeros(shape, np.int64), np.full(shape, np.inf)
        self._squared, self._squared_weights = np.zeros(shape), np.zeros(len(PROJECTIONS))
        for projection, source in enumerate(expert.sources):
            for number, name in enumerate(formats):
                if _possible(name, source):
                    self._sizes[projection, number] = _native.packed_bytes(name, source.rows, source.cols)
                    self._errors[projection, number] = 0.0

    def measure(self) -> _Measured:
        gate, up, down = (_sampled(source) for source in self._expert.sources)
        self._add(2, down, self._inner, np.ones(len(down.weights)))
        columns = down.factor * np.square(down.weights, dtype=np.float64).sum(axis=0)
        slopes_of = self._slopes(gate, up)
        for projection, sample in enumerate((gate, up)):
            self._add(projection, sample, self._inputs, slopes_of[projection] * columns[sample.rows])
        return _Measured(self._sizes, self._errors, self._squared, self._squared_weights)

    def _add(self, projection: int, sample: "_Sample", inputs: "_Inputs", row_weights: "Doubles") -> None:
        """The errors of a matrix in every format."""
        weights = sample.weights
        self._squared_weights[projection] = sample.factor * np.square(weights, dtype=np.float64).sum()
        source = self._expert.sources[projection]
        for number, name in enumerate(self._formats):
            if self._stop.is_set():
                raise CancelledError("the conversion was cancelled")
            if name == source.tensor.stored_format or np.isinf(self._errors[projection, number]):
                continue  # what is carried over loses nothing
            lost = _packed(name, weights, inputs.native) - weights
            self._squared[projection, number] = sample.factor * np.square(lost, dtype=np.float64).sum()
            errors = _forms(lost, inputs.values, lost)
            self._errors[projection, number] = sample.factor * float(row_weights @ errors)

    def _slopes(self, gate: "_Sample", up: "_Sample") -> tuple["Doubles", "Doubles"]:
        """By row: mean squares of dh/dg and dh/du."""
        g, u = gate.weights, up.weights
        power = [_forms(a, self._inputs.values, b) for a, b in ((g, g), (u, u), (g, u))]
        biases = [_vector(source)[gate.rows] for source in self._expert.biases[:2]]
        return slopes(self._ffn, *power, *biases)


def slopes(
    ffn: Mapping[str, Any],
    gate: "Doubles",
    up: "Doubles",
    product: "Doubles",
    gate_bias: "Doubles | float" = 0.0,
    up_bias: "Doubles | float" = 0.0,
) -> tuple["Doubles", "Doubles"]:
    """Mean squares of the activation's derivatives by g and by u, f64 [rows] each, where (g, u) are normal with the second
    moments `gate`, `up` and `product` and are then moved by the biases."""
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(_NODES)
    node_weights = node_weights / node_weights.sum()
    deviation = np.sqrt(gate)
    along = np.divide(product, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    across = np.sqrt(np.maximum(0.0, up - along**2))
    by_gate, by_up = np.zeros_like(deviation), np.zeros_like(deviation)
    for first, first_weight in zip(nodes, node_weights, strict=True):
        g = deviation * first + gate_bias
        for second, second_weight in zip(nodes, node_weights, strict=True):
            u = along * first + across * second + up_bias
            weight = first_weight * second_weight / (2 * _STEP) ** 2
            by_gate += weight * (_activation(ffn, g + _STEP, u) - _activation(ffn, g - _STEP, u)) ** 2
            by_up += weight * (_activation(ffn, g, u + _STEP) - _activation(ffn, g, u - _STEP)) ** 2
    return by_gate, by_up


def _activation(ffn: Mapping[str, Any], g: "Doubles", u: "Doubles") -> "Doubles":
    """As docs/bundle-format.md defines them."""
    kind = ffn["activation"]
    if kind == "clamped_swiglu":
        limit = ffn["activation_limit"]
        g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
        return g * _sigmoid(ffn["activation_alpha"] * g) * (u + 1)
    if kind == "gelu_tanh":
        return np.asarray(0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u)
    return g * _sigmoid(g) * u


def _sigmoid(x: "Doubles") -> "Doubles":
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _forms(a: "Floats", moments: "Floats", b: "Floats") -> "Doubles":
    """a_i M b_i^T of every row i; not negative where b is a, whatever is rounded."""
    through = a * moments if moments.ndim == 1 else a @ moments
    forms: Doubles = (through * b).sum(axis=1, dtype=np.float64)
    return np.maximum(0.0, forms) if a is b else forms


def _packed(name: str, weights: "Floats", moments: _native.Moments) -> "Floats":
    """What is left of the weights in this format."""
    rows, cols = weights.shape
    packed = bytearray(_native.packed_bytes(name, rows, cols))
    _native.pack(name, weights.data, "f32", rows, cols, destination=packed, moments=moments, threads=1)
    return np.frombuffer(_native.unpack(name, packed, rows, cols), np.float32).reshape(rows, cols)


def _possible(name: str, source: Source) -> bool:
    return name == source.tensor.stored_format or name in candidates()


@dataclass(frozen=True)
class _Sample:
    """Rows of a matrix; each stands for `factor` of them."""

    rows: "NDArray[np.int64]"
    weights: "Floats"  # [rows, cols]
    factor: float


def _sampled(source: Source) -> _Sample:
    """All rows, or _SAMPLED_TILES tiles of them, spread evenly."""
    rows = np.arange(source.rows)
    tiles = source.rows // TILE_ROWS
    if tiles > _SAMPLED_TILES:
        first = np.arange(_SAMPLED_TILES) * tiles // _SAMPLED_TILES * TILE_ROWS
        rows = (first[:, None] + np.arange(TILE_ROWS)).ravel()
    with source.tensor.open() as reader:
        parts = [
            _floats(*reader.floats(source.first_row + int(run[0]) * source.step, len(run), source.step))
            for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        ]
    return _Sample(rows, np.concatenate(parts).reshape(len(rows), source.cols), source.rows / len(rows))


def _vector(source: Source) -> "Doubles":
    with source.tensor.open() as reader:
        raw, dtype = reader.floats(source.first_row, source.rows, source.step)
    return _floats(raw, dtype).astype(np.float64)


def _floats(raw: bytes | bytearray, dtype: str) -> "Floats":
    if dtype == "bf16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f4" if dtype == "f32" else "<f2").astype(np.float32)


def _rounded(values: "Doubles") -> "Doubles":
    return np.array([float(f"{value:.9g}") for value in values.ravel()]).reshape(values.shape)
