"""Qwen2, dense: biases on q, k and v; the layers from max_window_layers on may have a sliding window."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import assemble
from .common import attention, dense_ffn, num_layers, windowed, windows_by_type


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    mixer = attention(config, qkv_bias=True)
    first = config.integer("max_window_layers", 28, minimum=0, maximum=1 << 20)
    slides = config.flag("use_sliding_window", False) and config.get("sliding_window") is not None
    windows = windows_by_type(config, layers, [slides and index >= first for index in range(layers)])
    return assemble(config, tensors, windowed(mixer, windows), [dense_ffn(config)] * layers)
