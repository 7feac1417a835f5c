"""The adapter file: one safetensors file with what an adapter adds to each matrix, by the bundle's names.

docs/adapters.md defines it. It belongs to a checkpoint, not to one bundle of it: bundles in other formats take it too.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgert.errors import CorruptError, InvalidArgumentError, UnsupportedError

from .adapter import Part
from .peft import values_of
from .safetensors import read_header_and_metadata
from .safetensors_writer import write_safetensors
from .strict_json import parse_json_object

VERSION = 1
_METADATA = "edgert.adapter"
_OF_BUNDLE = ("remainders", "patch_error")  # which hold for the codes of one bundle alone
_DTYPES = {"rows": "I32", "cols": "I32", "remainders": "I8"}  # the others are F32
# A part's arrays by their endings in the file.
_ENDINGS = {
    "lora_A": ("a", 2),
    "lora_B": ("b", 2),
    "shira_weight": ("values", 1),
    "shira_rows": ("rows", 1),
    "shira_cols": ("cols", 1),
    "shira_remainder": ("remainders", 1),
    "shira_patch_error": ("patch_error", 1),
    "gain": ("gain", 1),
    "gain_without_bias": ("gain", 1),
}


def fingerprint(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Checksums of the tensors that every bundle of a checkpoint has alike, whatever its formats: norms and routers."""
    return {
        tensor["name"]: tensor["checksum"]
        for tensor in manifest["tensors"]
        if tensor["name"] == "final_norm" or re.fullmatch(r"layers\.\d+\.(ffn_norm|router)", tensor["name"])
    }


def write_adapter(path: Path, kind: str, parts: Sequence[Part], manifest: Mapping[str, Any]) -> None:
    """Raises StorageError."""
    tensors: dict[str, Any] = {}
    for part in sorted(parts, key=lambda part: part.target):
        part.sort()
        for ending, (name, _) in _ENDINGS.items():
            array = getattr(part, name)
            if array is None or (name == "gain" and part.gain_spares_bias != (ending != "gain")):
                continue
            tensors[f"{part.target}.{ending}"] = array
    about = {"version": VERSION, "kind": kind, "base": fingerprint(manifest)}
    if any(part.remainders is not None for part in parts):
        about["codes"] = manifest["bundle_id"]
    write_safetensors(path, tensors, {_METADATA: json.dumps(about, sort_keys=True)})


def read_adapter(path: Path, manifest: Mapping[str, Any]) -> tuple[str, list[Part]]:
    """Kind and parts. Raises CorruptError, UnsupportedError for a newer format, InvalidArgumentError for an adapter of
    another checkpoint."""
    infos, metadata = read_header_and_metadata(path)
    if _METADATA not in metadata:
        raise CorruptError(
            f"{path}: not an adapter file: its metadata have no {_METADATA!r}; of a PEFT adapter give the directory"
        )
    about = parse_json_object(metadata[_METADATA].encode(), f"{path}: {_METADATA}")
    version, kind, base = about.get("version"), about.get("kind"), about.get("base")
    if type(version) is not int or not isinstance(kind, str) or not isinstance(base, dict):
        raise CorruptError(f"{path}: {_METADATA}: version, kind and base are needed")
    if version > VERSION:
        raise UnsupportedError(
            f"{path}: an adapter of format version {version}, this edgert reads up to {VERSION}: it needs a newer one"
        )
    if base != fingerprint(manifest):
        raise InvalidArgumentError(
            f"{path}: was made for another model: its norms and routers are not the base's"
        )
    parts: dict[str, Part] = {}
    for info in infos:
        target, _, ending = info.name.rpartition(".")
        if ending not in _ENDINGS or len(info.shape) != _ENDINGS[ending][1]:
            raise CorruptError(f"{path}: tensor {info.name!r} {list(info.shape)}: has no place in an adapter")
        name = _ENDINGS[ending][0]
        wanted = _DTYPES.get(name, "F32")
        if info.dtype != wanted:
            raise CorruptError(f"{path}: tensor {info.name!r}: dtype {info.dtype}, allowed is {wanted}")
        part = parts.setdefault(target, Part(target))
        if name in _OF_BUNDLE and about.get("codes") != manifest["bundle_id"]:
            continue
        if getattr(part, name) is not None:
            raise CorruptError(f"{path}: tensor {info.name!r}: {target} has a gain already")
        setattr(part, name, values_of(info))
        part.gain_spares_bias |= ending == "gain_without_bias"
    if not parts:
        raise CorruptError(f"{path}: holds no tensor of an adapter")
    for part in parts.values():
        _check(path, part)
    return kind, list(parts.values())


def _check(path: Path, part: Part) -> None:
    """What the engine's own checks could not tell apart."""
    if (part.a is None) != (part.b is None):
        raise CorruptError(f"{path}: {part.target}: lora_A and lora_B go together")
    if part.a is not None and part.b is not None and part.a.shape[0] != part.b.shape[1]:
        raise CorruptError(
            f"{path}: {part.target}: lora_A has rank {part.a.shape[0]}, lora_B {part.b.shape[1]}; they must agree"
        )
    if len({part.rows is None, part.cols is None, part.values is None}) != 1:
        raise CorruptError(f"{path}: {part.target}: shira_weight, shira_rows and shira_cols go together")
    if part.remainders is not None and (part.values is None or part.remainders.shape != part.values.shape):
        raise CorruptError(f"{path}: {part.target}: shira_remainder: as many as there are values are needed")
    if (part.remainders is None) != (part.patch_error is None) or (
        part.patch_error is not None
        and not (part.patch_error.shape == (2,) and all(0 <= x < float("inf") for x in part.patch_error))
    ):
        raise CorruptError(
            f"{path}: {part.target}: shira_remainder goes with two numbers of shira_patch_error, from 0 on"
        )
