"""Llama and what is built like it: grouped-query attention and a gated ffn in every layer."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import assemble
from .common import attention, dense_ffn, num_layers


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    bias = config.flag("attention_bias", False)
    mixer = attention(config, qkv_bias=bias, output_bias=bias)
    return assemble(config, tensors, [mixer] * layers, [dense_ffn(config)] * layers)
