"""What a model does on a text, as `edgert calibrate` measures it: which experts it uses, how much they count, and second
moments of the inputs of its matrices. docs/calibration.md describes the file.

Second moments are the mean of x x^T over tokens: [n, n] where the whole matrix was recorded, [n] where its diagonal was.
MoE layers are counted from 0 among MoE layers (m); names of tensors hold the layer's number in the model.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgert.errors import CorruptError, InvalidArgumentError, StorageError, UnsupportedError

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Tensors = Mapping[str, NDArray[Any]]

SUFFIX = ".calibration"
VERSION = 1
# So many tokens of the whole layer count towards an expert's own moments: an expert that few tokens use has moments that
# are near the layer's, one that none uses has exactly those.
PRIOR_TOKENS = 16
MAX_BYTES = 64 << 30

_MAX_LAYERS = 4096
_MAX_SIZE = 1 << 20
_DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8"}
# Where a dense matrix of a layer finds the moments of its input; matrices that read the same rows share them.
_INPUTS = {
    **dict.fromkeys(
        ("attention.q", "attention.k", "attention.v", "attention.gate", "attention.q_a", "attention.kv_a"),
        "mixer.input",
    ),
    **dict.fromkeys(
        ("delta.q", "delta.k", "delta.v", "delta.z", "delta.a", "delta.b", "conv.in"), "mixer.input"
    ),
    **dict.fromkeys(("ffn.gate", "ffn.up", "shared.gate", "shared.up"), "ffn.input"),
    **{
        name: name
        for name in ("attention.q_b", "attention.k_b", "attention.v_b", "attention.o", "delta.o", "conv.o")
    },
    **{name: name for name in ("ffn.down", "shared.down")},
}
_DENSE = re.compile(
    rf"(?:layers\.(\d{{1,4}})\.(?:{'|'.join(map(re.escape, sorted({*_INPUTS.values(), 'router.input'})))})|output)"
    r"\.(diagonal|triangle)"
)


@dataclass(frozen=True)
class MoeLayer:
    """An MoE layer's number in the model, and its sizes; `width` is an expert's moe_intermediate_size."""

    layer: int
    num_experts: int
    num_experts_per_tok: int
    width: int


@dataclass(frozen=True)
class Measured:
    """The model that was measured: what a calibration for it has to agree with. `checksums` are those of a few f32
    tensors that every bundle of a checkpoint has alike."""

    architecture: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    moe: tuple[MoeLayer, ...]
    checksums: Mapping[str, str]


def measured_model(recipe: Mapping[str, Any], checksums: Mapping[str, str] | None = None) -> Measured:
    """What of a bundle's recipe a calibration depends on."""
    moe: list[MoeLayer] = []
    for layer, block in enumerate(recipe["layers"]):
        ffn = recipe["blocks"][block]["ffn"]
        if ffn["kind"] == "moe":
            moe.append(
                MoeLayer(layer, ffn["num_experts"], ffn["num_experts_per_tok"], ffn["moe_intermediate_size"])
            )
    return Measured(
        architecture=recipe["architecture"],
        hidden_size=recipe["hidden_size"],
        vocab_size=recipe["vocab_size"],
        num_layers=len(recipe["layers"]),
        moe=tuple(moe),
        checksums=dict(checksums or {}),
    )


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
        from edgert.converters.files import InputFile
        from edgert.converters.safetensors import read_header_and_metadata

        path = Path(path)
        infos, metadata = read_header_and_metadata(path)
        model, tokens, window = _parse_metadata(path, metadata)
        expected = _expected(model)
        tensors: dict[str, NDArray[Any]] = {}
        if infos and infos[-1].end > MAX_BYTES:
            raise CorruptError(f"{path}: {infos[-1].end} bytes; at most {MAX_BYTES} are allowed")
        for info in infos:
            _check_shape(path, info.name, info.dtype, info.shape, model, expected)
        missing = [name for name, row in expected.items() if row.required and not row.held_by(infos)]
        if missing:
            raise CorruptError(f"{path}: tensor {missing[0]!r} is missing")
        with InputFile(path) as file:
            for info in infos:
                raw = file.read(info.begin, info.end - info.begin)
                tensors[info.name] = np.frombuffer(raw, _DTYPES[info.dtype]).reshape(info.shape)
        try:
            return cls(model, tokens, window, tensors).checked()
        except InvalidArgumentError as error:
            raise CorruptError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file beside its place, synced, then renamed. Raises StorageError, and InvalidArgumentError for
        values that load() would refuse."""
        self.checked()
        path = Path(os.path.abspath(path))
        beside = path.parent / f".{path.name}.new"
        try:
            _write(beside, self._metadata(), self.tensors)
            os.replace(beside, path)
            _sync_directory(path.parent)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
        finally:
            with suppress(OSError):
                beside.unlink()

    def _metadata(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "tokens": self.tokens,
            "window": self.window,
            "model": {**asdict(self.model), "moe": [asdict(row) for row in self.model.moe]},
        }

    def checked(self) -> "Calibration":
        """Itself. Raises InvalidArgumentError naming the tensor for values that no measurement gives."""
        for name, array in self.tensors.items():
            if not np.isfinite(array).all():
                raise InvalidArgumentError(f"tensor {name!r}: holds values that are not finite")
            signed = name.endswith((".mean", ".logits", ".triangle")) or ".cross_" in name
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

    # --- moments ------------------------------------------------------------------------------------

    def input_moments(self, m: int, expert: int) -> Floats:
        """f32 [H, H] or [H]: of the input of an expert's gate and up, over its own tokens and PRIOR_TOKENS of the layer's.
        Where whole matrices were recorded by layer only, the layer's, scaled to the expert's diagonal."""
        layer = self._experts_input(m)
        own, is_matrix = self._expert("experts.input", m, expert)
        tokens = int(self.expert_tokens[m][expert])
        if is_matrix or layer.ndim == 1:
            return _blend(own, tokens, layer if is_matrix else _diagonal(layer))
        diagonal = _diagonal(layer)
        mixed = _blend(own, tokens, diagonal)
        scale = np.sqrt(np.divide(mixed, diagonal, out=np.zeros_like(mixed), where=diagonal > 0))
        return np.asarray(layer * scale * scale[:, None], np.float32)

    def inner_moments(self, m: int, expert: int) -> Floats:
        """f32 [W, W] or [W]: of the input of an expert's down, over its own tokens and PRIOR_TOKENS whose channels are
        independent and alike: those of one expert say nothing of another's."""
        own, is_matrix = self._expert("experts.inner", m, expert)
        width = self.model.moe[m].width
        prior = np.full(width, self._inner_power[m], np.float32)
        return _blend(own, int(self.expert_tokens[m][expert]), np.diag(prior) if is_matrix else prior)

    def dense_moments(self, name: str) -> Floats | None:
        """f32 [n, n] or [n]: of the input of a dense matrix by its name in the bundle; None where none were recorded."""
        if name == "output":
            return self._moments("output")
        match = re.fullmatch(r"(layers\.\d+)\.(.+)", name)
        if match is None or match[2] not in _INPUTS:
            return None
        return self._moments(f"{match[1]}.{_INPUTS[match[2]]}")

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
        """The moments of what the routed experts of a layer read, over all tokens."""
        return self._own_or_ffn_input(m, "experts.input_of_layer")

    def _expert(self, name: str, m: int, expert: int) -> tuple[Floats, bool]:
        """One expert's, as recorded, and whether they are a whole matrix."""
        where = f"layers.{self.model.moe[m].layer}.{name}"
        triangles = self.tensors.get(f"{where}.triangle")
        if triangles is not None:
            return _unpacked(triangles[expert]), True
        return self.tensors[f"{where}.diagonal"][expert], False

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


def triangle_size(n: int) -> int:
    """Elements of the lower triangle of an [n, n] matrix, its diagonal included: row after row, as files hold it."""
    return n * (n + 1) // 2


def _side(size: int) -> int:
    return (math.isqrt(8 * size + 1) - 1) // 2


def _unpacked(triangle: Floats) -> Floats:
    n = _side(len(triangle))
    matrix = np.zeros((n, n), np.float32)
    rows, columns = np.tril_indices(n)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix


def _diagonals(triangles: Floats) -> Floats:
    n = _side(triangles.shape[-1])
    return triangles[..., [triangle_size(i + 1) - 1 for i in range(n)]]


def _diagonal(moments: Floats) -> Floats:
    return moments if moments.ndim == 1 else np.diagonal(moments)


def _blend(own: Floats, tokens: int, prior: Floats) -> Floats:
    share = np.float32(tokens / (tokens + PRIOR_TOKENS))
    return np.asarray(own * share + prior * (1 - share), np.float32)


# --- what a file may hold -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Expected:
    """A tensor, or moments of vectors of the last dimension: then as NAME.diagonal or NAME.triangle."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    moments: bool = False
    required: bool = True

    def held_by(self, infos: Sequence[Any]) -> bool:
        names = (f"{self.name}.diagonal", f"{self.name}.triangle") if self.moments else (self.name,)
        return sum(info.name in names for info in infos) == 1


def _expected(model: Measured) -> dict[str, _Expected]:
    """The tensors of MoE layers, by name; those of dense matrices may be there beside them."""
    rows: list[_Expected] = []
    hidden = model.hidden_size
    for m, moe in enumerate(model.moe):
        experts = moe.num_experts

        def add(name: str, dtype: str, *shape: int, moe: MoeLayer = moe, **how: bool) -> None:
            rows.append(_Expected(f"layers.{moe.layer}.{name}", dtype, shape, **how))

        add("experts.tokens", "I64", experts)
        add("experts.weight", "F64", experts)
        add("experts.weight_squared", "F64", experts)
        add("experts.token_before", "I64", experts, experts)
        add("experts.input", "F32", experts, hidden, moments=True)
        add("experts.inner", "F32", experts, moe.width, moments=True)
        add("ffn.input", "F32", hidden, moments=True)
        add("router.input", "F32", hidden, moments=True, required=False)
        add("experts.input_of_layer", "F32", hidden, moments=True, required=False)
        add("router.mean", "F32", hidden)
        add("router.logits", "F32", experts)
        for d in (1, 2):
            if m >= d:
                add(f"experts.before_{d}", "I64", model.moe[m - d].num_experts, experts)
            if m + d < len(model.moe):
                add(f"router.cross_{d}", "F32", hidden, model.moe[m + d].num_experts)
    return {row.name: row for row in rows}


def _check_shape(
    path: Path,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    model: Measured,
    expected: Mapping[str, _Expected],
) -> None:
    stem, _, form = name.rpartition(".")
    row = expected.get(name) or expected.get(stem)
    if row is None:
        match = _DENSE.fullmatch(name)
        if match is None or (match[1] is not None and int(match[1]) >= model.num_layers):
            raise CorruptError(f"{path}: tensor {name!r} has no place in the calibration of this model")
        plausible = len(shape) == 1 and shape[0] > 0
        side = _side(shape[0]) if plausible and match[2] == "triangle" else 0
        if dtype != "F32" or not plausible or (side and triangle_size(side) != shape[0]):
            raise CorruptError(f"{path}: tensor {name!r}: {dtype} {list(shape)} are no moments")
        return
    needed = row.shape
    if row.moments and form == "triangle":
        needed = (*needed[:-1], triangle_size(needed[-1]))
    if (row.moments and form not in ("diagonal", "triangle")) or (dtype, shape) != (row.dtype, needed):
        raise CorruptError(
            f"{path}: tensor {name!r}: found {dtype} {list(shape)}, allowed is {row.dtype} {list(needed)}"
        )


def _parse_metadata(path: Path, metadata: Mapping[str, str]) -> tuple[Measured, int, int]:
    from edgert.converters.strict_json import parse_json_object

    if "edgert.calibration" not in metadata:
        raise CorruptError(f"{path}: not a calibration: its metadata have no 'edgert.calibration'")
    values = parse_json_object(metadata["edgert.calibration"].encode(), f"{path}: edgert.calibration")
    fields = _Fields(path, values, "")
    version = fields.integer("version", 2**31)
    if version > VERSION:
        raise UnsupportedError(
            f"{path}: a calibration of format version {version}, this edgert reads up to {VERSION}: it needs a newer one"
        )
    fields.only("version", "tokens", "window", "model")
    tokens, window = fields.integer("tokens", 2**53), fields.integer("window", 2**31)
    model = _Fields(path, values.get("model"), "model.")
    model.only("architecture", "hidden_size", "vocab_size", "num_layers", "moe", "checksums")
    layers = model.integer("num_layers", _MAX_LAYERS)
    moe: list[MoeLayer] = []
    rows = model.values["moe"]
    if not isinstance(rows, list):
        model.fail("moe", rows, "a list")
    for i, row in enumerate(rows):
        entry = _Fields(path, row, f"model.moe.{i}.")
        entry.only("layer", "num_experts", "num_experts_per_tok", "width")
        experts = entry.integer("num_experts", 1 << 16)
        moe.append(
            MoeLayer(
                entry.integer("layer", layers - 1, least=moe[-1].layer + 1 if moe else 0),
                experts,
                entry.integer("num_experts_per_tok", experts),
                entry.integer("width", _MAX_SIZE),
            )
        )
    checksums = model.values["checksums"]
    if not isinstance(checksums, dict) or any(
        not isinstance(c, str) or not re.fullmatch("[0-9a-f]{16}", c) for c in checksums.values()
    ):
        model.fail("checksums", checksums, "an object of 16 hexadecimal digits each")
    measured = Measured(
        architecture=model.text("architecture"),
        hidden_size=model.integer("hidden_size", _MAX_SIZE),
        vocab_size=model.integer("vocab_size", 2**31),
        num_layers=layers,
        moe=tuple(moe),
        checksums=checksums,
    )
    return measured, tokens, window


class _Fields:
    """An object of the metadata."""

    def __init__(self, path: Path, values: Any, where: str) -> None:
        self._path = path
        self._where = where
        if not isinstance(values, dict):
            raise CorruptError(f"{path}: {where.rstrip('.')}: found {str(values)[:60]}, allowed is an object")
        self.values: dict[str, Any] = values

    def only(self, *names: str) -> None:
        if self.values.keys() != set(names):
            odd = sorted(self.values.keys() ^ set(names))[0]
            problem = "is missing" if odd in names else "is unknown"
            raise CorruptError(f"{self._path}: {self._where}{odd} {problem}")

    def integer(self, name: str, most: int, least: int = 1) -> int:
        value = self.values.get(name)
        if type(value) is not int or not least <= value <= most:
            self.fail(name, value, f"{least} to {most}")
        return value

    def text(self, name: str) -> str:
        value = self.values[name]
        if not isinstance(value, str) or len(value) > 200:
            self.fail(name, value, "a short text")
        return value

    def fail(self, name: str, value: object, allowed: str) -> NoReturn:
        raise CorruptError(
            f"{self._path}: {self._where}{name}: found {str(value)[:60]}, allowed is {allowed}"
        )


def _shown(value: object) -> str:
    if isinstance(value, MoeLayer):
        return (
            f"{value.num_experts} experts of width {value.width}, {value.num_experts_per_tok} a token, "
            f"in layer {value.layer}"
        )
    return f"{len(value)} layers" if isinstance(value, tuple) else str(value)


# --- writing --------------------------------------------------------------------------------------------


def _write(path: Path, metadata: Mapping[str, Any], tensors: Tensors) -> None:
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"edgert.calibration": json.dumps(metadata)}}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with suppress(FileNotFoundError):
        path.unlink()  # of a run that was killed
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    from edgert.converters.output import sync_directory

    sync_directory(path)
