"""Models that other programs have already fetched: the caches of Hugging Face, LM Studio and ollama.

Only names, sizes and headers are read, and nothing is written there.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.errors import CorruptError, EdgertError, InvalidArgumentError, NotFoundError
from edgert.hub import PREFIX as HUB_PREFIX
from edgert.hub import cache_dir as hub_cache
from edgert.hub import parse_spec, stem

OLLAMA_PREFIX = "ollama:"
_OLLAMA_NAME = re.compile(
    r"ollama:((?:[A-Za-z0-9][A-Za-z0-9._-]*/){0,2})([A-Za-z0-9][A-Za-z0-9._-]*)(?::([A-Za-z0-9][A-Za-z0-9._-]*))?"
)
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_OLLAMA_MODEL = "application/vnd.ollama.image.model"
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_CONFIG_BYTES = 1 << 20
_MAX_DEPTH = 6
_FIRST_PART = re.compile(r".+-00001-of-\d{5}\.gguf")
_ANY_PART = re.compile(r".+-\d{5}-of-\d{5}\.gguf")
# llama.cpp's file types by number, as `general.file_type` of a GGUF has them.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M",
    30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """A model in a cache. `kind` is safetensors, gguf or onnx; `convertible` says whether edgert's own decoder takes it,
    or an encoder's bundle; `why_not` says why it does not."""

    name: str
    place: str  # huggingface, lmstudio, ollama
    kind: str
    path: Path
    bytes: int
    architecture: str | None = None
    quantization: str | None = None
    convertible: bool = False
    why_not: str | None = None


def found() -> Iterator[Found]:
    """Every model that the caches hold, cache by cache, in order of name."""
    for model in (*_huggingface(), *_lmstudio(), *_ollama()):
        yield _looked_at(model)


def resolve(text: str) -> Path:
    """The model in a cache that hf:ORG/NAME[@REVISION][:FILE] or ollama:NAME[:TAG] names: a directory to convert, or a
    file. Raises NotFoundError where it is not there, InvalidArgumentError for what is no such name."""
    if text.startswith(OLLAMA_PREFIX):
        return _ollama_blob(text)
    spec = parse_spec(text)
    from edgert.hub import Hub, RemoteFile, choose

    snapshot = Hub().cached(spec)
    there = [
        RemoteFile(path.relative_to(snapshot).as_posix(), path.stat().st_size)
        for path in sorted(snapshot.rglob("*"))
        if path.is_file()
    ]
    models = [row.path for row in choose(there, spec) if row.path.endswith((".gguf", ".onnx"))]
    return snapshot / min(models) if models else snapshot


def is_name(text: str) -> bool:
    """Whether resolve() takes it."""
    return text.startswith((HUB_PREFIX, OLLAMA_PREFIX))


# --- Hugging Face -----------------------------------------------------------------------------------------


def _huggingface() -> Iterator[Found]:
    for repository in _directories(hub_cache()):
        if not repository.name.startswith("models--"):
            continue
        name = repository.name.removeprefix("models--").replace("--", "/")
        for snapshot in _directories(repository / "snapshots"):
            yield from _in_directory(snapshot, f"hf:{name}", "huggingface")


def _in_directory(directory: Path, name: str, place: str) -> Iterator[Found]:
    files = sorted(_files(directory, _MAX_DEPTH))
    weights = [path for path in files if path.parent == directory and path.suffix == ".safetensors"]
    if weights:
        yield Found(name, place, "safetensors", directory, _size(weights))
    for path in files:
        if path.suffix == ".gguf" and (
            _FIRST_PART.fullmatch(path.name) or not _ANY_PART.fullmatch(path.name)
        ):
            parts = [other for other in files if stem(str(other)) == stem(str(path))]
            yield Found(f"{name}:{path.relative_to(directory).as_posix()}", place, "gguf", path, _size(parts))
    for path in files:
        if path.suffix == ".onnx":
            yield Found(
                f"{name}:{path.relative_to(directory).as_posix()}", place, "onnx", path, _size([path])
            )


# --- LM Studio --------------------------------------------------------------------------------------------


def _lmstudio() -> Iterator[Found]:
    seen = set()
    for folder in (Path.home() / ".lmstudio/models", Path.home() / ".cache/lm-studio/models"):
        for owner in _directories(folder):
            for directory in _directories(owner):
                real = os.path.realpath(directory)
                if real not in seen:
                    seen.add(real)
                    yield from _in_directory(directory, f"{owner.name}/{directory.name}", "lmstudio")


# --- ollama -----------------------------------------------------------------------------------------------


def ollama_dir() -> Path:
    """OLLAMA_MODELS, else ~/.ollama/models."""
    stated = os.environ.get("OLLAMA_MODELS")
    return Path(stated) if stated else Path.home() / ".ollama/models"


def _ollama() -> Iterator[Found]:
    manifests = ollama_dir() / "manifests"
    for path in sorted(_files(manifests, 4)):
        parts = path.relative_to(manifests).parts
        if len(parts) != 4:
            continue
        host, owner, name, tag = parts
        shown = [
            *([] if host == "registry.ollama.ai" else [host]),
            *([] if owner == "library" and host == "registry.ollama.ai" else [owner]),
        ]
        with suppress(EdgertError):
            blob = _blob(path)
            yield Found(f"ollama:{'/'.join([*shown, name])}:{tag}", "ollama", "gguf", blob, _size([blob]))


def _ollama_blob(text: str) -> Path:
    match = _OLLAMA_NAME.fullmatch(text)
    if match is None or ".." in text:
        raise InvalidArgumentError(f"{text[:200]!r}: allowed is ollama:NAME or ollama:NAME:TAG")
    before = [part for part in match[1].split("/") if part]
    host, owner = (
        ["registry.ollama.ai", "library"]
        if not before
        else ["registry.ollama.ai", *before]
        if len(before) == 1
        else before
    )
    manifest = ollama_dir() / "manifests" / host / owner / match[2] / (match[3] or "latest")
    if not manifest.is_file():
        raise NotFoundError(f"{text}: ollama has no such model in {ollama_dir()} (see `edgert list --all`)")
    return _blob(manifest)


def _blob(manifest: Path) -> Path:
    """The GGUF that an ollama manifest names by its digest. Raises CorruptError, NotFoundError."""
    from edgert.converters.strict_json import read_json_object

    layers = read_json_object(manifest, max_bytes=_MAX_MANIFEST_BYTES).get("layers")
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict) and layer.get("mediaType") == _OLLAMA_MODEL:
            digest = _DIGEST.fullmatch(str(layer.get("digest")))
            if digest is None:
                raise CorruptError(
                    f"{manifest}: digest: found {str(layer.get('digest'))[:80]!r}, allowed is a sha256"
                )
            blob = ollama_dir() / "blobs" / f"sha256-{digest[1]}"
            if not blob.is_file():
                raise NotFoundError(f"{blob}: missing, but {manifest} names it")
            return blob
    raise CorruptError(f"{manifest}: names no model")


# --- what they are ----------------------------------------------------------------------------------------


def _looked_at(model: Found) -> Found:
    """With what its headers say. A model that cannot be read says why."""
    from dataclasses import replace

    try:
        about = {"safetensors": _checkpoint, "gguf": _gguf, "onnx": _onnx}[model.kind](model.path)
    except EdgertError as error:
        return replace(model, why_not=str(error))
    return replace(model, **about)


def _checkpoint(directory: Path) -> dict[str, Any]:
    config: Any = {}
    with suppress(OSError, ValueError, RecursionError), open(directory / "config.json", "rb") as file:
        config = json.loads(file.read(_MAX_CONFIG_BYTES))
    if not isinstance(config, dict):
        config = {}
    scheme = config.get("quantization_config") or config.get("quantization")
    method = scheme.get("quant_method") or scheme.get("mode") if isinstance(scheme, dict) else None
    about = {
        "architecture": str(config.get("model_type", "unknown"))[:40],
        "quantization": str(method or config.get("torch_dtype") or config.get("dtype") or "")[:40] or None,
    }
    return about | _convertible(directory)


def _gguf(path: Path) -> dict[str, Any]:
    from edgert.converters.gguf import GgufFile

    file = GgufFile(path, metadata_only=True)
    about = {
        "architecture": file.text("general.architecture", 80),
        "quantization": _FILE_TYPES.get(file.integer("general.file_type") or 0)
        if "general.file_type" in file
        else None,
    }
    return about | _convertible(path)


def _onnx(path: Path) -> dict[str, Any]:
    from edgert.converters.onnx_file import read_onnx

    read_onnx(path)
    return {"architecture": "encoder", "convertible": True}


def _convertible(path: Path) -> dict[str, Any]:
    """Whether the converter takes it: from its headers alone."""
    from edgert.converters.checkpoint import open_checkpoint
    from edgert.converters.registry import read_decoder

    try:
        read_decoder(open_checkpoint(path))
    except EdgertError as error:
        return {"convertible": False, "why_not": str(error)}
    return {"convertible": True}


def _directories(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.is_dir())
    return []


def _files(folder: Path, depth: int) -> Iterator[Path]:
    """Files under `folder`, which need not exist; links to directories are not followed."""
    with suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                if depth > 1:
                    yield from _files(Path(entry.path), depth - 1)
            elif entry.is_file():
                yield Path(entry.path)


def _size(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
