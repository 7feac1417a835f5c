"""A GGUF file as a checkpoint: its metadata in the keys of config.json, its tensors under their Hugging Face names.

So one family reads both kinds of file. What the metadata says of the computation is taken over or refused by name.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgert.errors import CorruptError, UnsupportedError

from .checkpoint import Checkpoint
from .gguf import GgufFile, merged_tensors, read_parts
from .gguf_architectures import ARCHITECTURES, architecture
from .gguf_names import CONVOLUTIONS, ROWS, Architecture
from .gguf_parser import GgufTensor
from .tensor import BlockTensor, TensorInfo

_MAX_NAME_BYTES = 256
_MAX_ROPE_FACTORS = 1 << 13
_ROPE_FACTORS = "rope_freqs.weight"

# Without effect on what is computed, or restating what the tensors' shapes say.
_INFORMATIVE = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.causal"}
_SCALING = {
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scale_linear",
}  # fmt: skip
# Keys that this module looks at itself, and values that leave the computation as it is.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "leading_dense_block_count": (0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "nextn_predict_layers": (0,),
}
# Of a model that needs one of them: nothing is said where they are equal.
_RESTATED = {"expert_feed_forward_length": "feed_forward_length"}


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """One GGUF file, or the first of several parts."""

    file: GgufFile
    architecture: Architecture
    architecture_name: str

    @property
    def config_name(self) -> str:
        return "its metadata"

    @property
    def config_place(self) -> str:
        return f"{self.path}: metadata"

    def config_key(self, key: str) -> str:
        own = {there: here for here, there in self.architecture.all_keys().items()}.get(key)
        return key if own is None else self.file.where(f"{self.architecture_name}.{own}")

    def tensor_name(self, name: str) -> str:
        return self.architecture.own_name(name)

    def asset(self, name: str, max_bytes: int) -> bytes | None:
        return self._assets.get(name)

    def provenance(self) -> dict[str, Any]:
        return super().provenance() | {"gguf": _kept_metadata(self.file)}

    @cached_property
    def _assets(self) -> Mapping[str, bytes]:
        from .gguf_tokenizer import assets

        return assets(self.file)


def open_gguf(path: Path) -> GgufCheckpoint:
    """Read the metadata and where the tensors are. Raises NotFoundError, CorruptError or UnsupportedError."""
    parts = read_parts(path)
    file = parts[0]
    name = _architecture_name(file)
    chosen = architecture(name, bool(file.integer(f"{name}.expert_count")))
    if chosen is None:
        raise UnsupportedError(
            f"{file.path}: {file.where('general.architecture')}: {name!r} is not supported; "
            f"known are {', '.join(ARCHITECTURES)}. llama.cpp itself may run it: --backend llama.cpp"
        )
    stored = merged_tensors(parts)
    config = _Reader(file, name, chosen, stored).config()
    tensors: dict[str, GgufTensor] = {}
    for own, tensor in stored.items():
        if own != _ROPE_FACTORS:
            tensors[chosen.hugging_face_name(own) or own] = _shaped(own, tensor)
    files = tuple((part.path.name, part.path) for part in parts)
    return GgufCheckpoint(file.path, config, tensors, files, file, chosen, name)


def _shaped(name: str, tensor: GgufTensor) -> GgufTensor:
    """In the shape that the tensor has elsewhere."""
    part = name.partition("blk.")[2].partition(".")[2]
    if part in ROWS and len(tensor.shape) == 1:
        return dataclasses.replace(tensor, shape=(1, *tensor.shape))
    if part in CONVOLUTIONS and len(tensor.shape) == 2:
        return dataclasses.replace(tensor, shape=(tensor.shape[0], 1, tensor.shape[1]))
    return tensor


def _architecture_name(file: GgufFile) -> str:
    kind = file.text("general.type", _MAX_NAME_BYTES)
    if kind not in (None, "model"):
        raise UnsupportedError(
            f"{file.path}: {file.where('general.type')}: {kind!r}; a file of type model is needed"
        )
    name = file.text("general.architecture", _MAX_NAME_BYTES)
    if name is None:
        raise CorruptError(f"{file.path}: general.architecture: missing")
    return name


class _Reader:
    """Turns the metadata of one architecture into a configuration. Keys that nobody asked for are refused."""

    def __init__(
        self, file: GgufFile, name: str, chosen: Architecture, tensors: Mapping[str, GgufTensor]
    ) -> None:
        self._file = file
        self._prefix = name + "."
        self._architecture = chosen
        self._tensors = tensors
        self._read: set[str] = set()

    def config(self) -> dict[str, Any]:
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CorruptError(f"{self._file.path}: tensor 'token_embd.weight': missing, or not a matrix")
        chosen = self._architecture
        config: dict[str, Any] = {
            "model_type": chosen.model_type,
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "output.weight" not in self._tensors,
            **chosen.constants,
        }
        if chosen.interleaved:
            config["rope_interleaved"] = True
        for bias, flag in chosen.biases.items():
            config[flag] = f"blk.0.{bias}" in self._tensors
        for key, there in chosen.all_keys().items():
            value = self._value(key)
            if value is not None:
                config[there] = value
        config |= self._rope()
        if chosen.adjust is not None:
            chosen.adjust(self, config)
        self._check_heads(config)
        self._refuse_others()
        return config

    def has(self, tensor: str) -> bool:
        return tensor in self._tensors

    def values(self, key: str) -> tuple[Any, ...] | None:
        """One a layer."""
        self._read.add(key)
        return self._file.numbers(self._prefix + key, max_count=1 << 12)

    def value(self, key: str) -> Any:
        """See _value(), for what an architecture looks at itself."""
        return self._value(key)

    def _value(self, key: str) -> Any:
        """A number or flag. An array with a value a layer is one value where all are equal."""
        self._read.add(key)
        field = self._file.fields.get(self._prefix + key)
        if field is None or field.value is not None:
            return None if field is None else field.value
        values = self._file.numbers(field.key, max_count=1 << 12)
        if not values or len(set(values)) != 1:
            raise UnsupportedError(
                f"{self._file.path}: {self._file.where(field.key)}: differs from layer to layer, which is not supported "
                "for this architecture"
            )
        return values[0]

    def _check_heads(self, config: dict[str, Any]) -> None:
        """Keys and values of one length, all of it rotated."""
        lengths = {
            key: self._value(key)
            for key in ("attention.value_length", "rope.dimension_count")
            if key not in self._read
        }
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        if type(heads) is not int or type(hidden) is not int or heads < 1:
            return  # the family says so
        head_dim = config.get("head_dim", hidden // heads)
        for key, value in lengths.items():
            if value not in (None, head_dim):
                raise UnsupportedError(
                    f"{self._file.path}: {self._file.where(self._prefix + key)}: {value}; only the length of a head, "
                    f"{head_dim}, is supported for this architecture"
                )

    def _rope(self) -> dict[str, Any]:
        """Static scaling of the rotary embeddings."""
        self._read |= _SCALING
        key = self._prefix + "rope.scaling.type"
        kind = self._file.text(key, _MAX_NAME_BYTES) or "none"
        linear = self._value("rope.scale_linear")
        factor = self._value("rope.scaling.factor")
        if kind == "none" and linear is not None:
            kind, factor = "linear", linear
        if _ROPE_FACTORS in self._tensors:
            if kind != "none" and factor != 1.0:
                raise UnsupportedError(
                    f"{self._file.path}: {self._file.where(key)}: {kind!r} beside the tensor {_ROPE_FACTORS!r}"
                )
            return _scaling("factors", factors=_read_vector(self._tensors[_ROPE_FACTORS]))
        if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
            return {}
        if kind == "linear":
            return _scaling("linear", factor=factor)
        if kind == "yarn":
            return self._yarn(factor)
        raise UnsupportedError(
            f"{self._file.path}: {self._file.where(key)}: {kind!r}; none, linear and yarn are supported"
        )

    def _yarn(self, factor: Any) -> dict[str, Any]:
        attention = self._value("rope.scaling.attn_factor")
        if attention not in (None, 1.0):
            where = self._file.where(self._prefix + "rope.scaling.attn_factor")
            raise UnsupportedError(f"{self._file.path}: {where}: {attention}; only 1 is supported")
        return _scaling(
            "yarn",
            factor=factor,
            original_max_position_embeddings=self._value("rope.scaling.original_context_length"),
            beta_fast=self._value("rope.scaling.yarn_beta_fast"),
            beta_slow=self._value("rope.scaling.yarn_beta_slow"),
        )

    def _refuse_others(self) -> None:
        """What is not understood may change what the model computes."""
        known = self._read | _INFORMATIVE
        for name in self._file.fields:
            key = name.removeprefix(self._prefix)
            if key == name or key in known:
                continue
            stated = self._file.fields[name]
            value = f"a {stated.kind}" if "string" in stated.kind else self._value(key)
            if key == "attention.sliding_window" and value in (0, self._value("context_length")):
                continue
            if key in _RESTATED and value == self._value(_RESTATED[key]):
                continue
            if not any(value == neutral for neutral in _NEUTRAL.get(key, ())):
                raise UnsupportedError(
                    f"{self._file.path}: metadata: {self._file.where(name)}: {value} is not understood for this "
                    "architecture and may change what the model computes, so it is not ignored"
                )


def _scaling(kind: str, **values: Any) -> dict[str, Any]:
    stated = {key: value for key, value in values.items() if value is not None}
    return {"rope_scaling": {"rope_type": kind, **stated}}


def _read_vector(tensor: TensorInfo | BlockTensor) -> list[float]:
    """A short vector of f32."""
    if len(tensor.shape) != 1 or tensor.shape[0] > _MAX_ROPE_FACTORS or getattr(tensor, "dtype", "") != "F32":
        raise CorruptError(
            f"{tensor.path}: tensor {tensor.name!r}: shape {list(tensor.shape)}; at most {_MAX_ROPE_FACTORS} f32 are "
            "allowed"
        )
    with tensor.open() as reader:
        raw, _ = reader.floats(0, 1)
    return list(memoryview(raw).cast("f"))


_KEPT_PREFIXES = ("general.", "quantize.imatrix.")
_MAX_KEPT = 64
_MAX_KEPT_BYTES = 256


def _kept_metadata(file: GgufFile) -> dict[str, Any]:
    """What the file says of where it comes from: short texts and numbers of the general part, and of the importance
    matrix that it was quantised with."""
    kept: dict[str, Any] = {}
    for field in file.fields.values():
        if len(kept) == _MAX_KEPT or not field.key.startswith(_KEPT_PREFIXES):
            continue
        if field.value is not None:
            kept[field.key] = field.value
        elif field.kind == "string" and field.count <= _MAX_KEPT_BYTES:
            kept[field.key] = file.text(field.key, _MAX_KEPT_BYTES)
    return kept
