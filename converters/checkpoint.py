"""Checkpoints: Hugging Face directories (config.json and safetensors, in one file or in shards) and GGUF files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from edgert.errors import CorruptError, NotFoundError, UnsupportedError

from . import safetensors
from .files import read_small_file
from .strict_json import read_json_object
from .tensor import Tensor, TensorInfo

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 64 << 20
_MAX_SHARDS = 4096
_MAX_TENSORS = 1 << 18


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, in the keys and names of Hugging Face; the data itself is read later, by offset."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    files: tuple[tuple[str, Path], ...]  # the weights: name in the directory, real path

    @property
    def config_name(self) -> str:
        """What states the configuration, for messages."""
        return "config.json"

    @property
    def config_place(self) -> str:
        return str(self.path / self.config_name)

    def config_key(self, key: str) -> str:
        """A key of the configuration as the checkpoint spells it, for messages."""
        return key

    def tensor_name(self, name: str) -> str:
        """A tensor's name as the checkpoint spells it, for messages."""
        return name

    def asset(self, name: str, max_bytes: int) -> bytes | None:
        """The content of a file beside the weights, or None. Raises CorruptError for one that is larger and for a link
        that leads out."""
        if not os.path.lexists(self.path / name):
            return None
        return bytes(read_small_file(resolve(self.path, name), max_bytes))

    def provenance(self) -> dict[str, Any]:
        """What the manifest says of it; no times and no paths."""
        files = [{"name": name, "bytes": path.stat().st_size} for name, path in self.files]
        return {"model_type": self.config.get("model_type"), "files": files}


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read configuration and headers of a Hugging Face directory or of a GGUF file.

    Raises NotFoundError, CorruptError or UnsupportedError; nothing in the checkpoint is ever executed.
    """
    directory = Path(path)
    if not directory.is_dir():
        if is_gguf(directory):
            from .gguf_checkpoint import open_gguf

            return open_gguf(directory)
        raise NotFoundError(
            f"{directory}: no such directory; give a Hugging Face checkpoint directory or a GGUF file"
        )
    if not os.path.lexists(directory / "config.json"):
        _explain_missing_config(directory)
    config = read_json_object(resolve(directory, "config.json"), max_bytes=_MAX_CONFIG_BYTES)
    if os.path.lexists(directory / _INDEX):
        tensors, files = _read_shards(directory)
    elif os.path.lexists(directory / _SINGLE):
        file = resolve(directory, _SINGLE)
        tensors, files = {tensor.name: tensor for tensor in safetensors.read_header(file)}, ((_SINGLE, file),)
    else:
        _explain_missing_weights(directory)
    return Checkpoint(directory, config, tensors, files)


def is_gguf(path: Path) -> bool:
    """By its name, or by its first bytes: ollama calls its files by their checksums."""
    if path.suffix == ".gguf" or not path.is_file():
        return path.suffix == ".gguf"
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def resolve(directory: Path, name: str) -> Path:
    """The real path of `name` in the checkpoint.

    A symbolic link may lead to another file of the checkpoint, or from a snapshot of the Hugging Face cache
    to the blobs of the same repository; any other is CorruptError.
    """
    path = directory / name
    if not path.is_symlink():
        return path
    root = Path(os.path.realpath(directory))
    target = Path(os.path.realpath(path))
    snapshots = [place.parent for place in (root, *root.parents[:3]) if place.parent.name == "snapshots"]
    allowed = [root, *(place.parent / "blobs" for place in snapshots)]
    if not any(target.is_relative_to(place) for place in allowed):
        raise CorruptError(
            f"{path}: is a symbolic link to {target}, outside the checkpoint; "
            "copy the file into the directory"
        )
    return target


def _read_shards(directory: Path) -> tuple[dict[str, TensorInfo], tuple[tuple[str, Path], ...]]:
    index_path = resolve(directory, _INDEX)
    index = read_json_object(index_path, max_bytes=_MAX_INDEX_BYTES, max_depth=4, max_values=2 * _MAX_TENSORS)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptError(f"{index_path}: weight_map: an object from tensor names to shards is needed")
    for tensor, shard in weight_map.items():
        _check_shard_name(index_path, tensor, shard)
    shards = sorted(set(weight_map.values()))
    if len(shards) > _MAX_SHARDS:
        raise CorruptError(f"{index_path}: {len(shards)} shards; at most {_MAX_SHARDS} are allowed")
    for shard in shards:
        if not os.path.lexists(directory / shard):
            raise NotFoundError(
                f"{directory / shard}: missing, but {_INDEX} names it; is the download complete?"
            )

    tensors: dict[str, TensorInfo] = {}
    files = []
    for shard in shards:
        file = resolve(directory, shard)
        files.append((shard, file))
        for tensor in safetensors.read_header(file):
            if tensor.name in tensors:
                raise CorruptError(
                    f"{directory / shard}: tensor {tensor.name!r} is also in {tensors[tensor.name].path.name}"
                )
            if weight_map.get(tensor.name) != shard:
                raise CorruptError(
                    f"{index_path}: weight_map: tensor {tensor.name!r} is in {shard}, "
                    f"but the index says {weight_map.get(tensor.name)}"
                )
            if len(tensors) == _MAX_TENSORS:
                raise CorruptError(f"{directory}: more than {_MAX_TENSORS} tensors")
            tensors[tensor.name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CorruptError(f"{index_path}: weight_map: tensor {name!r} is not in {shard}")
    return tensors, tuple(files)


def _check_shard_name(index_path: Path, tensor: str, shard: object) -> None:
    if not isinstance(shard, str):
        raise CorruptError(f"{index_path}: weight_map: {tensor!r}: {str(shard)[:80]} is not a file name")
    if PurePosixPath(shard).name != shard or "\0" in shard or not shard.endswith(".safetensors"):
        raise CorruptError(
            f"{index_path}: weight_map: {tensor!r}: {shard[:200]!r}; "
            "the plain name of a .safetensors file in the same directory is allowed"
        )


def _explain_missing_config(directory: Path) -> NoReturn:
    names = sorted(os.listdir(directory))
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        raise NotFoundError(
            f"{directory}: holds GGUF files; name one of them, such as {directory / ggufs[0]}"
        )
    if "manifest.json" in names:
        raise NotFoundError(
            f"{directory}: is a bundle already; a checkpoint is needed, which has a config.json"
        )
    raise NotFoundError(f"{directory / 'config.json'}: missing; a checkpoint directory has one")


def _explain_missing_weights(directory: Path) -> NoReturn:
    pickles = sorted(
        name for name in os.listdir(directory) if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    )
    if pickles:
        raise UnsupportedError(
            f"{directory / pickles[0]}: pickled weights can run code when they are loaded and are not read; "
            "save the model as safetensors (`model.save_pretrained(...)`) or download that version of it"
        )
    raise NotFoundError(f"{directory}: neither {_SINGLE} nor {_INDEX}")
