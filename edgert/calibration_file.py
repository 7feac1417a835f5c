"""The file of a calibration: one safetensors file, whose metadata say which model was measured. docs/calibration.md
defines it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgert.errors import CorruptError, EdgertError, UnsupportedError

Tensors = Mapping[str, NDArray[Any]]

VERSION = 1
_METADATA = "edgert.calibration"
MAX_BYTES = 64 << 30

_MAX_LAYERS = 4096
_MAX_SIZE = 1 << 20
_DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8"}
# Where a dense matrix of a layer finds the moments of its input; matrices that read the same rows share them.
INPUTS = {
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
    rf"(?:layers\.(\d{{1,4}})\.(?:{'|'.join(map(re.escape, sorted({*INPUTS.values(), 'router.input', 'residual'})))})|output)"
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
    """What of a bundle's recipe a calibration depends on, and of its dense tensors' `checksums` by name those that tell."""
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
        # f32 whatever else a bundle holds, so that bundles of one checkpoint have them alike.
        checksums={name: checksums[name] for name in _telling(moe) if name in checksums} if checksums else {},
    )


def _telling(moe: Sequence[MoeLayer]) -> list[str]:
    return ["final_norm", *(f"layers.{row.layer}.router" for row in moe[:1])]


def triangle_size(n: int) -> int:
    """Elements of the lower triangle of an [n, n] matrix, its diagonal included: row after row, as files hold it."""
    return n * (n + 1) // 2


def triangle_side(size: int) -> int:
    return (math.isqrt(8 * size + 1) - 1) // 2


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
        add("residual.diagonal", "F32", hidden)
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
        side = triangle_side(shape[0]) if plausible and match[2] == "triangle" else 0
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

    if _METADATA not in metadata:
        raise CorruptError(f"{path}: not a calibration: its metadata have no {_METADATA!r}")
    values = parse_json_object(metadata[_METADATA].encode(), f"{path}: {_METADATA}")
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


# --- reading and writing --------------------------------------------------------------------------------


def read(path: Path) -> tuple[Measured, int, int, dict[str, NDArray[Any]]]:
    """Model, tokens, window and tensors of a file, whose sizes are checked before anything is allocated; the values are
    not. Raises NotFoundError, StorageError, CorruptError, and UnsupportedError for a newer format."""
    from edgert.converters.files import InputFile
    from edgert.converters.safetensors import read_header_and_metadata

    infos, metadata = read_header_and_metadata(path)
    model, tokens, window = _parse_metadata(path, metadata)
    expected = _expected(model)
    for info in infos:
        _check_shape(path, info.name, info.dtype, info.shape, model, expected)
    for name, row in expected.items():
        if row.required and not row.held_by(infos):
            raise CorruptError(f"{path}: tensor {name!r} is missing")
    if infos and infos[-1].end > MAX_BYTES:
        raise CorruptError(f"{path}: {infos[-1].end} bytes; at most {MAX_BYTES} are allowed")
    tensors: dict[str, NDArray[Any]] = {}
    with InputFile(path) as file:
        for info in infos:
            raw = file.read(info.begin, info.end - info.begin)
            tensors[info.name] = np.frombuffer(raw, _DTYPES[info.dtype]).reshape(info.shape)
    return model, tokens, window, tensors


def is_calibration(path: Path) -> bool:
    """Whether the file says that it is one."""
    from edgert.converters.safetensors import read_header_and_metadata

    try:
        return _METADATA in read_header_and_metadata(path)[1]
    except EdgertError:
        return False


def write(path: Path, model: Measured, tokens: int, window: int, tensors: Tensors) -> None:
    """Raises StorageError."""
    from edgert.converters.safetensors_writer import write_safetensors

    stated = {"version": VERSION, "tokens": tokens, "window": window, "model": asdict(model)}
    write_safetensors(path, tensors, {_METADATA: json.dumps(stated)})
