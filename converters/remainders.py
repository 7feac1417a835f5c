"""What a bundle's codes lack of the floats that they were made of, at the elements that an adapter changes: what patches of
codes need (native/src/adapters/patch.h)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert.errors import CorruptError, InvalidArgumentError

from .adapter_part import Part
from .adapter_shapes import check_places
from .files import InputFile

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from .decoder import Source

_PARTS = ("gate", "up", "down")
_SLAB_ROWS = 4096
_LIMIT = 100  # steps of a remainder: half a code
_MOST_BEYOND = 0.75  # of the weights; packing that weighs errors leaves many fewer


@dataclass(frozen=True)
class PackedMatrix:
    format: str
    shape: tuple[int, int]
    file: Path
    offset: int
    size: int  # bytes

    def read(self) -> bytes | bytearray:
        with InputFile(self.file) as file:
            return file.read(self.offset, self.size)


class PackedMatrices:
    """The matrices of a bundle by name, as they are packed."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self._path = path
        self._manifest = manifest
        self._dense = {tensor["name"]: tensor for tensor in manifest["tensors"]}
        self._experts = {layer["layer"]: layer["extents"] for layer in manifest["experts"]}

    def find(self, name: str) -> PackedMatrix | None:
        """None for what is no matrix of its own: a head that is tied, and experts that are split."""
        tensor = self._dense.get(name)
        if tensor is not None:
            return PackedMatrix(
                tensor["format"],
                tuple(tensor["shape"]),
                self._file(tensor["file"]),
                tensor["offset"],
                tensor["bytes"],
            )
        if ".experts." not in name:
            return None
        _, layer, _, expert, part = name.split(".")
        file, offset, _, _, formats, *split = self._experts[int(layer)][int(expert)]
        if split:
            return None
        recipe = self._manifest["recipe"]
        width = recipe["blocks"][recipe["layers"][int(layer)]]["ffn"]["moe_intermediate_size"]
        for which, form in zip(_PARTS, self._manifest["expert_formats"][formats], strict=True):
            shape = (recipe["hidden_size"], width) if which == "down" else (width, recipe["hidden_size"])
            size = _native.packed_bytes(form, *shape)
            if which == part:
                return PackedMatrix(form, shape, self._file(file), offset, size)
            offset += -(-size // 64) * 64
        return None

    def remainders(self) -> dict[str, tuple[Path, int, int, str]]:
        """Of every matrix that the bundle has them of: file, offset, bytes, checksum."""
        table = self._manifest.get("remainders")
        if table is None:
            return {}
        file = self._file(table["file"])
        return {name: (file, offset, size, checksum) for name, offset, size, checksum in table["tensors"]}

    def _file(self, index: int) -> Path:
        return self._path / str(self._manifest["files"][index]["name"])


def takes_patches(form: str) -> bool:
    row = next(row for row in _native.formats() if row["name"] == form)
    return bool(row["scale"] != "none" and row["codebook"] == "none")


def add_remainders(
    parts: Sequence[Part], path: Path, manifest: Mapping[str, Any], weights: Path | None = None
) -> None:
    """Give sparse parts their remainders and what patching leaves of error: from the checkpoint `weights`, or else from the
    bundle's own file of remainders. Parts that have some, or whose format takes no patches, are left alone.

    Raises InvalidArgumentError for a checkpoint that the bundle was not made of and values outside their matrices, CorruptError for
    damaged remainders.
    """
    matrices = PackedMatrices(path, manifest)
    wanted = [
        (part, matrix)
        for part in parts
        if part.values is not None and part.patch_error is None
        for matrix in (matrices.find(part.target),)
        if matrix is not None and takes_patches(matrix.format) and _is_inside(part, matrix)
    ]
    if not wanted:
        return
    sources = {} if weights is None else _sources(weights, manifest)
    stored = {} if weights is not None else matrices.remainders()
    for part, matrix in wanted:
        check_places(part, matrix.shape)
        if part.remainders is not None:
            pass  # of several, fused
        elif part.target in sources:
            part.remainders = _from_floats(part, matrix, sources[part.target], weights)
        elif part.target in stored:
            part.remainders = _from_bundle(part, matrix.shape, *stored[part.target])
        else:
            continue
        part.patch_error = _patch_error(part, matrix)
    if weights is not None:
        _check_near(weights, [part for part, _ in wanted if part.target in sources])


def _is_inside(part: Part, matrix: PackedMatrix) -> bool:
    """Not so where rows of added tokens are behind the base's: they have no codes."""
    return part.rows is None or not part.rows.size or int(part.rows.max()) < matrix.shape[0]


def _check_near(weights: Path, parts: Sequence[Part]) -> None:
    import numpy as np

    remainders = [part.remainders for part in parts if part.remainders is not None]
    if remainders and np.mean(np.abs(np.concatenate(remainders)) >= _LIMIT) > _MOST_BEYOND:
        raise InvalidArgumentError(
            f"{weights}: its weights are not those that the base was made of: most are more than half a code away"
        )


def _patch_error(part: Part, matrix: PackedMatrix) -> "NDArray[numpy.float32]":
    import numpy as np

    _, counts = matrix_patch(part, matrix)
    return np.array([counts["apart"], counts["beside"]], np.float32)


def matrix_patch(part: Part, matrix: PackedMatrix) -> tuple[bytes, dict[str, Any]]:
    """See _native.matrix_patch."""
    data = part.native()
    return _native.matrix_patch(
        matrix.format,
        matrix.read(),
        matrix.shape,
        data["rows"],
        data["cols"],
        data["values"],
        data.get("remainders"),
    )


def _sources(weights: Path, manifest: Mapping[str, Any]) -> "dict[str, Source]":
    from .checkpoint import open_checkpoint
    from .registry import read_decoder

    decoder = read_decoder(open_checkpoint(weights))
    if decoder.recipe != manifest["recipe"]:
        raise InvalidArgumentError(
            f"{weights}: is not the checkpoint that the base was made of: its recipe differs"
        )
    sources = {tensor.name: tensor.source for tensor in decoder.dense}
    for expert in decoder.experts:
        prefix = f"layers.{expert.layer}.experts.{expert.index}."
        sources |= {prefix + name: source for name, source in zip(_PARTS, expert.sources, strict=True)}
    return sources


def _from_floats(part: Part, matrix: PackedMatrix, source: "Source", weights: Path | None) -> "Any":
    import numpy as np

    assert part.rows is not None and part.cols is not None
    if (source.rows, source.cols) != matrix.shape:
        raise InvalidArgumentError(
            f"{weights}: {part.target}: does not fit the base's matrix {list(matrix.shape)}"
        )
    floats = np.empty(part.rows.size, np.float32)
    for first, rows, values in _slabs(source):
        here = (part.rows >= first) & (part.rows < first + rows)
        floats[here] = values[part.rows[here] - first, part.cols[here]]
    raw = _native.remainders(
        matrix.format,
        matrix.read(),
        matrix.shape,
        np.ascontiguousarray(part.rows, np.int32).data,
        np.ascontiguousarray(part.cols, np.int32).data,
        floats.data,
    )
    return np.frombuffer(raw, np.int8)


def _slabs(source: "Source") -> "Iterator[tuple[int, int, Any]]":
    """First row, rows and weights f32 [rows, cols], a few at a time."""
    import numpy as np

    dtypes = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}
    with source.tensor.open() as reader:
        for first in range(0, source.rows, _SLAB_ROWS):
            rows = min(_SLAB_ROWS, source.rows - first)
            raw, kind = reader.floats(source.first_row + first * source.step, rows, source.step)
            values = np.frombuffer(raw, dtypes[kind])
            if kind == "bf16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            yield first, rows, values.astype(np.float32, copy=False).reshape(rows, source.cols)


def _from_bundle(
    part: Part, shape: tuple[int, int], path: Path, offset: int, size: int, checksum: str
) -> "Any":
    import numpy as np

    assert part.rows is not None and part.cols is not None
    with InputFile(path) as file:
        raw = file.read(offset, size)
    if _native.xxh64(raw) != checksum or size != shape[0] * shape[1]:
        raise CorruptError(f"{path}: remainders of {part.target} at offset {offset}: checksum differs")
    return np.frombuffer(raw, np.int8).reshape(shape)[part.rows, part.cols]


def patch_report(parts: Sequence[Part], path: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By kind of matrix ("attention.q", "experts.gate"): how many matrices, sparse values, codes that a patch leaves unchanged
    and clamps, its fidelity ||realised - intended|| / ||intended||, what clamping costs, and why what is not patched is not."""
    matrices = PackedMatrices(path, manifest)
    kinds: dict[str, dict[str, Any]] = {}
    for part in parts:
        if part.values is None:
            continue
        row = kinds.setdefault(
            _kind(part.target),
            {
                "matrices": 0,
                "patched": 0,
                "values": 0,
                "unchanged": 0,
                "clamped": 0,
                "error": 0.0,
                "intended": 0.0,
                "apart": 0.0,
                "beside": 0.0,
                "not": [],
            },
        )
        matrix = matrices.find(part.target)
        row["matrices"] += 1
        row["values"] += int(part.values.size)
        why = _why_not(part, matrix)
        if why is not None or matrix is None:
            if why not in row["not"]:
                row["not"].append(why)
            continue
        _, counts = matrix_patch(part, matrix)
        row["patched"] += 1
        for name in ("unchanged", "clamped", "error", "intended", "apart", "beside"):
            row[name] += counts[name]
    return [_summed(kind, row) for kind, row in sorted(kinds.items())]


def _summed(kind: str, row: dict[str, Any]) -> dict[str, Any]:
    error, intended, apart, beside = (row.pop(name) for name in ("error", "intended", "apart", "beside"))
    if not intended:
        return {"kind": kind, **row, "fidelity": None, "loss": None}
    loss = (max(0.0, apart - beside) / (intended + beside)) ** 0.5
    return {"kind": kind, **row, "fidelity": (error / intended) ** 0.5, "loss": loss}


def _why_not(part: Part, matrix: PackedMatrix | None) -> str | None:
    if matrix is None:
        return "the base has it in another form"
    if not takes_patches(matrix.format):
        return f"{matrix.format} takes no patches"
    if not _is_inside(part, matrix):
        return "it has rows of added tokens"
    return "no remainders" if part.remainders is None else None


def _kind(target: str) -> str:
    words = [word for word in target.split(".") if not word.isdigit()]
    return ".".join(words[1:] if words[0] == "layers" else words)
