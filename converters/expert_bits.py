"""Bits for every expert: what is asked of a conversion, and what came of it."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.errors import InvalidArgumentError

from .decoder import Decoder, DenseTensor
from .formats import Chosen, ExpertFormat, ExpertFormats, Triple, candidates
from .pack import Part, pack_extent
from .trials import Trials

if TYPE_CHECKING:
    from edgert.calibration import Calibration

    from .allocation import Allocation, Ladder
    from .expert_errors import ErrorTable

METHODS = ("knapsack", "uniform", "edgemoe")  # allocation.py
Progress = Callable[[int, int], None]
Stage = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """Experts of `bits` a weight on the mean, or as few as keep the measured loss within `max_loss`, a share of the
    perplexity: one of both. `candidates`: the formats to choose among."""

    bits: float | None
    max_loss: float | None
    method: str
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class ExpertRow:
    """One expert. `tokens` of the calibration used it; `error` is predicted, of its layer's output over the hidden state
    (see expert_errors.py); `relative_error` is that of its weights, measured."""

    layer: int
    expert: int
    formats: Triple
    bits: float
    bytes: int
    tokens: int
    error: float
    relative_error: float


@dataclass(frozen=True)
class Trial:
    """What a search has measured: perplexity lost, as a share."""

    bits: float
    error: float
    loss: float


@dataclass(frozen=True)
class ExpertBitsReport:
    """`error` is the sum of the experts' own; no choice of as many bytes has a smaller one than `bound` (0 where the method
    proves nothing). `trials` are what a search has measured."""

    method: str
    candidates: tuple[str, ...]
    asked_bits: float | None
    max_loss: float | None
    bits: float
    bytes: int
    error: float
    bound: float
    experts: list[ExpertRow]
    trials: list[Trial]

    def by_layer(self) -> dict[int, list[ExpertRow]]:
        layers: dict[int, list[ExpertRow]] = {}
        for row in self.experts:
            layers.setdefault(row.layer, []).append(row)
        return layers

    def summary(self) -> dict[str, Any]:
        """What the manifest states of it: nothing that was measured by running the model, which differs by machine."""
        return {
            "method": self.method,
            "candidates": list(self.candidates),
            "bits": float(f"{self.bits:.6g}"),
            "bytes": self.bytes,
            "predicted_error": float(f"{self.error:.6g}"),
            "proven_bound": float(f"{self.bound:.6g}"),
        }


def request(
    *,
    calibration: object,
    bits: float | None,
    max_loss: float | None,
    method: str | None,
    formats: Sequence[str] | None,
    expert_format: ExpertFormat | None,
    expert_formats: ExpertFormats | None,
    text: str | None,
) -> Request | None:
    """The options of a conversion, checked; None where they ask for no bits. Raises InvalidArgumentError."""
    if bits is None and max_loss is None:
        for name, value in {"allocation": method, "expert_candidates": formats}.items():
            if value is not None:
                raise InvalidArgumentError(f"{name}: has an effect with expert_bits or max_loss only")
        return None
    asked = "max_loss" if bits is None else "expert_bits"
    if bits is not None and max_loss is not None:
        raise InvalidArgumentError("expert_bits and max_loss: one or the other says how large experts may be")
    for name, other in {"expert_format": expert_format, "expert_formats": expert_formats}.items():
        if other is not None:
            raise InvalidArgumentError(f"{asked}: chooses the formats of experts itself; leave out {name}")
    method = method or METHODS[0]
    if method not in METHODS:
        raise InvalidArgumentError(f"allocation: {method[:60]!r}; allowed are {', '.join(METHODS)}")
    if calibration is None:
        raise InvalidArgumentError(f"{asked}: needs a calibration of the model (edgert calibrate)")
    if max_loss is not None and not 0 < max_loss <= 10:
        raise InvalidArgumentError(f"max_loss: {max_loss:g}; above 0 and at most 10 (1000 %) is allowed")
    if text is None and (max_loss is not None or method == "edgemoe"):
        reason = "a loss is measured" if max_loss is not None else "edgemoe measures every expert"
        raise InvalidArgumentError(
            f"text: is needed, for {reason} on it; take one that nothing was calibrated on"
        )
    return Request(bits, max_loss, method, _checked(formats))


def _checked(formats: Sequence[str] | None) -> tuple[str, ...]:
    known = candidates()
    if formats is not None and not formats:
        raise InvalidArgumentError(f"expert_candidates: none are given; allowed are {', '.join(known)}")
    for name in formats or ():
        if name not in known:
            raise InvalidArgumentError(f"expert_candidates: {name[:60]!r}; allowed are {', '.join(known)}")
    return known if formats is None else tuple(dict.fromkeys(formats))


def choose_expert_bits(
    asked: Request,
    decoder: Decoder,
    calibration: "Calibration",
    groups: Any,
    trials: Trials | None,
    *,
    threads: int,
    progress: Progress | None,
    stage: Stage | None,
) -> tuple[Chosen, ExpertBitsReport]:
    """Formats by expert. `groups` as of expert_errors.measure(); `trials` where a text was given. Raises
    InvalidArgumentError for a budget that no choice meets."""
    if not decoder.experts:
        raise InvalidArgumentError("expert_bits: this model has no routed experts")
    # These need numpy, which other conversions do without.
    from .allocation import EdgeMoe, Knapsack, Uniform, budget_bytes, largest_within, smallest_within_loss
    from .expert_errors import measure

    tell = stage or _nothing
    tell("measure what experts lose by format")
    table = measure(decoder, calibration, asked.candidates, groups, threads=threads, progress=progress)
    ladder: Ladder
    if asked.method == "knapsack":
        ladder = Knapsack(table)
    elif asked.method == "uniform":
        ladder = Uniform(table)
    else:
        assert trials is not None
        tell("measure what each expert costs the model")
        ladder = EdgeMoe(table, trials.loss, progress)
    tried: list[Trial] = []
    if asked.max_loss is None:
        assert asked.bits is not None
        chosen = largest_within(ladder, budget_bytes(table, asked.bits))
    else:
        assert trials is not None

        def heard(tried_one: "Allocation", loss: float) -> None:
            tried.append(Trial(tried_one.bits, tried_one.error, loss))
            tell(f"experts of {tried_one.bits:.3f} bits a weight: perplexity {loss:+.2%}")

        chosen = smallest_within_loss(ladder, trials.loss, asked.max_loss, heard)
    return chosen.chosen, ExpertBitsReport(
        method=asked.method,
        candidates=table.formats,
        asked_bits=asked.bits,
        max_loss=asked.max_loss,
        bits=chosen.bits,
        bytes=chosen.bytes,
        error=chosen.error,
        bound=chosen.bound,
        experts=_rows(table, chosen),
        trials=sorted(tried, key=lambda trial: trial.bits),
    )


def _nothing(_: str) -> None:
    """Nobody listens."""


def _rows(table: "ErrorTable", chosen: "Allocation") -> list[ExpertRow]:
    rows = []
    projections = [0, 1, 2]
    for index, (layer, expert) in enumerate(table.experts):
        formats = chosen.chosen[layer, expert]
        numbers = [table.formats.index(name) for name in formats]
        size = int(table.sizes[index, projections, numbers].sum())
        squared = float(table.squared_errors[index, projections, numbers].sum())
        weight = float(table.squared_weights[index].sum())
        rows.append(
            ExpertRow(
                layer=layer,
                expert=expert,
                formats=formats,
                bits=8 * size / int(table.weights[index].sum()),
                bytes=size,
                tokens=int(table.tokens[index]),
                error=float(table.errors[index, projections, numbers].sum()),
                relative_error=(squared / weight) ** 0.5 if weight else 0.0,
            )
        )
    return rows


def load_calibration(
    calibration: "Calibration | str | os.PathLike[str] | None", decoder: Decoder
) -> "Calibration | None":
    """Read, and checked against the model: its sizes, and those of its tensors that tell models apart."""
    if calibration is None:
        return None
    from edgert.calibration import Calibration

    if not isinstance(calibration, Calibration):
        calibration = Calibration.load(Path(calibration))
    names = calibration.model.checksums
    calibration.check(
        decoder.recipe, {row.name: _checksum(row) for row in decoder.dense if row.name in names}
    )
    return calibration


def _checksum(tensor: DenseTensor) -> str:
    """That of its bytes in a bundle, which has it in f32."""
    part = Part(tensor.name, tensor.source, "f32", is_vector=len(tensor.shape) == 1)
    with open(os.devnull, "wb") as nowhere:
        return pack_extent([part], nowhere.fileno(), 0, None, lambda _: None, threading.Event()).checksum
