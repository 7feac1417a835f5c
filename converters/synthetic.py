"""Bundles of random weights in the shape of a model, written without its checkpoint.

They run at the model's speed and say nothing. Weights are chosen so that the routers behave: every token's embedding is
of unit scale and the layers add to it what is small beside it, so that a layer's routing follows the token; with larger
or biased weights all hidden states grow alike and every token gets the same experts.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgert import _native
from edgert.errors import CancelledError, StorageError

from .bundle import write_bundle
from .decoder import Decoder
from .formats import Formats
from .layout import DEFAULT_ALIGNMENT, plan_layout
from .output import SPARE_BYTES, BundleOutput
from .pack import Error, Packed, Part, slabs, write_at
from .registry import expected_decoder

GENERATION = 1  # of the weights: raised when the same shape and formats would give others
_MAX_WORKERS = 8  # each holds a slab

# Standard deviation of a matrix's products, given inputs of unit scale.
_PRODUCT_DEVIATION = {"embedding": 1.0, "o": 0.1, "down": 0.25}


def provenance(shape: str) -> dict[str, Any]:
    """The manifest's `provenance` of a synthetic bundle."""
    return {"synthetic": shape, "generation": GENERATION}


def write_synthetic(
    shape: str,
    config: Mapping[str, Any],
    output: str | os.PathLike[str],
    formats: Formats,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the bundle `output` for the model that `config` (as in config.json) describes; `shape` is its name.

    Equal arguments give equal bytes. progress(done, total) counts bytes of the bundle. Raises StorageError where
    there is no room or the system refuses; UnsupportedError and CorruptError for the configuration.
    """
    decoder = synthetic_decoder(shape, config)
    layout = plan_layout(decoder, formats, alignment=DEFAULT_ALIGNMENT, remainders=False)
    about = {"provenance": provenance(shape), "device": None, "defaults": {}}
    try:
        with BundleOutput(output) as place:
            place.require_space(layout.bytes + SPARE_BYTES)
            write_bundle(
                place.directory,
                decoder,
                layout,
                {},
                about,
                formats.options(),
                threads=min(_native.usable_cores(), _MAX_WORKERS),
                progress=None
                if progress is None
                else lambda done, total: progress(layout.bytes * done // total, layout.bytes),
                pack=_fill_extent,
            )
            place.commit()
    except OSError as error:
        raise StorageError(f"{error.filename or os.fspath(output)}: {error.strerror or error}") from error
    return place.path


def synthetic_decoder(shape: str, config: Mapping[str, Any]) -> Decoder:
    """What a checkpoint of this shape would hold."""
    return expected_decoder({"dtype": "float32", **config}, f"shape {shape}")


def _fill_extent(
    parts: Sequence[Part],
    file: int,
    offset: int,
    remainder_file: int | None,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> Packed:
    """Takes the place of pack_extent()."""
    checksum = _native.Xxh64()
    for part in parts:
        seed = int(_native.xxh64(part.name.encode()), 16)
        for first_row, rows in slabs(part):
            if stop.is_set():
                raise CancelledError("the writing of the bundle was cancelled")
            packed = _random(part, rows, seed ^ first_row)
            checksum.update(packed)
            write_at(file, offset, packed)
            offset += len(packed)
            advance(rows * part.source.tensor.row_bytes)
    exact = tuple(Error(0.0, 0.0, 0.0) for _ in parts)
    return Packed(checksum.hexdigest(), exact, (None,) * len(parts))


def _random(part: Part, rows: int, seed: int) -> bytearray:
    cols = part.source.cols
    if part.is_vector:
        return bytearray((b"\0\0\x80\x3f" if part.name.endswith("norm") else b"\0\0\0\0") * rows * cols)
    packed = bytearray(_native.packed_bytes(part.format, rows, cols))
    kind = part.name.rpartition(".")[2]
    deviation = _PRODUCT_DEVIATION.get(kind, 1.0)
    if kind != "embedding":
        deviation /= cols**0.5
    _native.fill_random(part.format, rows, cols, deviation=deviation, seed=seed, destination=packed)
    return packed
