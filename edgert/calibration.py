"""What a model does on a text, as `edgert calibrate` measures it: which experts it uses, how much they count, and second
moments of the inputs of its matrices. docs/calibration.md describes the file.

Second moments are the mean of x x^T over tokens: [n, n] where the whole matrix was recorded, [n] where its diagonal was.
MoE layers are counted from 0 among MoE layers (m); names of tensors hold the layer's number in the model.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert import calibration_file
from edgert.calibration_file import (
    INPUTS,
    Measured,
    MoeLayer,
    Tensors,
    measured_model,
    triangle_side,
    triangle_size,
)
from edgert.errors import CorruptError, InvalidArgumentError

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# An expert that few tokens use has moments that are near what is expected of any expert, one that none uses has exactly
# those: they count as so many tokens. By the likelihood of other text, on docs-moe with 5,000 and 25,000 tokens; a matrix of
# n channels says the less the larger n is.
DIAGONAL_PRIOR_TOKENS = 32
MATRIX_PRIOR_TOKENS = 2  # for each channel


@dataclass(frozen=True)
class Calibration:
    """One measurement: `tokens` of text, in windows of at most `window`. Arrays by MoE layer are lists of numpy arrays.

    `tensors` is what the file holds, by name; what is below derives from it.
    """

    model: Measured
    tokens: int
    window: int
    tensors: Tensors

    # --- files --------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Read and check a file. Raises NotFoundError, StorageError, UnsupportedError for a newer format, and
        CorruptError naming file and field or tensor for everything that is not a whole and plausible calibration."""
        model, tokens, window, tensors = calibration_file.read(Path(path))
        try:
            return cls(model, tokens, window, tensors).checked()
        except InvalidArgumentError as error:
            raise CorruptError(f"{os.fspath(path)}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file beside its place, synced, then renamed. Raises StorageError, and InvalidArgumentError for
        values that load() would refuse."""
        self.checked()
        calibration_file.write(Path(path), self.model, self.tokens, self.window, self.tensors)

    def checked(self) -> "Calibration":
        """Itself. Raises InvalidArgumentError naming the tensor for values that no measurement gives."""
        for name, array in self.tensors.items():
            if not np.isfinite(array).all():
                raise InvalidArgumentError(f"tensor {name!r}: holds values that are not finite")
            signed = name.endswith((".mean", ".logits", ".weight", ".triangle")) or ".cross_" in name
            if not signed and (array < 0).any():
                raise InvalidArgumentError(f"tensor {name!r}: holds negative values")
        for row in self.model.moe:
            name = f"layers.{row.layer}.experts.tokens"
            counted, needed = int(self.tensors[name].sum()), self.tokens * row.num_experts_per_tok
            if counted != needed or int(self.tensors[name].max()) > self.tokens:
                raise InvalidArgumentError(
                    f"tensor {name!r}: counts {counted} uses of experts, {self.tokens} tokens make {needed}, "
                    "of an expert at most one a token"
                )
        return self

    def check(self, recipe: Mapping[str, Any], checksums: Mapping[str, str] | None = None) -> None:
        """Raise InvalidArgumentError where this was measured on another model than `recipe` describes; `checksums` of its
        dense tensors by name, where they are known, tell models of the same sizes apart."""
        model = measured_model(recipe)
        for field in ("architecture", "hidden_size", "vocab_size", "num_layers", "moe"):
            found, needed = getattr(self.model, field), getattr(model, field)
            if field == "moe" and len(found) == len(needed):
                found, needed = next(((f, n) for f, n in zip(found, needed, strict=True) if f != n), (0, 0))
            if found != needed:
                raise InvalidArgumentError(
                    f"calibration: measured on another model: {field} is {_shown(found)}, this one has {_shown(needed)}"
                )
        for name, checksum in self.model.checksums.items():
            if checksums is not None and checksums.get(name, checksum) != checksum:
                raise InvalidArgumentError(
                    f"calibration: measured on another model of the same sizes: {name} has another checksum"
                )

    # --- routing ------------------------------------------------------------------------------------

    @cached_property
    def expert_tokens(self) -> list[NDArray[np.int64]]:
        """int64 [E]: tokens that used each expert."""
        return [self._of(row, "experts.tokens") for row in self.model.moe]

    @cached_property
    def frequency(self) -> list[Doubles]:
        """f64 [E]: share of tokens that used each expert."""
        return [tokens / self.tokens for tokens in self.expert_tokens]

    @cached_property
    def gate_weight(self) -> list[Doubles]:
        """f64 [E]: mean gate weight of each expert over the tokens that used it; 0 where none did."""
        return self._by_use("experts.weight")

    @cached_property
    def gate_weight_squared(self) -> list[Doubles]:
        """f64 [E]: likewise of the weight's square."""
        return self._by_use("experts.weight_squared")

    @cached_property
    def effective_experts(self) -> list[float]:
        """exp(entropy) of how uses fall on experts: E where all are used alike, num_experts_per_tok where the same always
        are."""
        effective = []
        for tokens in self.expert_tokens:
            share = tokens[tokens > 0] / tokens.sum()
            effective.append(float(np.exp(-(share * np.log(share)).sum())))
        return effective

    @cached_property
    def co_activation(self) -> list[Floats | None]:
        """f32 [E of m - 1, E of m]: tokens that used expert i at MoE layer m - 1 and j at m; None for the first."""
        return self._counts("experts.before_1", 1)

    @cached_property
    def co_activation_2(self) -> list[Floats | None]:
        """Likewise from MoE layer m - 2; None for the first two."""
        return self._counts("experts.before_2", 2)

    @cached_property
    def previous_token(self) -> list[Floats]:
        """f32 [E, E]: tokens that used expert j where the token before them used i; windows begin without one."""
        return [self._of(row, "experts.token_before").astype(np.float32) for row in self.model.moe]

    @cached_property
    def residual_power(self) -> list[float]:
        """Mean squared length of the hidden state behind each MoE layer."""
        return [float(self._of(row, "residual.diagonal").sum()) for row in self.model.moe]

    # --- moments ------------------------------------------------------------------------------------

    def input_moments(self, m: int, expert: int) -> Floats:
        """f32 [H, H] or [H]: of the input of an expert's gate and up; the fewer tokens used it, the more like the layer's.
        The layer's alone where whole matrices were recorded by layer only."""
        layer = self._experts_input(m)
        own = self._expert("experts.input", m, expert)
        if layer.ndim > own.ndim:
            return layer
        prior = layer if layer.ndim == own.ndim else np.diag(layer)
        return _blend(own, int(self.expert_tokens[m][expert]), prior)

    def inner_moments(self, m: int, expert: int) -> Floats:
        """f32 [W, W] or [W]: of the input of an expert's down; the fewer tokens used it, the more as if its channels were
        independent and alike: those of one expert say nothing of another's."""
        own = self._expert("experts.inner", m, expert)
        tokens = int(self.expert_tokens[m][expert])
        alike = np.full(self.model.moe[m].width, self._inner_power[m], np.float32)
        diagonal = _blend(_diagonal(own), tokens, alike)
        return diagonal if own.ndim == 1 else _blend(own, tokens, np.diag(diagonal))

    def dense_moments(self, name: str) -> Floats | None:
        """f32 [n, n] or [n]: of the input of a dense matrix by its name in the bundle; None where none were recorded."""
        if name == "output":
            return self._moments("output")
        match = re.fullmatch(r"(layers\.\d+)\.(.+)", name)
        if match is None or match[2] not in INPUTS:
            return None
        return self._moments(f"{match[1]}.{INPUTS[match[2]]}")

    @cached_property
    def router_moments(self) -> list[Floats]:
        """f32 [H, H] or [H]: of the router's input, over all tokens."""
        return [self._own_or_ffn_input(m, "router.input") for m in range(len(self.model.moe))]

    @cached_property
    def router_mean(self) -> list[Floats]:
        """f32 [H]: mean of the router's input."""
        return [self._of(row, "router.mean") for row in self.model.moe]

    @cached_property
    def router_logits(self) -> list[Floats]:
        """f32 [E]: mean of the router's logits, a bias on them included."""
        return [self._of(row, "router.logits") for row in self.model.moe]

    @cached_property
    def router_cross(self) -> list[dict[int, Floats]]:
        """By distance d = 1, 2: f32 [H, E of m + d], the mean of (the router's input at m) x (the logits at m + d), where
        there is such a layer."""
        cross = []
        for m, row in enumerate(self.model.moe):
            ahead = [d for d in (1, 2) if m + d < len(self.model.moe)]
            cross.append({d: self._of(row, f"router.cross_{d}") for d in ahead})
        return cross

    # --- parts --------------------------------------------------------------------------------------

    def _of(self, row: MoeLayer, name: str) -> NDArray[Any]:
        return self.tensors[f"layers.{row.layer}.{name}"]

    def _by_use(self, name: str) -> list[Doubles]:
        return [
            self._of(row, name) / np.maximum(1, tokens)
            for row, tokens in zip(self.model.moe, self.expert_tokens, strict=True)
        ]

    def _counts(self, name: str, first: int) -> list[Floats | None]:
        return [
            None if m < first else self._of(row, name).astype(np.float32)
            for m, row in enumerate(self.model.moe)
        ]

    def _moments(self, name: str) -> Floats | None:
        triangle = self.tensors.get(f"{name}.triangle")
        return self.tensors.get(f"{name}.diagonal") if triangle is None else _unpacked(triangle)

    def _own_or_ffn_input(self, m: int, name: str) -> Floats:
        """A branch of the layer has an input of its own only where it has its own norm."""
        layer = self.model.moe[m].layer
        own = self._moments(f"layers.{layer}.{name}")
        found = self._moments(f"layers.{layer}.ffn.input") if own is None else own
        assert found is not None  # load() and checked() saw to it
        return found

    def _experts_input(self, m: int) -> Floats:
        """The moments of what the routed experts of a layer read, over all tokens. Asked for by one expert after the
        other, so the last layer's are kept."""
        if m not in self._kept:
            self._kept.clear()
            self._kept[m] = self._own_or_ffn_input(m, "experts.input_of_layer")
        return self._kept[m]

    @cached_property
    def _kept(self) -> dict[int, Floats]:
        return {}

    def _expert(self, name: str, m: int, expert: int) -> Floats:
        """One expert's, as recorded."""
        where = f"layers.{self.model.moe[m].layer}.{name}"
        triangles = self.tensors.get(f"{where}.triangle")
        if triangles is not None:
            return _unpacked(triangles[expert])
        own: Floats = self.tensors[f"{where}.diagonal"][expert]
        return own

    @cached_property
    def _inner_power(self) -> list[float]:
        """The mean square of the inputs of down, over a layer's experts and channels."""
        powers = []
        for row, tokens in zip(self.model.moe, self.expert_tokens, strict=True):
            where = f"layers.{row.layer}.experts.inner"
            triangles = self.tensors.get(f"{where}.triangle")
            diagonals = self.tensors[f"{where}.diagonal"] if triangles is None else _diagonals(triangles)
            powers.append(float(np.average(diagonals.mean(axis=1), weights=tokens)))
        return powers


# --- second moments -------------------------------------------------------------------------------------


def _unpacked(triangle: Floats) -> Floats:
    n = triangle_side(len(triangle))
    lower = np.tri(n, dtype=bool)
    matrix = np.empty((n, n), np.float32)
    matrix[lower] = triangle
    matrix.T[lower] = triangle
    return matrix


def _diagonals(triangles: Floats) -> Floats:
    n = triangle_side(triangles.shape[-1])
    return triangles[..., [triangle_size(i + 1) - 1 for i in range(n)]]


def _diagonal(moments: Floats) -> Floats:
    return moments if moments.ndim == 1 else np.diagonal(moments)


def _blend(own: Floats, tokens: int, prior: Floats) -> Floats:
    weight = DIAGONAL_PRIOR_TOKENS if own.ndim == 1 else MATRIX_PRIOR_TOKENS * len(own)
    share = np.float32(tokens / (tokens + weight))
    return np.asarray(own * share + prior * (1 - share), np.float32)


def _shown(value: object) -> str:
    if isinstance(value, MoeLayer):
        return (
            f"{value.num_experts} experts of width {value.width}, {value.num_experts_per_tok} a token, "
            f"in layer {value.layer}"
        )
    return f"{len(value)} layers" if isinstance(value, tuple) else str(value)
