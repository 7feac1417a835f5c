"""Mixtral: renormalised top-k routing in every layer; its experts call gate, up and down w1, w3 and w2."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .common import assemble, attention, moe_ffn, num_layers, sliding_window


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    mixer = attention(config, rope_theta=1e6)
    window = None if config.get("sliding_window") is None else sliding_window(config)
    moe = moe_ffn(config, width_key="intermediate_size", normalize=True)
    return assemble(
        config,
        tensors,
        mixer,
        [window] * layers,
        [moe] * layers,
        moe_names=("block_sparse_moe", "mlp"),
        expert_names=("w1", "w3", "w2"),
    )
