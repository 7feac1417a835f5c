"""The conversion of a checkpoint into a device bundle."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgert import _native
from edgert.calibration import Calibration
from edgert.devices import Device, load_device
from edgert.errors import CorruptError, EdgertError, InvalidArgumentError, StorageError

from . import routing_profile
from .assets import read_assets
from .bundle import write_bundle
from .checkpoint import Checkpoint, open_checkpoint
from .decoder import Decoder
from .formats import Defaults, ExpertFormat, ExpertFormats, Formats, choose_formats
from .layout import DEFAULT_ALIGNMENT, Layout, plan_layout
from .output import SPARE_BYTES, BundleOutput
from .registry import read_decoder
from .shards import Shards

_MAX_THREADS = 1024
_MAX_WORKERS = 64  # each holds a slab of source and of packed data
_COMPARED_WEIGHTS = 4 << 20  # at a time


@dataclass(frozen=True)
class ConversionReport:
    """What was written. Sizes in bytes; `quantization` is the manifest's report."""

    path: Path
    bundle_id: str
    architecture: str
    bytes: int
    source_bytes: int
    weights: int
    dense_bytes: int
    expert_bytes: int
    num_experts: int
    quantization: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    device: str | None = None,
    dense_format: str | None = None,
    expert_format: ExpertFormat | None = None,
    embedding_format: str | None = None,
    output_format: str | None = None,
    alignment: int | None = None,
    expert_formats: ExpertFormats | None = None,
    remainders: bool = False,
    split_experts: bool = False,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
    shards: Shards | None = None,
) -> ConversionReport:
    """Convert the checkpoint `source`, a Hugging Face directory or a GGUF file, into the bundle `output`.

    `device` names a profile whose formats, alignment, context and memory are the defaults; without one dense
    weights are int8 and experts int4. Embedding and output follow a dense format that is given, unless they
    are given too. `expert_formats` chooses formats expert by expert: a mapping from "layer.expert", "layer.*"
    or "*.expert" to a format (or three: gate, up, down), or a function of layer and expert. `remainders`
    keeps the rounding remainders. `split_experts` stores experts as a base and what makes it whole, so that a lossy mode can
    read the base alone (docs/lossy.md). `calibration`, a file of `edgert calibrate`, gives the bundle a routing profile.
    `threads` 0: usable cores. `progress(done, total)` counts bytes of the
    checkpoint. `shards` fetches the files of weights one after the other, where `source` has only their beginnings.

    Equal inputs and options give equal bytes. An existing bundle at `output` is replaced in one step once the
    new one is complete; anything else there is left alone. Raises an EdgertError that names file, field or
    tensor.
    """
    try:
        checkpoint = open_checkpoint(source)
        decoder = read_decoder(checkpoint)
        _native.check_recipe(json.dumps(decoder.recipe))
        assets = read_assets(checkpoint, decoder.recipe["vocab_size"])
        if calibration is not None:
            assets.files[routing_profile.NAME] = _routing_profile(calibration, decoder)
        profile = None if device is None else load_device(device)
        formats = choose_formats(
            dense_format,
            expert_format,
            embedding_format,
            output_format,
            expert_formats,
            _defaults(profile),
            tied=decoder.recipe["output"]["tied"],
            quantised=decoder.quantised,
        )
        _check_expert_keys(formats, decoder)
        layout = plan_layout(
            decoder,
            formats,
            alignment=_alignment(alignment, profile),
            remainders=remainders,
            split_experts=split_experts,
        )
        with BundleOutput(output, checkpoint.path) as place:
            fetched = 0 if shards is None else shards.peak_bytes([*layout.dense, *layout.experts])
            place.require_space(layout.bytes + fetched + sum(map(len, assets.files.values())) + SPARE_BYTES)
            _check_same(decoder)
            manifest = write_bundle(
                place.directory,
                decoder,
                layout,
                assets.files,
                _about(checkpoint, decoder, profile),
                {**formats.options(), "remainders": remainders}
                | ({"split_experts": True} if split_experts else {}),
                threads=_thread_count(threads),
                progress=progress,
                shards=shards,
            )
            place.commit()
    except EdgertError:
        raise
    except OSError as error:
        raise StorageError(f"{error.filename or os.fspath(output)}: {error.strerror or error}") from error
    return _report(place.path, checkpoint, decoder, layout, manifest, [*decoder.notes, *assets.notes])


def layout_of(
    decoder: Decoder,
    *,
    device: str | None = None,
    dense_format: str | None = None,
    expert_format: ExpertFormat | None = None,
    embedding_format: str | None = None,
    output_format: str | None = None,
) -> Layout:
    """Where everything would lie in the bundle that convert() makes with these options."""
    profile = None if device is None else load_device(device)
    formats = choose_formats(
        dense_format,
        expert_format,
        embedding_format,
        output_format,
        None,
        _defaults(profile),
        tied=decoder.recipe["output"]["tied"],
        quantised=decoder.quantised,
    )
    return plan_layout(decoder, formats, alignment=_alignment(None, profile), remainders=False)


def _routing_profile(calibration: Calibration | str | os.PathLike[str], decoder: Decoder) -> bytes:
    if not isinstance(calibration, Calibration):
        calibration = Calibration.load(calibration)
    calibration.check(decoder.recipe)
    return routing_profile.routing_profile(calibration, routing_profile.routers_of(decoder))


def _thread_count(threads: int) -> int:
    if not 0 <= threads <= _MAX_THREADS:
        raise InvalidArgumentError(f"threads: {threads}; 0 (usable cores) to {_MAX_THREADS} are allowed")
    return min(threads or _native.usable_cores(), _MAX_WORKERS)


def _defaults(profile: Device | None) -> Defaults:
    if profile is None:
        return Defaults()
    chosen = profile.bundle
    return Defaults(chosen.dense_format, chosen.expert_format, chosen.embedding_format, chosen.output_format)


def _alignment(alignment: int | None, profile: Device | None) -> int:
    if alignment is not None:
        return alignment
    return DEFAULT_ALIGNMENT if profile is None else profile.bundle.alignment_bytes


def _check_expert_keys(formats: Formats, decoder: Decoder) -> None:
    ffns = [decoder.recipe["blocks"][block]["ffn"] for block in decoder.recipe["layers"]]
    formats.check_experts([ffn.get("num_experts", 0) for ffn in ffns])


def _check_same(decoder: Decoder) -> None:
    """Tensors that config.json ties must agree where the checkpoint has both."""
    for first, second in decoder.same:
        rows = math.prod(first.shape[:-1])
        step = max(1, _COMPARED_WEIGHTS // first.shape[-1])
        with first.open() as a, second.open() as b:
            for row in range(0, rows, step):
                count = min(step, rows - row)
                if a.floats(row, count) != b.floats(row, count):
                    raise CorruptError(
                        f"{second.path}: tensor {second.name!r} differs from {first.name!r}, but config.json "
                        "ties them (tie_word_embeddings); set it to what is right"
                    )


def _about(checkpoint: Checkpoint, decoder: Decoder, profile: Device | None) -> dict[str, Any]:
    """What the bundle was made from and for. No times and no paths: equal inputs give equal bundles."""
    defaults = {}
    if profile is not None:
        defaults["context"] = min(profile.bundle.context_tokens, decoder.recipe["context_length"])
        if profile.bundle.memory_mib is not None:
            defaults["memory"] = profile.bundle.memory_mib << 20
    return {
        "provenance": {"converter": f"edgert {_native.__version__}", **checkpoint.provenance()},
        "device": None if profile is None else profile.name,
        "defaults": defaults,
    }


def _report(
    path: Path,
    checkpoint: Checkpoint,
    decoder: Decoder,
    layout: Layout,
    manifest: dict[str, Any],
    notes: list[str],
) -> ConversionReport:
    parts = [part for extent in (*layout.dense, *layout.experts) for part in extent.parts]
    return ConversionReport(
        path=path,
        bundle_id=manifest["bundle_id"],
        architecture=decoder.recipe["architecture"],
        bytes=layout.bytes,
        source_bytes=sum(part.source.bytes for part in parts),
        weights=sum(part.source.rows * part.source.cols for part in parts),
        dense_bytes=sum(extent.bytes for extent in layout.dense),
        expert_bytes=sum(extent.bytes for extent in layout.experts),
        num_experts=len(layout.experts),
        quantization=manifest["quantization"],
        notes=notes,
    )
