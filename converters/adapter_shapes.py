"""Whether what an adapter adds fits the matrices of a bundle, as far as the manifest tells: conversion has no model to ask."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgert.errors import InvalidArgumentError

from .adapter_part import Part
from .adapter_rows import VOCABULARY

_EXPERT = re.compile(r"layers[.](\d{1,5})[.]experts[.](\d{1,6})[.](gate|up|down)")
_GIVEN = re.compile(r"(layers[.]\d{1,5}[.]attention[.])given_(keys|values)")


class Shapes:
    """[rows, cols] of what adapters change of a bundle, by name; of a norm [1, size]. With `added_rows` of the vocabulary."""

    def __init__(self, manifest: Mapping[str, Any], added_rows: int = 0) -> None:
        self._added_rows = added_rows
        self._recipe = manifest["recipe"]
        self._dense = {tensor["name"]: tensor["shape"] for tensor in manifest["tensors"]}

    def of(self, target: str) -> tuple[int, int]:
        """Raises InvalidArgumentError where the bundle has nothing of this name."""
        shape = self._dense.get(target)
        if shape is None and target == "output":
            shape = self._dense["embedding"]
        given = _GIVEN.fullmatch(target)
        if given is not None:
            width = self._dense.get(given[1] + "kv"[given[2] == "values"])
            shape = None if width is None else (1, width[0])
        expert = _EXPERT.fullmatch(target)
        if expert is not None:
            shape = self._of_expert(int(expert[1]), int(expert[2]), expert[3])
        if shape is None or len(shape) > 2:
            raise InvalidArgumentError(f"the base has no matrix {target[:120]!r}")
        added = self._added_rows if target in VOCABULARY else 0
        return (shape[0] + added, shape[1]) if len(shape) == 2 else (1, shape[0])

    def _of_expert(self, layer: int, expert: int, part: str) -> tuple[int, int] | None:
        layers = self._recipe["layers"]
        if layer >= len(layers):
            return None
        ffn = self._recipe["blocks"][layers[layer]]["ffn"]
        if ffn["kind"] != "moe" or expert >= ffn["num_experts"]:
            return None
        width, hidden = ffn["moe_intermediate_size"], self._recipe["hidden_size"]
        return (hidden, width) if part == "down" else (width, hidden)


def check_parts(parts: Iterable[Part], manifest: Mapping[str, Any], path: Path, added_rows: int = 0) -> None:
    """Raises InvalidArgumentError for parts that do not fit, naming the adapter's `path`."""
    shapes = Shapes(manifest, added_rows)
    for part in parts:
        try:
            _check(part, shapes.of(part.target))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{path}: {error}") from None


def _check(part: Part, shape: tuple[int, int]) -> None:
    found = {
        "A": None if part.a is None else part.a.shape[1],
        "B": None if part.b is None else part.b.shape[0],
        "gain": None if part.gain is None else len(part.gain),
        "weights": None if part.weights is None else part.weights.shape[1],
        "gate": None if part.gate is None else len(part.gate),
    }
    needed = {"A": shape[1], "B": shape[0], "gain": shape[0], "weights": shape[1], "gate": shape[1]}
    for name, length in found.items():
        if length is not None and length != needed[name]:
            raise InvalidArgumentError(
                f"{part.target}: {name} is of {length} numbers, the base's matrix is {list(shape)}"
            )
    check_places(part, shape)


def check_places(part: Part, shape: tuple[int, int]) -> None:
    """Raises InvalidArgumentError where a sparse value stands outside the matrix."""
    if part.rows is None or part.cols is None:
        return
    outside = (part.rows < 0) | (part.cols < 0) | (part.rows >= shape[0]) | (part.cols >= shape[1])
    if outside.any():
        first = int(outside.argmax())
        raise InvalidArgumentError(
            f"{part.target}: value {first} stands at [{part.rows[first]}, {part.cols[first]}], the matrix is {list(shape)}"
        )
