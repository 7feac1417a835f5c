"""Mistral, dense: a sliding window in every layer, or in none."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import assemble
from .common import attention, dense_ffn, num_layers, sliding_window, windowed


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    window = None if config.get("sliding_window") is None else sliding_window(config)
    mixers = windowed(attention(config), [window] * layers)
    return assemble(config, tensors, mixers, [dense_ffn(config)] * layers)
