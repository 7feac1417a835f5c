"""Where a model's adapters are read from: adapter files and PEFT directories."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgert.errors import CorruptError, InvalidArgumentError
from edgert.patches import PatchEstimate
from edgert.vocabulary import AdapterVocabulary

if TYPE_CHECKING:
    from edgert.converters.adapter_file import StoredPatches
    from edgert.converters.adapter_part import Part


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """The engine knows an adapter's matrices, and not where it is from."""
    try:
        yield
    except InvalidArgumentError as error:
        if str(path) in str(error):
            raise
        raise InvalidArgumentError(f"{path}: {str(error).removeprefix('adapter: ')}") from None


class Source(Protocol):
    """Where an adapter is read from, again and again."""

    @property
    def path(self) -> Path: ...
    @property
    def kind(self) -> str: ...
    @property
    def targets(self) -> list[str]: ...
    @property
    def bytes(self) -> int: ...
    @property
    def vocabulary(self) -> AdapterVocabulary: ...
    @property
    def patches(self) -> "StoredPatches | None":
        """Of the model's codes, to be read in place of all else."""

    def check_shapes(self, shape_of: Callable[[str], tuple[int, int]]) -> None:
        """Against the model's, as far as can be told without reading."""

    def read(self) -> "list[Part]": ...


class PeftDirectory:
    """A PEFT adapter as it is, compiled for a bundle whenever it is read."""

    patches = None

    def __init__(self, path: Path, bundle_path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self._bundle_path = bundle_path
        self._manifest = manifest
        self.vocabulary = self._read_vocabulary()
        self._parts: list[Part] | None = None
        self._parts = self._compiled()
        for doubt in self._doubts:
            warnings.warn(doubt, RuntimeWarning, stacklevel=1)
        self.targets = [part.target for part in self._parts]
        self.bytes = sum(info.stat().st_size for info in path.iterdir() if info.name.endswith(".safetensors"))

    def _compiled(self) -> "list[Part]":
        from edgert.converters.adapter import compile_adapter
        from edgert.converters.peft import doubts, read_peft

        adapter = read_peft(self.path)
        self.kind = adapter.kind
        self._doubts = doubts(adapter, self._bundle_path.name.removesuffix(".edgert"))
        said = self.vocabulary
        last = said.tokens[-1].id if said.tokens else -1
        compiled = compile_adapter(adapter, self._bundle_path, self._manifest, vocab_size=last + 1)
        self.vocabulary = replace(said, rows=compiled.added_rows)
        self.vocabulary.check(self._manifest["recipe"]["vocab_size"], str(self.path))
        return compiled.parts

    def _read_vocabulary(self) -> AdapterVocabulary:
        from edgert.bundle import Bundle
        from edgert.converters.peft_vocabulary import read_vocabulary

        return read_vocabulary(self.path, Bundle(self._bundle_path, self._manifest, {}))

    def check_shapes(self, shape_of: Callable[[str], tuple[int, int]]) -> None:
        """Compiling it has seen to that."""

    def read(self) -> "list[Part]":
        parts, self._parts = self._parts, None  # what it was made with serves the first time
        return self._compiled() if parts is None else parts


def open_adapter(path: str | os.PathLike[str], bundle_path: Path, manifest: dict[str, Any]) -> Source:
    """An adapter file, whose header alone is read, or a PEFT directory, for a bundle."""
    from edgert.converters.adapter_file import AdapterFile

    place = Path(path)
    if not place.is_dir():
        return AdapterFile.open(place, manifest)
    return PeftDirectory(place, bundle_path, manifest)


def estimate_of(parts: "Sequence[Part]") -> PatchEstimate:
    carried = beside = lost = sparse = 0.0
    for part in parts:
        if part.values is None:
            continue
        squares = float((part.values.astype("float64") ** 2).sum())
        sparse += squares
        if part.patch_error is not None:
            carried += squares
            beside += float(part.patch_error[1])
            lost += float(part.patch_error[0] - part.patch_error[1])
    return PatchEstimate(carried, beside, max(0.0, lost), sparse)


def estimate_of_counts(counts: Mapping[str, float]) -> PatchEstimate:
    intended, beside = counts["intended"], counts["beside"]
    return PatchEstimate(intended, beside, max(0.0, counts["apart"] - beside), intended)


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter with its numbers."""

    kind: str
    parts: "list[Part]"
    vocabulary: AdapterVocabulary
    patch_bytes: int = 0  # of the patches that the file has


def read_adapter(
    path: str | os.PathLike[str], bundle_path: Path, manifest: dict[str, Any], weights: Path | None = None
) -> ReadAdapter:
    """An adapter file or a PEFT directory, for a bundle; with the remainders that its sparse values lack,
    from the checkpoint `weights` or the bundle, where either has them."""
    import numpy as np

    from edgert.converters.adapter_shapes import check_parts
    from edgert.converters.remainders import add_remainders
    from edgert.converters.stored_values import as_floats

    source = open_adapter(path, bundle_path, manifest)
    parts = source.read()
    check_parts(parts, manifest, source.path, source.vocabulary.rows)
    for part in parts:
        if not all(np.isfinite(as_floats(array)).all() for array in part.arrays()):
            raise CorruptError(f"{source.path}: {part.target}: holds a number that is not finite")
    with naming(source.path):
        add_remainders(parts, bundle_path, manifest, weights)
    places = source.patches.places if source.patches is not None else ()
    return ReadAdapter(source.kind, parts, source.vocabulary, sum(size for _, _, size in places))
