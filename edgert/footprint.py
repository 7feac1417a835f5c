"""What a model weighs and needs, before or after there is a bundle of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import _native, gguf, roof
from edgert.bundle import Bundle, locate
from edgert.errors import InvalidArgumentError, NotFoundError
from edgert.shapes import SHAPES

if TYPE_CHECKING:
    from edgert.converters.decoder import Decoder
    from edgert.converters.layout import Layout


@dataclass(frozen=True)
class ModelSizes:
    """Sizes in bytes. `extent_bytes` are those of every expert, by MoE layer."""

    name: str
    recipe: Mapping[str, Any]
    weights: roof.Footprint
    dense_bytes: int  # of dense.bin, which stays in memory
    key_format: str  # of the first layer's key projection that there is
    extent_bytes: list[list[int]]
    disk_bytes: int
    checkpoint_bytes: int | None = None  # of what it is converted from
    reserved_bytes: int = 0  # of the budget, by the tokenizer
    join_bytes: int = 0  # of the budget, where experts are split

    def plan(self, memory_bytes: int, *, threads: int = 0, context: int = 0) -> dict[str, int]:
        """How a budget would be divided; see _native.plan_memory. Raises BudgetError naming the smallest that works."""
        runtime = _native.Runtime(memory_bytes, threads=threads, io_threads=1)
        runtime.reserve(self.reserved_bytes)
        return _native.plan_weights(
            runtime,
            name=self.name,
            recipe_json=json.dumps(self.recipe),
            dense_bytes=self.dense_bytes,
            key_format=self.key_format,
            expert_bytes=self.extent_bytes,
            join_bytes=self.join_bytes,
            context=context,
        )

    def needs(self, *, threads: int = 0, context: int = 0) -> dict[str, int]:
        """minimum_bytes, the smallest budget that works; resident_bytes, the one from which on every expert stays in memory;
        context (tokens)."""
        plan = self.plan(1 << 60, threads=threads, context=context)
        return {name: plan[name] for name in ("minimum_bytes", "resident_bytes", "context")}


def sizes_of_bundle(bundle: Bundle, reserved_bytes: int = 0) -> ModelSizes:
    """`reserved_bytes`: what the tokenizer takes of a budget. Raises UnsupportedError where another engine runs the model."""
    return _sizes(
        bundle.name,
        {**bundle.manifest, "recipe": bundle.recipe},
        dense_bytes=bundle.sizes["dense_bytes"],
        disk_bytes=bundle.bytes,
        reserved_bytes=reserved_bytes,
    )


def sizes_of_config(
    name: str, config: Mapping[str, Any], where: str, *, device: str | None = None, **formats: str | None
) -> ModelSizes:
    """The bundle that convert() would make of a checkpoint with this config.json, which needs no weights.

    `device` and `formats` (dense_format, expert_format, embedding_format, output_format) as convert() takes them; `where`
    names the configuration in messages. Raises UnsupportedError for a model that cannot be converted, CorruptError for
    a configuration that no model has.
    """
    from edgert.converters.registry import expected_decoder

    return sizes_of_decoder(name, expected_decoder(config, where), device=device, **formats)


def sizes_of_decoder(
    name: str, decoder: "Decoder", *, device: str | None = None, **formats: str | None
) -> ModelSizes:
    """The bundle that convert() would make of it."""
    from edgert.converters.convert import layout_of

    layout = layout_of(decoder, device=device, **formats)
    sources = [tensor.source for tensor in decoder.dense]
    for expert in decoder.experts:
        sources += (*expert.sources, *expert.biases)
    page = _native.page_size()
    return _sizes(
        name,
        _manifest(decoder, layout),
        dense_bytes=-(-layout.files[0].bytes // page) * page,
        disk_bytes=layout.bytes,
        checkpoint_bytes=sum(source.bytes for source in sources),
    )


def _manifest(decoder: "Decoder", layout: "Layout") -> dict[str, Any]:
    """What is known of the manifest before anything is packed."""
    experts: dict[int, list[list[Any]]] = {}
    for extent in layout.experts:
        assert extent.expert is not None
        experts.setdefault(extent.expert[0], []).append([extent.file, extent.offset, extent.bytes])
    return {
        "recipe": decoder.recipe,
        "tensors": [
            {
                "name": tensor.name,
                "shape": tensor.shape,
                "bytes": extent.bytes,
                "format": extent.parts[0].format,
            }
            for tensor, extent in zip(decoder.dense, layout.dense, strict=True)
        ],
        "experts": [{"layer": layer, "extents": extents} for layer, extents in experts.items()],
    }


def _sizes(name: str, manifest: Mapping[str, Any], **sizes: Any) -> ModelSizes:
    formats = {row["name"]: row["format"] for row in manifest["tensors"]}
    # A split expert's row goes on with what its base has.
    bases = [extent[5] for layer in manifest["experts"] for extent in layer["extents"] if len(extent) > 5]
    page = _native.page_size()
    return ModelSizes(
        name=name,
        recipe=manifest["recipe"],
        weights=roof.Footprint.of(manifest),
        key_format=next(
            (f for name, f in formats.items() if name.endswith((".attention.k", ".attention.kv_a"))), "f32"
        ),
        extent_bytes=[[extent[2] for extent in layer["extents"]] for layer in manifest["experts"]],
        join_bytes=-(-max(bases, default=0) // page) * page,
        **sizes,
    )


# --- finding one --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What a plan is about. `kind` is bundle, shape, checkpoint or config (a checkpoint's config.json without its weights)."""

    kind: str
    path: Path | None  # None for a shape
    sizes: ModelSizes


def memory_needs(bundle: Bundle) -> dict[str, int]:
    """What `bundle` needs with the default knobs: minimum_bytes, the smallest budget that works; resident_bytes, the one
    from which on every expert stays in memory; context (tokens)."""
    return _of_bundle(bundle).needs()


def find(text: str, *, device: str | None = None, **formats: str | None) -> Subject:
    """The bundle, checkpoint directory, config.json, GGUF file or shape that `text` names; a path goes before a name.

    `device` and `formats` are those of a conversion. Raises NotFoundError saying what was looked for,
    InvalidArgumentError for formats of a bundle, which has its own, and what reading it raises.
    """
    path = Path(text)
    config = path / "config.json" if path.is_dir() else path
    if not (path / "manifest.json").exists() and config.suffix == ".json" and config.is_file():
        return _of_checkpoint(config, device, formats)
    if gguf.is_gguf(path):
        return Subject("checkpoint", path, sizes_of_gguf(path, device=device, **formats))
    if text in SHAPES and not path.exists():
        return _of_shape(text, device, formats)
    try:
        place = locate(text)
    except NotFoundError as error:
        raise NotFoundError(
            f"{error}; a checkpoint's directory, its config.json, a GGUF file or a shape ({', '.join(SHAPES)}) would do too"
        ) from None
    if device is not None or any(formats.values()):
        raise InvalidArgumentError(f"{text}: is a bundle, whose formats are chosen already")
    return Subject("bundle", place, _of_bundle(Bundle.open(place)))


def _of_bundle(bundle: Bundle) -> ModelSizes:
    from edgert.tokenizer import tokenizer_of

    tokenizer = tokenizer_of(bundle)
    return sizes_of_bundle(bundle, 0 if tokenizer is None else tokenizer.memory_bytes)


def sizes_of_gguf(path: Path, *, device: str | None = None, **formats: str | None) -> ModelSizes:
    """The bundle that convert() would make of a GGUF file. Raises what reading it raises."""
    from edgert.converters.checkpoint import open_checkpoint
    from edgert.converters.registry import read_decoder

    return sizes_of_decoder(gguf.name(path), read_decoder(open_checkpoint(path)), device=device, **formats)


def _of_checkpoint(config: Path, device: str | None, formats: Mapping[str, str | None]) -> Subject:
    from edgert.converters.strict_json import read_json_object

    directory = config.parent.resolve()
    values = read_json_object(config, max_bytes=1 << 20)
    kind = "checkpoint" if any(directory.glob("*.safetensors")) else "config"
    return Subject(
        kind,
        config.parent,
        sizes_of_config(directory.name or "model", values, str(config), device=device, **formats),
    )


def _of_shape(name: str, device: str | None, formats: Mapping[str, str | None]) -> Subject:
    """In the formats that `edgert bench --shape` chooses, unless a device or formats are given."""
    given = {kind: value for kind, value in formats.items() if value is not None}
    if device is None:
        given = {"dense_format": "int4", "expert_format": "int4", **given}
    return Subject(
        "shape", None, sizes_of_config(name, SHAPES[name], f"shape {name}", device=device, **given)
    )
