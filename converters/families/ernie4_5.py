"""ERNIE 4.5, dense: rotation of neighbouring elements."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import assemble
from .common import Recipe, attention, dense_ffn, num_layers


def mixer(config: Config, head_dim: int | None = None) -> Recipe:
    if config.flag("use_bias", False):
        config.unsupported("use_bias", "biases of the ffn are not built in")
    return attention(config, head_dim=head_dim, rope_theta=500000.0, rope_layout="interleaved")


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    return assemble(config, tensors, [mixer(config, 128)] * layers, [dense_ffn(config)] * layers)
