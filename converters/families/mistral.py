"""Mistral, dense: a sliding window in every layer, or in none; Ministral 3's queries grow with the position."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import assemble
from .common import MAX_CONTEXT, attention, dense_ffn, num_layers, sliding_window, windowed


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    window = None if config.get("sliding_window") is None else sliding_window(config)
    mixers = windowed(attention(config), [window] * layers)
    return assemble(config, tensors, mixers, [dense_ffn(config)] * layers)


def ministral3(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    mixer = attention(
        config, head_dim=128, rope_theta=1e6, rope_unused=("llama_4_scaling_beta", "max_position_embeddings")
    )
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.inner(key)
    mixer["temperature"] = {
        "floor": scaling.integer("original_max_position_embeddings", maximum=MAX_CONTEXT),
        "scale": scaling.number("llama_4_scaling_beta", minimum=0.0),
        "offset": 0,
    }
    return assemble(config, tensors, [mixer] * layers, [dense_ffn(config)] * layers)
