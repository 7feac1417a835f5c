"""Model types and the families that read them: a new one is a line here and a file in families/."""

from collections.abc import Callable, Mapping
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
    "granitemoe": granitemoe.decoder,
    "granitemoeshared": granitemoe.decoder,
    "kimi_k2": deepseek.v3,
    "lfm2": lfm2.lfm2,
    "lfm2_moe": lfm2.moe,
    "llama": llama.decoder,
    "llama4": llama4.with_images,
    "llama4_text": llama4.decoder,
    "mistral": mistral.decoder,
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


def read_decoder(checkpoint: Checkpoint) -> Decoder:
    """The recipe of a checkpoint and the sources of its tensors.

    Raises UnsupportedError, naming it, for a model type, configuration key or tensor that is not understood;
    CorruptError for what is missing, mis-shaped or out of range.
    """
    tensors = SourceTensors(
        checkpoint.tensors, str(checkpoint.path), checkpoint.config_name, checkpoint.tensor_name
    )
    config = Config(checkpoint.config, checkpoint.config_place, checkpoint.config_key)
    decoder = _decoder(checkpoint.config, config, tensors)
    if "auto_map" in checkpoint.config:
        decoder.notes.append(
            "config.json: auto_map names code, which is not run: this model type is built in"
        )
    return decoder


def expected_decoder(values: Mapping[str, Any], where: str) -> Decoder:
    """What a checkpoint with this config.json has to hold; its sources name no file. Raises as read_decoder does, naming
    `where`."""
    config = Config(dict(values), where)
    return _decoder(dict(values), config, _EveryTensor(str(values.get("dtype", values.get("torch_dtype")))))


class _EveryTensor(SourceTensors):
    """Has each tensor by the first name that it is asked for."""

    def __init__(self, dtype: str) -> None:
        super().__init__({}, "")
        self._dtype = {"float32": "F32", "float16": "F16"}.get(dtype, "BF16")

    def within(self, prefix: str) -> SourceTensors:
        return self

    def find(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        return TensorInfo(name, self._dtype, shape, 0, 0, Path())


def _decoder(values: dict[str, Any], config: Config, tensors: SourceTensors) -> Decoder:
    model_type, where = values.get("model_type"), config.where
    if not isinstance(model_type, str):
        raise CorruptError(f"{where}: model_type: {str(model_type)[:80]}; the name of a model type is needed")
    if values.get("quantization_config"):
        raise UnsupportedError(
            f"{where}: quantization_config: checkpoints that are quantised already are not read by this "
            "version; use the bf16, f16 or f32 one"
        )
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
