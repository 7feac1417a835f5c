"""OLMoE: QK-norm over the whole row, optionally clipped q, k and v; every layer has routed experts."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import assemble
from .common import attention, moe_ffn, num_layers, softmax_router


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    bias = config.flag("attention_bias", False)
    clip = config.number("clip_qkv", 0.0, minimum=0.0) or None
    mixer = attention(config, qk_norm="row", qkv_bias=bias, output_bias=bias, clip_qkv=clip)
    moe = moe_ffn(
        config,
        width_key="intermediate_size",
        router=softmax_router(normalize=config.flag("norm_topk_prob", False)),
    )
    return assemble(config, tensors, [mixer] * layers, [moe] * layers)
