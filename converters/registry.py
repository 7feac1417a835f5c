"""Model types and the families that read them: a new one is a line here and a file in families/."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgert.errors import CorruptError, UnsupportedError

from .checkpoint import Checkpoint
from .config import Config
from .decoder import Decoder, SourceTensors
from .families import (
    deepseek,
    ernie4_5,
    ernie4_5_moe,
    gemma4,
    glm4_moe,
    gpt_oss,
    granitemoe,
    lfm2,
    llama,
    llama4,
    mistral,
    mixtral,
    olmoe,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_next,
)
from .tensor import TensorInfo

Family = Callable[[Config, SourceTensors], Decoder]

FAMILIES: dict[str, Family] = {
    "deepseek_v2": deepseek.v2,
    "deepseek_v3": deepseek.v3,
    "ernie4_5": ernie4_5.decoder,
    "ernie4_5_moe": ernie4_5_moe.decoder,
    "gemma4": gemma4.with_images,
    "gemma4_text": gemma4.decoder,
    "glm4_moe": glm4_moe.decoder,
    "glm4_moe_lite": deepseek.glm4_moe_lite,
    "gpt_oss": gpt_oss.decoder,
    "granite": granitemoe.dense,
    "granitemoe": granitemoe.decoder,
    "granitemoeshared": granitemoe.decoder,
    "kimi_k2": deepseek.v3,
    "lfm2": lfm2.lfm2,
    "lfm2_moe": lfm2.moe,
    "llama": llama.decoder,
    "llama4": llama4.with_images,
    "llama4_text": llama4.decoder,
    "ministral3": mistral.ministral3,
    "mistral": mistral.decoder,
    "mistral3": mistral.with_images,
    "mixtral": mixtral.decoder,
    "olmoe": olmoe.decoder,
    "phimoe": phimoe.decoder,
    "qwen2": qwen2.decoder,
    "qwen2_moe": qwen2_moe.decoder,
    "qwen3": qwen3.decoder,
    "qwen3_5_moe": qwen3_next.qwen3_5_moe,
    "qwen3_5_moe_text": qwen3_next.qwen3_5_moe_text,
    "qwen3_moe": qwen3_moe.decoder,
    "qwen3_next": qwen3_next.decoder,
}

# Buffers that older checkpoints carry and that the configuration determines.
_DERIVED = (".rotary_emb.inv_freq",)

_QUANTIZED = ("quantization_config", "quantization")  # MLX writes both
_MLX_EXPERTS = ".switch_mlp."
_NAMED = 8  # tensors in a note


def read_decoder(checkpoint: Checkpoint) -> Decoder:
    """The recipe of a checkpoint and the sources of its tensors.

    Raises UnsupportedError, naming it, for a model type, configuration key or tensor that is not understood;
    CorruptError for what is missing, mis-shaped or out of range.
    """
    checkpoint = _unquantised(checkpoint)
    tensors = SourceTensors(
        checkpoint.tensors, str(checkpoint.path), checkpoint.config_name, checkpoint.tensor_name
    )
    config = Config(checkpoint.config, checkpoint.config_place, checkpoint.config_key)
    decoder = _decoder(checkpoint.config, config, tensors)
    decoder.notes += _not_kept(decoder)
    if "auto_map" in checkpoint.config:
        decoder.notes.append(
            "config.json: auto_map names code, which is not run: this model type is built in"
        )
    return decoder


def expected_decoder(values: Mapping[str, Any], where: str) -> Decoder:
    """What a checkpoint with this config.json has to hold; its sources name no file. Raises as read_decoder does, naming
    `where`."""
    plain = {key: value for key, value in values.items() if key not in _QUANTIZED}
    tensors = _EveryTensor(str(values.get("dtype", values.get("torch_dtype"))))
    return _decoder(plain, Config(plain, where), tensors)


class _EveryTensor(SourceTensors):
    """Has each tensor by the first name that it is asked for."""

    def __init__(self, dtype: str) -> None:
        super().__init__({}, "")
        self._dtype = {"float32": "F32", "float16": "F16"}.get(dtype, "BF16")

    def within(self, prefix: str) -> SourceTensors:
        return self

    def find(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        return TensorInfo(name, self._dtype, shape, 0, 0, Path())


def _unquantised(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as if it had never been quantised: the same weights under their usual names, other sources."""
    values = checkpoint.config
    stated = next((key for key in _QUANTIZED if values.get(key)), None)
    if stated is None and not any(_MLX_EXPERTS in name for name in checkpoint.tensors):
        return checkpoint
    from .schemes import read_scheme  # needs numpy, which other checkpoints do without

    settings = values[stated] if stated is not None else {}
    return replace(
        checkpoint,
        config={key: value for key, value in values.items() if key not in _QUANTIZED},
        tensors=read_scheme(settings, checkpoint.tensors, f"{checkpoint.config_place}: {stated}"),
    )


def _not_kept(decoder: Decoder) -> list[str]:
    """A note for each reason why quantised tensors are packed anew."""
    reasons: dict[str, dict[str, None]] = {}
    sources = [tensor.source for tensor in decoder.dense if tensor.kind != "exact"]
    for source in [*sources, *(source for expert in decoder.experts for source in expert.sources)]:
        reason = getattr(source.tensor, "why_not_kept", None)
        if reason is not None:
            reasons.setdefault(reason, {})[source.tensor.name] = None
    notes = []
    for reason, names in reasons.items():
        some = ", ".join(list(names)[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
        notes.append(f"{len(names)} of the tensors are dequantised and packed anew ({reason}): {some}")
    return notes


def _decoder(values: dict[str, Any], config: Config, tensors: SourceTensors) -> Decoder:
    model_type, where = values.get("model_type"), config.where
    if not isinstance(model_type, str):
        raise CorruptError(f"{where}: model_type: {str(model_type)[:80]}; the name of a model type is needed")
    if model_type not in FAMILIES:
        custom = " (its auto_map names code of its own, which is never run)" if "auto_map" in values else ""
        raise UnsupportedError(
            f"{where}: model_type {model_type[:80]!r} is not supported{custom}; "
            f"known are {', '.join(FAMILIES)}"
        )
    decoder = FAMILIES[model_type](config, tensors)
    config.finish()
    tensors.finish(_DERIVED)
    return decoder
