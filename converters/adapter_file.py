"""The adapter file: one safetensors file with what an adapter adds to each matrix, by the bundle's names.

docs/adapters.md defines it. It belongs to a checkpoint, not to one bundle of it: bundles in other formats take it too.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgert import _native
from edgert.errors import CorruptError, InvalidArgumentError, UnsupportedError
from edgert.vocabulary import AdapterVocabulary

from .adapter_part import Part
from .adapter_rows import VOCABULARY
from .files import InputFile
from .safetensors import read_header_and_metadata
from .safetensors_writer import write_safetensors
from .signs import Coded, SignsHeader, decode
from .stored_patches import COUNTS, PackedPatches
from .stored_values import stored_values_of
from .strict_json import parse_json_object
from .tensor import TensorInfo

VERSION = 3  # of files with patches, and of those that say something of text; of others 2
_METADATA = "edgert.adapter"
_OF_BUNDLE = ("shira_remainder", "shira_patch_error")  # which hold for the codes of one bundle alone
_FLOATS = ("F32", "F16", "BF16")
_SIGNS = "signs"  # in place of a dtype: an array as signs.py codes it
_PATCH = "patch"  # behind all others, and not in their checksum: each has its own
_MAX_RANK = 4096
_MAX_METADATA_VALUES = 1 << 20  # added tokens are listed there
_MAX_DECODED = 1 << 28  # elements of a factor


@dataclass(frozen=True)
class _Ending:
    """An array of a part, by its name's ending in the file. `shape`: rows and columns of the matrix, and n of its own."""

    attribute: str
    dtypes: tuple[str, ...]
    shape: tuple[str, ...]


_ENDINGS = {
    "lora_A": _Ending("a", (*_FLOATS, _SIGNS), ("rank", "cols")),
    "lora_B": _Ending("b", (*_FLOATS, _SIGNS), ("rows", "rank")),
    "lora_scale": _Ending("scale", ("F32",), ("1",)),
    "shira_weight": _Ending("values", ("F32",), ("n",)),
    "shira_rows": _Ending("rows", ("I32",), ("n",)),
    "shira_cols": _Ending("cols", ("I32",), ("n",)),
    "shira_remainder": _Ending("remainders", ("I8",), ("n",)),
    "shira_patch_error": _Ending("patch_error", ("F32",), ("2",)),
    "shira_signs": _Ending("", (_SIGNS,), ("rows", "cols")),
    "gain": _Ending("gain", ("F32",), ("rows",)),
    "gain_without_bias": _Ending("gain", ("F32",), ("rows",)),
    "shift": _Ending("shift", ("F32",), ("rows",)),
    "weight": _Ending("weights", _FLOATS, ("m", "cols")),
    "weight_rows": _Ending("weight_rows", ("I32",), ("m",)),
    "gate_vector": _Ending("gate", ("F32",), ("cols",)),
}
# Of a part, what goes together; and what may stand beside it.
_TOGETHER = (
    ("lora_A", "lora_B"),
    ("shira_weight", "shira_rows", "shira_cols"),
    ("shira_remainder", "shira_patch_error"),
)
_BESIDE = {"lora_scale": "lora_A", "weight_rows": "weight", "shira_remainder": "shira_weight"}


def fingerprint(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Checksums of the tensors that every bundle of a checkpoint has alike, whatever its formats: norms and routers."""
    return {
        tensor["name"]: tensor["checksum"]
        for tensor in manifest["tensors"]
        if tensor["name"] == "final_norm" or re.fullmatch(r"layers\.\d+\.(ffn_norm|router)", tensor["name"])
    }


def write_adapter(
    path: Path,
    kind: str,
    parts: Sequence[Part],
    manifest: Mapping[str, Any],
    signs: Mapping[str, Coded] | None = None,
    patches: PackedPatches | None = None,
    vocabulary: AdapterVocabulary | None = None,
) -> None:
    """`signs`: arrays in place of parts', by their names in the file; `patches`: of these parts, for the manifest's bundle.
    Raises StorageError."""
    import numpy as np

    tensors: dict[str, Any] = {}
    coded = dict(signs or {})
    for part in sorted(parts, key=lambda part: part.target):
        part.sort()
        for ending, row in _ENDINGS.items():
            array = getattr(part, row.attribute) if row.attribute else None
            if ending == "lora_scale":
                array = None if part.a is None or array == 1 else np.array([array], np.float32)
            if array is None or (row.attribute == "gain" and part.gain_spares_bias != (ending != "gain")):
                continue
            if f"{part.target}.{ending}" not in coded:
                tensors[f"{part.target}.{ending}"] = np.ascontiguousarray(array)
    tensors |= {name: np.frombuffer(one.data, np.uint8) for name, one in sorted(coded.items())}
    data = b"".join(array.tobytes() for array in tensors.values())
    about: dict[str, Any] = {
        "version": VERSION if patches is not None or vocabulary else 2,
        "kind": kind,
        "base": fingerprint(manifest),
        "checksum": _native.xxh64(data),
    }
    if any(part.remainders is not None for part in parts):
        about["codes"] = manifest["bundle_id"]
    if vocabulary:
        about["vocabulary"] = vocabulary.as_json()
    if coded:
        about["signs"] = {name: asdict(one.header) for name, one in coded.items()}
    if patches is not None:
        about["patches"] = {"fingerprint": f"{patches.fingerprint:016x}", "counts": dict(patches.counts)}
        tensors |= {
            f"{target}.{_PATCH}": np.frombuffer(packed, np.uint8) for target, packed in patches.packed.items()
        }
    write_safetensors(path, tensors, {_METADATA: json.dumps(about, sort_keys=True)})


@dataclass(frozen=True)
class StoredPatches:
    """Where a file has patches of this bundle's codes: target, offset and bytes of each; see PackedPatches."""

    places: tuple[tuple[str, int, int], ...]
    counts: Mapping[str, float]
    fingerprint: int

    @classmethod
    def of(cls, about: Any, infos: Sequence[TensorInfo], where: str) -> "StoredPatches":
        """Raises CorruptError for numbers that cannot be."""
        about = about if isinstance(about, dict) else {}
        named, counts = about.get("fingerprint"), about.get("counts")
        if not isinstance(named, str) or not re.fullmatch("[0-9a-f]{16}", named):
            raise CorruptError(
                f"{where}: patches: fingerprint: found {named!r:.40}, allowed are 16 hex digits"
            )
        if not isinstance(counts, dict) or not all(_is_count(name, counts.get(name)) for name in COUNTS):
            raise CorruptError(
                f"{where}: patches: counts: found {counts!r:.200}, needed are {', '.join(COUNTS)}"
            )
        for info in infos:
            if info.dtype != "U8" or len(info.shape) != 1:
                raise CorruptError(f"{where}: tensor {info.name!r} {list(info.shape)}: bytes are needed")
        places = tuple((info.name.rpartition(".")[0], info.begin, info.end - info.begin) for info in infos)
        return cls(places, {name: counts[name] for name in COUNTS}, int(named, 16))


def _is_count(name: str, found: object) -> bool:
    if name in COUNTS[:3]:
        return type(found) is int and 0 <= found < 2**63
    return isinstance(found, int | float) and 0 <= found < math.inf


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file whose header has been read and checked; its numbers are read by read()."""

    path: Path
    kind: str
    checksum: str | None  # of the numbers; none in files of version 1
    infos: tuple[TensorInfo, ...]  # of the numbers
    signs: Mapping[str, SignsHeader]  # of those that are coded, by name
    of_bundle: bool  # its remainders are of this bundle's codes
    patches: StoredPatches | None  # of this bundle's codes
    vocabulary: AdapterVocabulary

    @classmethod
    def open(cls, path: Path, manifest: Mapping[str, Any]) -> "AdapterFile":
        """Raises CorruptError, UnsupportedError for a newer format, InvalidArgumentError for an adapter of another
        checkpoint."""
        infos, metadata = read_header_and_metadata(path)
        if _METADATA not in metadata:
            raise CorruptError(
                f"{path}: not an adapter file: its metadata have no {_METADATA!r}; of a PEFT adapter give the directory"
            )
        about = parse_json_object(
            metadata[_METADATA].encode(), f"{path}: {_METADATA}", max_values=_MAX_METADATA_VALUES
        )
        version, kind, base = about.get("version"), about.get("kind"), about.get("base")
        if type(version) is not int or not isinstance(kind, str) or not isinstance(base, dict):
            raise CorruptError(f"{path}: {_METADATA}: version, kind and base are needed")
        if version < 1:
            raise CorruptError(f"{path}: {_METADATA}: version: found {version}, allowed is 1 to {VERSION}")
        if version > VERSION:
            raise UnsupportedError(
                f"{path}: an adapter of format version {version}, this edgert reads up to {VERSION}: it needs a newer one"
            )
        checksum = about.get("checksum")
        if version > 1 and not isinstance(checksum, str):
            raise CorruptError(f"{path}: {_METADATA}: checksum is needed")
        if base != fingerprint(manifest):
            raise InvalidArgumentError(
                f"{path}: was made for another model: its norms and routers are not the base's"
            )
        signs = about.get("signs", {})
        if not isinstance(signs, dict) or signs.keys() - {info.name for info in infos}:
            raise CorruptError(f"{path}: {_METADATA}: signs are of tensors that are there")
        headers = {name: SignsHeader.of(one, f"{path}: {name}") for name, one in signs.items()}
        of_bundle = about.get("codes") == manifest["bundle_id"]
        numbers = tuple(info for info in infos if not info.name.endswith(f".{_PATCH}"))
        packed = infos[len(numbers) :]
        patches = None
        if packed or "patches" in about:
            if version < 3 or not all(info.name.endswith(f".{_PATCH}") for info in packed):
                raise CorruptError(f"{path}: patches stand behind all numbers, from version 3 on")
            patches = StoredPatches.of(about.get("patches"), packed, str(path))
        vocabulary = AdapterVocabulary.of(about.get("vocabulary", {}), f"{path}: vocabulary")
        vocabulary.check(manifest["recipe"]["vocab_size"], f"{path}: vocabulary")
        file = cls(
            path, kind, checksum if version > 1 else None, numbers, headers, of_bundle,
            patches if of_bundle else None, vocabulary,
        )  # fmt: skip
        file._check()
        if patches is not None:
            file._check_patches(patches)
        return file

    @property
    def targets(self) -> list[str]:
        return sorted({info.name.rpartition(".")[0] for info in self.infos})

    @property
    def bytes(self) -> int:
        return sum(info.end - info.begin for info in self.infos)

    def _by_target(self) -> dict[str, dict[str, TensorInfo]]:
        """Tensors by target and ending, each of a type and with the dimensions that it can have."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for info in self.infos:
            target, _, ending = info.name.rpartition(".")
            row = _ENDINGS.get(ending)
            header = self.signs.get(info.name)
            if header is not None and info.dtype == "U8" and info.shape == (header.bytes,):
                info = replace(info, dtype=_SIGNS, shape=(header.rows, header.cols))  # noqa: PLW2901
            if row is None or len(info.shape) != len(row.shape):
                raise CorruptError(
                    f"{self.path}: tensor {info.name!r} {list(info.shape)}: has no place in an adapter"
                )
            if info.dtype not in row.dtypes:
                raise CorruptError(
                    f"{self.path}: tensor {info.name!r}: dtype {info.dtype}, allowed is {' or '.join(row.dtypes)}"
                )
            found.setdefault(target, {})[ending] = info
        return found

    def _check(self) -> None:
        by_target = self._by_target()
        for target in VOCABULARY if self.vocabulary.rows else ():
            given = by_target.get(target, {}).get("weight")
            if given is None or given.shape[0] < self.vocabulary.rows:
                raise CorruptError(
                    f"{self.path}: vocabulary: rows: found {self.vocabulary.rows}; {target} has weights of "
                    f"{0 if given is None else given.shape[0]}"
                )
        if not by_target:
            raise CorruptError(f"{self.path}: holds no tensor of an adapter")
        for target, tensors in by_target.items():
            where = f"{self.path}: {target}"
            for group in _TOGETHER:
                if 0 < len(tensors.keys() & set(group)) < len(group):
                    raise CorruptError(f"{where}: {', '.join(group[:-1])} and {group[-1]} go together")
            for ending, needed in _BESIDE.items():
                if ending in tensors and needed not in tensors:
                    raise CorruptError(f"{where}: {ending} stands beside {needed}")
            if "gain" in tensors and "gain_without_bias" in tensors:
                raise CorruptError(f"{where} has a gain already")
            stored = {tensors[ending].dtype for ending in ("lora_A", "lora_B", "weight") if ending in tensors}
            if len(stored) > 1:
                raise CorruptError(
                    f"{where}: its factors and weights are of one dtype, found {sorted(stored)}"
                )
            if "shira_signs" in tensors and "shira_weight" in tensors:
                raise CorruptError(f"{where} has sparse values already")
            values, remainders = tensors.get("shira_weight"), tensors.get("shira_remainder")
            if values is not None and remainders is not None and values.shape != remainders.shape:
                raise CorruptError(f"{where}: shira_remainder: as many as there are values are needed")
            a, b = tensors.get("lora_A"), tensors.get("lora_B")
            for factor in (a, b):
                if factor is not None and factor.dtype == _SIGNS:
                    _check_size(factor, min(factor.shape))
            if a is not None and b is not None and a.shape[0] != b.shape[1]:
                raise CorruptError(
                    f"{where}: lora_A has rank {a.shape[0]}, lora_B {b.shape[1]}; they must agree"
                )

    def _check_patches(self, patches: StoredPatches) -> None:
        """That they carry all that there is."""
        patched = sorted(target for target, _, _ in patches.places)
        others = {info.name for info in self.infos if ".shira_" not in info.name} | set(self.signs)
        if patched != self.targets or others:
            raise CorruptError(
                f"{self.path}: patches are of all matrices, and of sparse values alone; these are of {len(patched)} of "
                f"{len(self.targets)}"
            )

    def check_shapes(self, shape_of: Callable[[str], tuple[int, int]]) -> None:
        """Against those of the model's matrices; shape_of raises InvalidArgumentError for an unknown one."""
        for target, tensors in self._by_target().items():
            rows, cols = shape_of(target)
            if target in VOCABULARY:
                rows += self.vocabulary.rows
            sizes = {"rows": rows, "cols": cols, "1": 1, "2": 2}
            for ending, info in tensors.items():
                for name, found in zip(_ENDINGS[ending].shape, info.shape, strict=True):
                    if sizes.setdefault(name, found) != found:
                        raise InvalidArgumentError(
                            f"{self.path}: tensor {info.name!r}: shape {list(info.shape)}; {name} is {sizes[name]}"
                        )
            if "weight" in tensors and "weight_rows" not in tensors and sizes["m"] != rows:
                raise InvalidArgumentError(
                    f"{self.path}: {target}: weight has {sizes['m']} rows, the matrix {rows}"
                )

    def read(self) -> list[Part]:
        """Raises CorruptError where the numbers are not those that the header's checksum is of."""
        begin = self.infos[0].begin
        with InputFile(self.path) as file:
            data = memoryview(file.read(begin, self.infos[-1].end - begin))
        if self.checksum is not None and _native.xxh64(data) != self.checksum:
            raise CorruptError(
                f"{self.path}: byte {begin}: the checksum of its numbers differs; convert or copy the adapter again"
            )
        parts = []
        for target, tensors in self._by_target().items():
            part = Part(target, gain_spares_bias="gain_without_bias" in tensors)
            for ending, info in tensors.items():
                if ending in _OF_BUNDLE and not self.of_bundle:
                    continue
                raw = data[info.begin - begin : info.end - begin]
                if info.dtype == _SIGNS:
                    self._decode(part, ending, info, raw)
                elif ending == "lora_scale":
                    part.scale *= float(stored_values_of(info, raw)[0])
                else:
                    setattr(part, _ENDINGS[ending].attribute, stored_values_of(info, raw))
            if part.patch_error is not None and not all(0 <= x < float("inf") for x in part.patch_error):
                raise CorruptError(
                    f"{self.path}: {target}: shira_patch_error: found {part.patch_error.tolist()}, allowed is 0 or more"
                )
            parts.append(part)
        return parts

    def _decode(self, part: Part, ending: str, info: TensorInfo, data: memoryview) -> None:
        """A factor's signs become f16; what they stand for goes into the scale."""
        import numpy as np

        header = self.signs[info.name]
        places, signs = decode(header, np.frombuffer(data, np.uint8), f"{self.path}: tensor {info.name!r}")
        if ending == "shira_signs":
            rows, cols = np.divmod(places, header.cols)
            part.rows, part.cols = rows.astype(np.int32), cols.astype(np.int32)
            part.values = signs * np.float32(header.value)
            return
        factor = np.zeros(header.rows * header.cols, np.float16)
        factor[places] = signs
        setattr(part, _ENDINGS[ending].attribute, factor.reshape(header.rows, header.cols))
        part.scale *= header.value


def _check_size(info: TensorInfo, rank: int) -> None:
    """Before a factor is decoded."""
    if rank > _MAX_RANK or info.shape[0] * info.shape[1] > _MAX_DECODED:
        raise CorruptError(
            f"{info.path}: tensor {info.name!r}: shape {list(info.shape)}; ranks up to {_MAX_RANK} are allowed"
        )
