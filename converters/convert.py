"""The conversion of a checkpoint into a device bundle."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert.calibration import Calibration
from edgert.devices import Device, load_device
from edgert.errors import CorruptError, EdgertError, InvalidArgumentError, StorageError

from . import routing_profile
from .assets import Assets, read_assets
from .bundle import write_bundle
from .checkpoint import Checkpoint, open_checkpoint
from .decoder import Decoder
from .expert_bits import ExpertBitsReport, choose_expert_bits, load_calibration, request
from .formats import Defaults, ExpertFormat, ExpertFormats, Formats, choose_formats
from .layout import DEFAULT_ALIGNMENT, Layout, plan_layout
from .output import SPARE_BYTES, BundleOutput
from .registry import read_decoder
from .shards import Shards
from .trials import ModelLoss, Trials, tokens_of

if TYPE_CHECKING:
    from edgert.calibration import Calibration
    from edgert.cluster import Cluster

_MAX_THREADS = 1024
_MAX_WORKERS = 64  # each holds a slab of source and of packed data
_COMPARED_WEIGHTS = 4 << 20  # at a time


@dataclass(frozen=True)
class ConversionReport:
    """What was written. Sizes in bytes; `quantization` is the manifest's report; `expert_bits` where formats of experts were
    chosen, `loss` where a text was given."""

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
    expert_bits: ExpertBitsReport | None = None
    loss: ModelLoss | None = None


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
    calibration: "Calibration | str | os.PathLike[str] | None" = None,
    expert_bits: float | None = None,
    max_loss: float | None = None,
    allocation: str | None = None,
    expert_candidates: Sequence[str] | None = None,
    text: str | None = None,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
    stage: Callable[[str], None] | None = None,
    shards: Shards | None = None,
    cluster: "Cluster | None" = None,
) -> ConversionReport:
    """Convert the checkpoint `source`, a Hugging Face directory or a GGUF file, into the bundle `output`.

    `device` names a profile whose formats, alignment, context and memory are the defaults; without one dense
    weights are int8 and experts int4. Embedding and output follow a dense format that is given, unless they
    are given too. `expert_formats` chooses formats expert by expert: a mapping from "layer.expert", "layer.*"
    or "*.expert" to a format (or three: gate, up, down), or a function of layer and expert. `remainders`
    keeps the rounding remainders. `split_experts` stores experts as a base and what makes it whole, so that a lossy mode can
    read the base alone (docs/lossy.md).

    A `calibration` of the model weighs the errors of packing and gives the bundle a routing profile. With it `expert_bits`
    (mean bits a weight, scales included) or `max_loss` (a share of the unquantised model's perplexity on `text`) chooses the
    formats of experts, by `allocation` "knapsack" (default), "uniform" or "edgemoe", among `expert_candidates` (all formats
    that weights can be packed in). With a `text` the report says what the model lost on it; it is not kept.

    `threads` 0: usable cores. `progress(done, total)` counts what `stage(name)` has announced last, most often bytes of the
    checkpoint. `shards` fetches the files of weights one after the other, where `source` has only their beginnings. A
    `cluster` packs on its machines, which share the file system of both; formats are chosen here.

    Equal inputs and options give equal bytes. An existing bundle at `output` is replaced in one step once the
    new one is complete; anything else there is left alone. Raises an EdgertError that names file, field or
    tensor.
    """
    try:
        checkpoint = open_checkpoint(source)
        decoder = read_decoder(checkpoint)
        _native.check_recipe(json.dumps(decoder.recipe))
        assets = read_assets(checkpoint, decoder.recipe["vocab_size"])
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
        asked = request(
            calibration=calibration,
            bits=expert_bits,
            max_loss=max_loss,
            method=allocation,
            formats=expert_candidates,
            expert_format=expert_format,
            expert_formats=expert_formats,
            text=text,
        )
        measured = load_calibration(calibration, decoder)
        if measured is not None:
            routers = routing_profile.routers_of(decoder)
            assets.files[routing_profile.NAME] = routing_profile.routing_profile(measured, routers)
        alignment = _alignment(alignment, profile)
        planned = partial(
            plan_layout, decoder, alignment=alignment, remainders=remainders, calibration=measured
        )
        layout = planned(formats, split_experts=split_experts)
        with (
            BundleOutput(output, checkpoint.path) as place,
            _trials(place, text, shards, decoder, assets.files, formats, planned, threads) as trials,
        ):
            _require_space(place, layout, assets, shards, trials)
            _check_same(decoder)
            chosen, loss = None, None
            if asked is not None:
                assert measured is not None
                groups = [range(len(layout.experts))] if shards is None else shards.groups(layout.experts)
                found, chosen = choose_expert_bits(
                    asked,
                    decoder,
                    measured,
                    groups,
                    trials,
                    threads=_thread_count(threads),
                    progress=progress,
                    stage=stage,
                )
                formats = replace(formats, chosen=found)
                layout = planned(formats, split_experts=split_experts)
                _require_space(place, layout, assets, shards, None)
                _say(stage, "pack")
            manifest = write_bundle(
                place.directory,
                decoder,
                layout,
                assets.files,
                _about(checkpoint, decoder, profile),
                {
                    **formats.options(),
                    "remainders": remainders,
                    **({"split_experts": True} if split_experts else {}),
                    **({} if chosen is None else {"expert_bits": chosen.summary()}),
                },
                threads=_thread_count(threads),
                progress=progress,
                shards=shards,
                cluster=cluster,
            )
            place.commit()
            if trials is not None:
                _say(stage, "compare with the unquantised model")
                loss = trials.compare(place.path)
    except EdgertError:
        raise
    except OSError as error:
        raise StorageError(f"{error.filename or os.fspath(output)}: {error.strerror or error}") from error
    report = _report(place.path, checkpoint, decoder, layout, manifest, [*decoder.notes, *assets.notes])
    return replace(report, expert_bits=chosen, loss=loss)


def _trials(
    place: BundleOutput,
    text: str | None,
    shards: Shards | None,
    decoder: Decoder,
    assets: Mapping[str, bytes],
    formats: Formats,
    planned: Callable[[Formats], Layout],
    threads: int,
) -> AbstractContextManager[Trials | None]:
    """What measures losses on the text, where there is one."""
    if text is None:
        return nullcontext()
    if shards is not None:
        raise InvalidArgumentError("text: a checkpoint that is fetched piece by piece cannot be run")
    tokens = tokens_of(text, assets)
    place.trial.mkdir()
    return Trials(place.trial, decoder, assets, formats, tokens, planned, _thread_count(threads))


def _require_space(
    place: BundleOutput, layout: Layout, assets: Assets, shards: Shards | None, trials: Trials | None
) -> None:
    needed = layout.bytes + sum(map(len, assets.files.values())) + SPARE_BYTES
    if shards is not None:
        needed += shards.peak_bytes([*layout.dense, *layout.experts])
    if trials is not None:  # the checkpoint's own weights, and what a few trials pack
        parts = [part for extent in (*layout.dense, *layout.experts) for part in extent.parts]
        needed += sum(part.source.bytes for part in parts) + 2 * layout.bytes
    place.require_space(needed)


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


def _say(stage: Callable[[str], None] | None, what: str) -> None:
    if stage is not None:
        stage(what)


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
