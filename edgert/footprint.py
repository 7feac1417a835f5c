"""What a model weighs: in bytes on disk, in memory and a token, before or after there is a bundle of it."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert import _native
from edgert.bundle import Bundle
from edgert.errors import CorruptError, NotFoundError


@dataclass(frozen=True)
class Experts:
    """One MoE layer's. Bytes are those of extents, as they are read."""

    used: int  # a token
    weights: int  # of one expert
    extents: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.extents)

    @property
    def bytes(self) -> int:
        return sum(self.extents)

    @property
    def token_bytes(self) -> float:
        """Of the experts that a token uses, on average."""
        return self.used * self.bytes / self.count

    @property
    def use(self) -> float:
        """The probability that a token uses a certain expert, all being alike."""
        return self.used / self.count


@dataclass(frozen=True)
class Footprint:
    name: str
    recipe: Mapping[str, Any]
    dense_bytes: int  # dense.bin, resident
    dense_token_bytes: int  # of them, what every token reads
    dense_token_weights: int  # likewise, without the output head, which a prompt needs once
    key_format: str
    layers: tuple[Experts, ...]  # those that have some
    disk_bytes: int  # of the bundle
    checkpoint_bytes: int | None = None  # of its source, where that is known
    reserved_bytes: int = 0  # of the budget, by the tokenizer

    @property
    def expert_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    def plan(self, memory_bytes: int, *, threads: int, context: int = 0) -> dict[str, int]:
        """How a budget would be divided; see _native.plan_memory. Raises BudgetError naming the smallest that works."""
        runtime = _native.Runtime(memory_bytes, threads=threads, io_threads=1)
        runtime.reserve(self.reserved_bytes)
        return _native.plan_weights(
            runtime,
            name=self.name,
            recipe_json=json.dumps(self.recipe),
            dense_bytes=self.dense_bytes,
            key_format=self.key_format,
            expert_bytes=[list(layer.extents) for layer in self.layers],
            context=context,
        )


def of_bundle(bundle: Bundle, reserved_bytes: int = 0) -> Footprint:
    """`reserved_bytes`: what the tokenizer takes."""
    recipe, tensors = bundle.recipe, bundle.manifest["tensors"]
    extents = {row["layer"]: tuple(extent[2] for extent in row["extents"]) for row in bundle.manifest["experts"]}
    return _footprint(
        bundle.name,
        recipe,
        [(row["name"], tuple(row["shape"]), row["bytes"], row["format"]) for row in tensors],
        extents,
        dense_bytes=bundle.sizes["dense_bytes"],
        disk_bytes=bundle.bytes,
        reserved_bytes=reserved_bytes,
    )


def of_config(
    name: str, config: Mapping[str, Any], where: str, *, device: str | None = None, **formats: str | None
) -> Footprint:
    """The bundle that `edgert convert` would make of a checkpoint with this config.json.

    `device` and `formats` (dense_format, expert_format, embedding_format, output_format) as convert() takes them; `where`
    names the configuration in messages. Raises UnsupportedError for a model that cannot be converted, CorruptError for
    a configuration that no model has.
    """
    from edgert.converters.convert import layout_of
    from edgert.converters.registry import expected_decoder

    decoder = expected_decoder(config, where)
    layout = layout_of(decoder, device=device, **formats)
    extents: dict[int, list[int]] = {}
    for extent in layout.experts:
        assert extent.expert is not None
        extents.setdefault(extent.expert[0], []).append(extent.bytes)
    sources = [tensor.source for tensor in decoder.dense]
    for expert in decoder.experts:
        sources += [expert.gate, expert.up, expert.down]
    rows = zip(decoder.dense, layout.dense, strict=True)
    page = _native.page_size()
    return _footprint(
        name,
        decoder.recipe,
        [(tensor.name, tensor.shape, extent.bytes, extent.parts[0].format) for tensor, extent in rows],
        {layer: tuple(sizes) for layer, sizes in extents.items()},
        dense_bytes=-(-layout.files[0].bytes // page) * page,
        disk_bytes=layout.bytes,
        checkpoint_bytes=sum(source.rows * source.row_bytes for source in sources),
    )


def read_config(path: Path) -> dict[str, Any]:
    """The object in a config.json. Raises NotFoundError or CorruptError."""
    from edgert.converters.strict_json import read_json_object

    if not os.path.lexists(path):
        raise NotFoundError(f"{path}: no such file")
    return read_json_object(path, max_bytes=1 << 20)


Tensor = tuple[str, tuple[int, ...], int, str]  # name, shape, bytes, format


def _footprint(
    name: str,
    recipe: Mapping[str, Any],
    tensors: Iterable[Tensor],
    extents: Mapping[int, tuple[int, ...]],
    **sizes: Any,
) -> Footprint:
    output = "embedding" if recipe["output"]["tied"] else "output"
    read = {row[0]: row for row in tensors if row[0] == output or row[0] != "embedding"}
    matrices = [row[1] for row in read.values() if len(row[1]) == 2 and row[0] != output]
    layers = []
    for layer, sizes_of_experts in sorted(extents.items()):
        ffn = recipe["blocks"][recipe["layers"][layer]]["ffn"]
        weights = 3 * recipe["hidden_size"] * ffn["moe_intermediate_size"]
        layers.append(Experts(ffn["num_experts_per_tok"], weights, sizes_of_experts))
    key = read.get("layers.0.attention.k")
    if key is None:
        raise CorruptError(f"{name}: tensor layers.0.attention.k is missing")
    return Footprint(
        name=name,
        recipe=recipe,
        dense_token_bytes=sum(row[2] for row in read.values()),
        dense_token_weights=sum(map(math.prod, matrices)),
        key_format=key[3],
        layers=tuple(layers),
        **sizes,
    )
