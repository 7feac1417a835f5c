"""Adapters with random numbers, which benchmarks measure."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgert.bundle import Bundle
from edgert.converters.adapter_file import write_adapter
from edgert.converters.adapter_part import Part
from edgert.converters.stored_patches import pack_patches


def sparse_files(bundle: Bundle, share: float, directory: Path, *, with_patches: bool = True) -> list[Path]:
    """Two, `one` and `two`, of every matrix that can be patched, with the patches or the numbers alone; those that `directory`
    has already are taken as they are."""
    directory.mkdir(parents=True, exist_ok=True)
    kept = directory if with_patches else directory / "numbers"
    kept.mkdir(exist_ok=True)
    paths = [kept / f"{name}.adapter" for name in ("one", "two")]
    for seed, path in enumerate(paths):
        if not path.exists():
            parts = list(random_sparse(bundle, share, seed))
            patches = pack_patches(parts, bundle.path, bundle.manifest) if with_patches else None
            write_adapter(path, "SHIRA", parts, bundle.manifest, patches=patches)
    return paths


def random_sparse(bundle: Bundle, share: float, seed: int) -> Iterator[Part]:
    rng = np.random.default_rng(seed)
    recipe = bundle.manifest["recipe"]
    for tensor in bundle.manifest["tensors"]:
        if (".attention." in tensor["name"] or tensor["name"] == "output") and len(tensor["shape"]) == 2:
            yield sparse_part(rng, tensor["name"], tensor["shape"][0], tensor["shape"][1], share)
    for layer in bundle.manifest["experts"]:
        ffn = recipe["blocks"][recipe["layers"][layer["layer"]]]["ffn"]
        hidden, width = recipe["hidden_size"], ffn["moe_intermediate_size"]
        for expert in range(len(layer["extents"])):
            prefix = f"layers.{layer['layer']}.experts.{expert}."
            yield sparse_part(rng, prefix + "gate", width, hidden, share)
            yield sparse_part(rng, prefix + "up", width, hidden, share)
            yield sparse_part(rng, prefix + "down", hidden, width, share)


def sparse_part(rng: np.random.Generator, name: str, rows: int, cols: int, share: float) -> Part:
    """In the order in which codes lie, of a whole number of tiles of 16 rows."""
    places = np.unique(rng.integers(0, rows // 16 * 16 * cols, int(rows * cols * share)))
    tile, inner = np.divmod(places, 16 * cols)
    return Part(
        name,
        rows=(16 * tile + inner % 16).astype(np.int32),
        cols=(inner // 16).astype(np.int32),
        values=rng.standard_normal(places.size, np.float32) * np.float32(0.02),
        remainders=rng.integers(-100, 101, places.size).astype(np.int8),
        patch_error=np.zeros(2, np.float32),
    )


def random_lora(bundle: Bundle, rank: int) -> list[Part]:
    rng = np.random.default_rng(0)
    parts = []
    for tensor in bundle.manifest["tensors"]:
        if ".attention." not in tensor["name"] or len(tensor["shape"]) != 2:
            continue
        rows, cols = tensor["shape"]
        a, b = (
            (rng.standard_normal(shape, np.float32) * np.float32(0.01)).astype(np.float16)
            for shape in ((rank, cols), (rows, rank))
        )
        parts.append(Part(tensor["name"], a, b))
    return parts
