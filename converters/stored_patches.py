"""An adapter's patches of a bundle's codes, compiled once and for all: what its file keeps beside its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import _native

from .remainders import PackedMatrices, matrix_patch, takes_patches

if TYPE_CHECKING:
    from .adapter_part import Part

COUNTS = ("values", "unchanged", "clamped", "intended", "error", "apart", "beside")


@dataclass(frozen=True)
class PackedPatches:
    """Of each matrix as native/src/adapters/matrix_patch.h packs it, by target; what became of all values, see
    _native.Patches.counts(); and the adapter's fingerprint."""

    packed: Mapping[str, bytes]
    counts: Mapping[str, float]
    fingerprint: int


def pack_patches(parts: "Sequence[Part]", path: Path, manifest: Mapping[str, Any]) -> PackedPatches | None:
    """None where patches would not carry all that the adapter adds to the bundle at `path`."""
    matrices = PackedMatrices(path, manifest)
    packed: dict[str, bytes] = {}
    counts = dict.fromkeys(COUNTS, 0)
    for part in sorted(parts, key=lambda part: (".experts." in part.target, part.target)):
        matrix = matrices.find(part.target)
        if (
            not part.is_sparse
            or part.remainders is None
            or matrix is None
            or not takes_patches(matrix.format)
        ):
            return None
        packed[part.target], found = matrix_patch(part, matrix)
        for name in COUNTS:
            counts[name] += found[name]
    fingerprint = _native.adapter_fingerprint([part.native() for part in parts])
    return PackedPatches(packed, counts, fingerprint) if packed else None
