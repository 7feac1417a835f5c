"""The grid of weights that a bundle's codes can express, for training that ends on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgert import _native

TILE_ROWS = 16


@dataclass(frozen=True)
class Grid:
    """Of each weight: its dequantised value, what a step of its code is worth, and how many steps down and up there are."""

    value: Tensor
    step: Tensor
    down: Tensor
    up: Tensor

    def at(self, places: Tensor) -> Grid:
        """Of some of the weights, counted as if they were in one row."""
        return Grid(*(part.flatten()[places] for part in (self.value, self.step, self.down, self.up)))

    def snapped(self, delta: Tensor) -> Tensor:
        """The nearest deltas that are whole steps and end at a code."""
        steps = torch.nan_to_num(delta / self.step).round()
        return self.step * torch.minimum(torch.maximum(steps, -self.down), self.up)

    @staticmethod
    def stacked(grids: Sequence[Grid]) -> Grid:
        def stack(parts: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(parts)) if len(parts) > 1 else parts[0]

        return Grid(*(stack([getattr(grid, name) for grid in grids]) for name in Grid.__dataclass_fields__))


def grid_of(format: Mapping[str, Any], packed: bytes, rows: int, cols: int) -> Grid:
    """Of a packed matrix whose scales are f16 a group and whose zeros are codes (docs/bundle-format.md)."""
    if format["scale"] != "f16" or format["zero"] not in ("none", "u8") or format["codebook"] != "none":
        raise SystemExit(f"--grid: the codes of {format['name']} are not evenly spaced; int8 and int4 are")
    bits, group = format["bits"], format["group"]
    groups = -(-cols // group)
    tiles = np.frombuffer(packed, np.uint8).reshape(-(-rows // TILE_ROWS), -1)
    codes_bytes = TILE_ROWS * groups * group * bits // 8
    scales = tiles[:, codes_bytes : codes_bytes + 2 * TILE_ROWS * groups].copy().view(np.float16)
    after = codes_bytes + scales.nbytes // len(tiles)
    if format["zero"] == "u8":
        zeros = tiles[:, after : after + TILE_ROWS * groups].astype(np.float32)
    else:
        zeros = np.full((len(tiles), TILE_ROWS * groups), 2.0 ** (bits - 1), np.float32)

    def of_weights(part: np.ndarray) -> Tensor:
        """[tile][group][16 rows] for every weight."""
        by_row = part.reshape(len(tiles), groups, TILE_ROWS).transpose(0, 2, 1).reshape(-1, groups)
        return torch.from_numpy(np.repeat(by_row, group, axis=1)[:rows, :cols].astype(np.float32))

    value = np.frombuffer(_native.unpack(format["name"], packed, rows, cols), np.float32).copy()
    step, zero = of_weights(scales), of_weights(zeros)
    lowest = 1 if format["zero"] == "none" else 0
    code = torch.nan_to_num(torch.from_numpy(value).view(rows, cols) / step).round() + zero
    return Grid(torch.from_numpy(value).view(rows, cols), step, code - lowest, 2**bits - 1 - code)


def read_grids(bundle: Path) -> dict[str, Grid]:
    """Of the matrices of attention and experts, by the paths of transformers' modules."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf8"))
    formats = {row["name"]: row for row in _native.formats()}
    files = [np.memmap(bundle / file["name"], np.uint8, "r") for file in manifest["files"]]
    grids = {}
    for tensor in manifest["tensors"]:
        source = tensor.get("source", "")
        if "_proj" in source:
            packed = files[tensor["file"]][tensor["offset"] :][: tensor["bytes"]].tobytes()
            path = source.removesuffix(".weight")
            grids[path] = grid_of(formats[tensor["format"]], packed, *tensor["shape"])
    recipe = manifest["recipe"]
    for layer in manifest["experts"]:
        block = recipe["blocks"][recipe["layers"][layer["layer"]]]
        hidden, inner = recipe["hidden_size"], block["ffn"]["moe_intermediate_size"]
        for expert, (file, offset, size, _, chosen) in enumerate(layer["extents"]):
            extent = files[file][offset : offset + size].tobytes()
            shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
            for name, format in zip(shapes, manifest["expert_formats"][chosen], strict=True):
                packed_bytes = _native.packed_bytes(format, *shapes[name])
                path = f"model.layers.{layer['layer']}.mlp.experts.{expert}.{name}"
                grids[path] = grid_of(formats[format], extent[:packed_bytes], *shapes[name])
                extent = extent[packed_bytes:]
    return grids
