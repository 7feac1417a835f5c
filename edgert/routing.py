"""Routing imposed on a model for a measurement: random weights then page as a real model, or as the worst case, does."""

import json
import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgert.converters.strict_json import parse_json
from edgert.errors import CorruptError, InvalidArgumentError, NotFoundError, StorageError

# Expert ids by position, MoE layer and choice; positions past the end begin again.
Table = list[list[list[int]]]

_MAX_LINE_BYTES = 1 << 20
_MAX_TOKENS = 1 << 20


def imposed(option: str, recipe: Mapping[str, Any], positions: int) -> Table:
    """The table that `option` names: "uniform" (drawn, one entry a position) or "trace:FILE".

    Raises InvalidArgumentError for another option, a model without routed experts and a trace of another model;
    NotFoundError, StorageError or CorruptError, naming the line, for the file.
    """
    layers = moe_layers(recipe)
    if not layers:
        raise InvalidArgumentError(f"routing: found {option[:60]!r}, but this model has no routed experts")
    if option == "uniform":
        return uniform(layers, positions)
    kind, colon, file = option.partition(":")
    if kind == "trace" and colon and file:
        return read_trace(Path(file), layers)
    raise InvalidArgumentError(f"routing: found {option[:60]!r}, allowed are uniform and trace:FILE")


def moe_layers(recipe: Mapping[str, Any]) -> list[tuple[int, int]]:
    """num_experts and num_experts_per_tok of each layer with routed experts."""
    ffns = [recipe["blocks"][block]["ffn"] for block in recipe["layers"]]
    return [(ffn["num_experts"], ffn["num_experts_per_tok"]) for ffn in ffns if ffn["kind"] == "moe"]


def uniform(layers: list[tuple[int, int]], positions: int, seed: int = 0) -> Table:
    """Experts drawn alike and apart at every position and layer: the worst case of any cache."""
    draw = random.Random(seed)
    return [[sorted(draw.sample(range(experts), top)) for experts, top in layers] for _ in range(positions)]


def read_trace(path: Path, layers: list[tuple[int, int]]) -> Table:
    """Read JSON lines {"tok": n, "layers": [[expert ids], ...]}, one a token in order, for a model with these `layers`
    (see moe_layers)."""
    table: Table = []
    try:
        with path.open("rb") as file:
            previous = None
            while line := file.readline(_MAX_LINE_BYTES + 1):
                where = f"{path}: line {len(table) + 1}"
                if len(line) > _MAX_LINE_BYTES or len(table) == _MAX_TOKENS:
                    raise CorruptError(
                        f"{where}: allowed are {_MAX_LINE_BYTES} bytes a line and {_MAX_TOKENS} lines"
                    )
                token, experts = _entry(line, where)
                if previous is not None and token != previous + 1:
                    raise CorruptError(f"{where}: tok: found {token} after {previous}; tokens stand in order")
                previous = token
                _check(experts, layers, where)
                table.append(experts)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    if not table:
        raise CorruptError(f"{path}: is empty; a trace has a line for each token")
    return table


def write_trace(path: Path, table: Table) -> None:
    """What read_trace() reads. Raises StorageError."""
    try:
        with path.open("w") as file:
            for token, layers in enumerate(table, 1):
                file.write(json.dumps({"tok": token, "layers": layers}) + "\n")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error


def _entry(line: bytes, where: str) -> tuple[int, list[list[int]]]:
    """A line's token number and experts, as what they must be."""
    value = parse_json(line, where)
    if not isinstance(value, dict) or value.keys() != {"tok", "layers"} or type(value["tok"]) is not int:
        raise CorruptError(
            f'{where}: found {str(value)[:60]}; needed is {{"tok": n, "layers": [[id, …], …]}}'
        )
    layers = value["layers"]
    if not isinstance(layers, list) or not all(
        isinstance(ids, list) and all(type(id) is int for id in ids) for ids in layers
    ):
        raise CorruptError(f"{where}: layers: found {str(layers)[:60]}; needed are lists of expert ids")
    return value["tok"], layers


def _check(experts: list[list[int]], layers: list[tuple[int, int]], where: str) -> None:
    if len(experts) != len(layers):
        raise InvalidArgumentError(f"{where}: found {len(experts)} layers, this model has {len(layers)}")
    for index, (ids, (count, top)) in enumerate(zip(experts, layers, strict=True)):
        if len(ids) != top or len(set(ids)) != top or not all(0 <= id < count for id in ids):
            raise InvalidArgumentError(
                f"{where}: layer {index}: found experts {str(ids)[:60]}; this model uses {top} different ones of 0 to "
                f"{count - 1}"
            )


def overlap(steps: Table) -> float:
    """The share of experts that were also the previous step's, in the same layer."""
    same = total = 0
    for before, after in pairwise(steps):
        for old, new in zip(before, after, strict=True):
            same += len(set(old) & set(new))
            total += len(new)
    return same / total if total else 0.0
