"""The bundle that an adapter is for, as far as the adapter must know it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert.errors import InvalidArgumentError

from .adapter_part import Part
from .files import InputFile

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float32]


@dataclass
class Base:
    """What must be known of the bundle."""

    path: Path
    manifest: dict[str, Any]
    by_name: dict[str, dict[str, Any]] = field(init=False)
    by_source: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.by_name = {tensor["name"]: tensor for tensor in self.manifest["tensors"]}
        self.by_source = {}
        for tensor in self.manifest["tensors"]:
            self.by_source.setdefault(tensor["source"], []).append(tensor["name"])

    @property
    def recipe(self) -> dict[str, Any]:
        recipe: dict[str, Any] = self.manifest["recipe"]
        return recipe

    @property
    def architecture(self) -> str:
        return str(self.recipe["architecture"])

    @property
    def from_gguf(self) -> bool:
        return any(source.startswith("blk.") for source in self.by_source)

    def block(self, layer: int) -> dict[str, Any]:
        layers = self.recipe["layers"]
        if layer >= len(layers):
            raise InvalidArgumentError(f"layer {layer}; the base has {len(layers)} layers")
        block: dict[str, Any] = self.recipe["blocks"][layers[layer]]
        return block

    def key_width(self, layer: int) -> int:
        """Of a layer's keys, and of its values; 0 where it does not attend, or by latents."""
        tensor = self.by_name.get(f"layers.{layer}.attention.k")
        return 0 if tensor is None else int(tensor["shape"][0])

    def vector(self, name: str) -> "Array":
        import numpy as np

        tensor = self.by_name[name]
        with InputFile(self.path / self.manifest["files"][tensor["file"]]["name"]) as file:
            return np.frombuffer(file.read(tensor["offset"], tensor["bytes"]), np.float32)

    def weights(self, name: str) -> "Array":
        """A dense matrix as it is used."""
        import numpy as np

        tensor = self.by_name[name]
        rows, cols = tensor["shape"]
        with InputFile(self.path / self.manifest["files"][tensor["file"]]["name"]) as file:
            packed = file.read(tensor["offset"], tensor["bytes"])
        return np.frombuffer(_native.unpack(tensor["format"], packed, rows, cols), np.float32).reshape(
            rows, cols
        )


def matrix_shape(manifest: Mapping[str, Any], target: str) -> tuple[int, int]:
    """Of a bundle's matrix, dense or an expert's. Raises InvalidArgumentError where it has none of this name."""
    recipe = manifest["recipe"]
    names = () if ".experts." in target else (target, "embedding" if target == "output" else target)
    for name in names:
        for tensor in manifest["tensors"]:
            if tensor["name"] == name and len(tensor["shape"]) == 2:
                return tensor["shape"][0], tensor["shape"][1]
    match = re.fullmatch(r"layers[.](\d{1,5})[.]experts[.](\d{1,6})[.](gate|up|down)", target)
    if match is not None and int(match[1]) < len(recipe["layers"]):
        ffn = recipe["blocks"][recipe["layers"][int(match[1])]]["ffn"]
        if ffn["kind"] == "moe" and int(match[2]) < ffn["num_experts"]:
            shape = (ffn["moe_intermediate_size"], recipe["hidden_size"])
            return shape[::-1] if match[3] == "down" else shape
    raise InvalidArgumentError(f"adapter: the base has no matrix {target[:120]!r}")


def check_part(path: Path, manifest: Mapping[str, Any], part: Part) -> None:
    """A part of the adapter at `path`, against the shape of the base's matrix. Raises InvalidArgumentError."""
    import numpy as np

    if ".given_" in part.target:  # keys and values, of which the base has none
        return
    norm = None
    if part.target.endswith("_norm"):
        shapes = (tensor["shape"] for tensor in manifest["tensors"] if tensor["name"] == part.target)
        norm = next((shape for shape in shapes if len(shape) == 1), None)
    try:
        rows, cols = matrix_shape(manifest, part.target) if norm is None else (norm[0], 1)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{path}: {error}") from None
    sides = {"A": (part.a, 1, cols), "B": (part.b, 0, rows), "gate": (part.gate, 0, cols)}
    sides |= {
        "gain": (part.gain, 0, rows),
        "shift": (part.shift, 0, rows),
        "weights": (part.weights, 1, cols),
    }
    for name, (array, side, needed) in sides.items():
        if array is not None and array.shape[side] != needed:
            raise InvalidArgumentError(
                f"{path}: {part.target}: {name}: shape {list(array.shape)}, the matrix is {[rows, cols]}"
            )
    if part.rows is None or part.cols is None:
        return
    outside = np.flatnonzero((part.rows < 0) | (part.rows >= rows) | (part.cols < 0) | (part.cols >= cols))
    if len(outside):
        at = [int(part.rows[outside[0]]), int(part.cols[outside[0]])]
        raise InvalidArgumentError(
            f"{path}: {part.target}: value {outside[0]} stands at {at}, the matrix is {[rows, cols]}"
        )
