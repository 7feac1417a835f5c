"""Mixtral: renormalised top-k routing in every layer; its experts call gate, up and down w1, w3 and w2."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import Names, assemble
from .common import attention, moe_ffn, num_layers, sliding_window, softmax_router, windowed


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    mixer = attention(config, rope_theta=1e6)
    window = None if config.get("sliding_window") is None else sliding_window(config)
    moe = moe_ffn(config, width_key="intermediate_size", router=softmax_router(normalize=True))
    return assemble(
        config,
        tensors,
        windowed(mixer, [window] * layers),
        [moe] * layers,
        names=Names(moe=("block_sparse_moe", "mlp"), experts=("w1", "w3", "w2")),
    )
