"""Quantised checkpoints whose parts or settings are wrong: a typed error that names the tensor and the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import convert
from quantised import CONFIG, Parts, Scheme, quantised_parts, write_quantised
from quantised_schemes import SCHEMES

from edgert.converters.checkpoint import open_checkpoint
from edgert.converters.registry import read_decoder
from edgert.errors import CorruptError, EdgertError, UnsupportedError

EXPERT = "model.layers.1.mlp.experts.2.down_proj."  # [128, 192]
Damage = Callable[[Parts], None]


@cache
def sound(name: str) -> tuple[Scheme, Parts]:
    scheme = next(scheme for scheme in SCHEMES if scheme.name == name)
    scheme = replace(scheme, stacked=False)
    return scheme, quantised_parts(scheme)[0]


def drop(part: str) -> Damage:
    def damage(parts: Parts) -> None:
        del parts[EXPERT + part]

    return damage


def put(part: str, dtype: str, array: Any) -> Damage:
    def damage(parts: Parts) -> None:
        parts[EXPERT + part] = (dtype, np.asarray(array))

    return damage


def edit(part: str, change: Callable[[np.ndarray], Any]) -> Damage:
    """Changes the elements of a part."""

    def damage(parts: Parts) -> None:
        dtype, array = parts[EXPERT + part]
        parts[EXPERT + part] = (dtype, change(array.copy()))

    return damage


def at(index: tuple[int, ...], value: float) -> Callable[[np.ndarray], Any]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


def nothing(parts: Parts) -> None:
    """The settings alone are wrong."""


@dataclass
class Row:
    scheme: str
    damage: Damage
    names: str  # what the message must name
    error: type[EdgertError] = CorruptError
    settings: dict[str, Any] | None = None  # that differ

    def __str__(self) -> str:
        return f"{self.scheme}: {self.names}"


GPTQ, ZEROS, ORDER = "gptq-4-128-v1", "gptq-4-64-zeros-v1", "gptq-4-64-v1-order"
PACKED, PACKED_ZEROS = "compressed-4-64-BF16", "compressed-4--1-F16-zeros"
MLX = "mlx-4-32-F16"
ROWS = [
    Row(GPTQ, drop("scales"), EXPERT + "scales"),
    Row(GPTQ, drop("qzeros"), EXPERT + "qzeros"),
    Row(GPTQ, drop("qweight"), EXPERT + "weight"),
    Row(GPTQ, put("weight", "F32", np.zeros((128, 192))), EXPERT + "weight"),
    Row(GPTQ, edit("scales", lambda a: a[:1]), EXPERT + "scales"),
    Row(GPTQ, edit("scales", lambda a: a[0]), EXPERT + "scales"),
    Row(GPTQ, edit("scales", lambda a: a[:, :0]), EXPERT + "scales"),
    Row(GPTQ, edit("scales", at((0, 3), np.inf)), EXPERT + "scales"),
    Row(GPTQ, edit("scales", at((1, 7), np.nan)), "column 7"),
    Row(GPTQ, edit("qzeros", lambda a: a[:, 1:]), EXPERT + "qzeros"),
    Row(GPTQ, edit("qweight", lambda a: a[:, 8:]), EXPERT + "qweight"),
    Row(GPTQ, edit("qweight", lambda a: a[4:]), EXPERT + "g_idx"),
    Row(GPTQ, put("qweight", "F16", np.zeros((24, 128))), EXPERT + "qweight"),
    Row(GPTQ, edit("g_idx", lambda a: a[1:]), EXPERT + "g_idx"),
    Row(GPTQ, nothing, "group_size", settings={"group_size": 0}),
    Row(GPTQ, nothing, "groups of 32", settings={"group_size": 32}),
    Row(GPTQ, nothing, "group_size", settings={"group_size": "128"}),
    Row(GPTQ, nothing, "bits", settings={"bits": 5}),
    Row(GPTQ, nothing, "bits", settings={"bits": None}),
    Row(GPTQ, nothing, "8 bits", settings={"bits": 8}),
    Row(GPTQ, nothing, "checkpoint_format", UnsupportedError, {"checkpoint_format": "marlin"}),
    Row(GPTQ, nothing, "rotation", UnsupportedError, {"rotation": "hadamard"}),
    Row(GPTQ, nothing, "exl3", UnsupportedError, {"quant_method": "exl3"}),
    Row(ZEROS, edit("qzeros", at((1, 2), -1)), EXPERT + "qzeros", UnsupportedError),
    Row(ORDER, edit("g_idx", at((5,), 3)), EXPERT + "g_idx"),
    Row(ORDER, edit("g_idx", at((5,), -1)), EXPERT + "g_idx"),
    Row("awq", drop("qzeros"), EXPERT + "qzeros"),
    Row("awq", edit("qzeros", lambda a: a[:2]), EXPERT + "qzeros"),
    Row("awq", edit("scales", lambda a: a[:, 1:]), EXPERT + "scales"),
    Row("awq", nothing, "version", UnsupportedError, {"version": "gemv"}),
    Row("awq", nothing, "bits", settings={"bits": 3}),
    Row(PACKED, drop("weight_scale"), EXPERT + "weight_scale"),
    Row(PACKED, drop("weight_shape"), EXPERT + "weight_shape"),
    Row(PACKED, drop("weight_packed"), EXPERT + "weight"),
    Row(PACKED, put("weight_shape", "I64", [128, -192]), EXPERT + "weight_shape"),
    Row(PACKED, put("weight_shape", "I64", [128, 256]), EXPERT + "weight_packed"),
    Row(PACKED, put("weight_shape", "I64", [64, 192]), EXPERT + "weight_packed"),
    Row(PACKED, edit("weight_scale", lambda a: a[:, 1:]), EXPERT + "weight_packed"),
    Row(PACKED, edit("weight_scale", at((3, 1), np.nan)), EXPERT + "weight_scale"),
    Row(PACKED, nothing, "config_groups", settings={"config_groups": {}}),
    Row(PACKED, nothing, "config_groups: a", settings={"config_groups": {"a": {"weights": {"num_bits": 40}}}}),
    Row(PACKED, nothing, "format", UnsupportedError, {"format": "marlin-24"}),
    Row(PACKED, nothing, "sparsity_config", settings={"sparsity_config": {"format": "sparse-24-bitmask"}}),
    Row(PACKED_ZEROS, edit("weight_zero_point", lambda a: a[1:]), EXPERT + "weight_zero_point"),
    Row("compressed-int8", drop("weight_scale"), EXPERT + "weight_scale"),
    Row("compressed-fp8", edit("weight_scale", lambda a: a[1:]), EXPERT + "weight_scale"),
    Row("fp8-blocks", drop("weight_scale_inv"), EXPERT + "weight_scale_inv"),
    Row("fp8-blocks", edit("weight_scale_inv", lambda a: a[:, :1]), EXPERT + "weight_scale_inv"),
    Row("fp8-blocks", edit("weight_scale_inv", at((0, 0), np.inf)), EXPERT + "weight_scale_inv"),
    Row("fp8-blocks", edit("weight", at((17, 5), 0x7F)), "row 17, column 5"),
    Row("fp8-blocks", nothing, "weight_block_size", settings={"weight_block_size": [128]}),
    Row("fp8-blocks", nothing, "weight_block_size", settings={"weight_block_size": [0, 128]}),
    Row("fp8-blocks", nothing, "fmt", UnsupportedError, {"fmt": "e5m2"}),
    Row(MLX, drop("scales"), EXPERT + "scales"),
    Row(MLX, drop("biases"), EXPERT + "biases"),
    Row(MLX, drop("weight"), EXPERT + "weight"),
    Row(MLX, edit("biases", lambda a: a[1:]), EXPERT + "biases"),
    Row(MLX, edit("biases", at((0, 1), np.nan)), EXPERT + "biases"),
    Row(MLX, edit("weight", lambda a: a[:, 1:]), EXPERT + "weight"),
    Row(MLX, nothing, "bits", settings={"bits": 7}),
    Row(MLX, nothing, "group_size", settings={"group_size": 48}),
    Row(MLX, nothing, "weight", settings={"group_size": 64}),
    Row(MLX, nothing, "mode", UnsupportedError, {"mode": "nvfp4"}),
    Row(MLX, nothing, "not quantised", settings={EXPERT[:-1]: False}),
    Row(MLX, nothing, "bits", settings={EXPERT[:-1]: {"bits": 1}}),
    Row("mlx-mxfp4", edit("scales", at((2, 1), 255)), EXPERT + "scales"),
    Row("mlx-mxfp4", edit("scales", lambda a: a[:, 1:]), EXPERT),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_hostile_quantised_checkpoint(row: Row, tmp_path: Path) -> None:
    scheme, parts = sound(row.scheme)
    parts = dict(parts)
    row.damage(parts)
    if row.settings is not None:
        scheme = replace(scheme, settings={**scheme.settings, **row.settings}, extra={})
    checkpoint = write_quantised(tmp_path / "c", parts, scheme)
    with pytest.raises(row.error) as raised:
        convert(checkpoint, tmp_path / "model.edgert")
    assert row.names in str(raised.value) and str(checkpoint) in str(raised.value)
    assert not (tmp_path / "model.edgert").exists()


def test_the_sound_ones_are_read(tmp_path: Path) -> None:
    """What the rows damage is right before."""
    for number, name in enumerate({row.scheme for row in ROWS}):
        scheme, parts = sound(name)
        decoder = read_decoder(open_checkpoint(write_quantised(tmp_path / str(number), dict(parts), scheme)))
        assert len(decoder.experts) == CONFIG["num_hidden_layers"] * CONFIG["num_experts"]
