"""Phi-3.5-MoE: layer norms with biases, biases in attention and output, and the sparsemixer's two experts."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import Frame, Names, assemble
from .common import attention, moe_ffn, num_layers, sliding_window, windowed


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    bias = config.flag("attention_bias", False)
    mixer = attention(config, qkv_bias=bias, output_bias=bias, rope_theta=1e6)
    window = None if config.get("sliding_window") is None else sliding_window(config)
    jitter = config.number("router_jitter_noise", 0.01, minimum=0.0, maximum=1.0)
    config.get("input_jitter_noise")  # of training
    router = {"scoring": "sparsemixer", "normalize": False, "scale": 1.0, "jitter": jitter}
    moe = moe_ffn(config, width_key="intermediate_size", router=router)
    if moe["num_experts_per_tok"] != 2:
        config.unsupported("num_experts_per_tok", "the sparsemixer chooses 2")
    names = Names(
        moe=("block_sparse_moe", "mlp"), router=("gate.weight", "router.weight"), experts=("w1", "w3", "w2")
    )
    frame = Frame(layer_norm=True, output_bias=config.flag("lm_head_bias", False))
    return assemble(config, tensors, windowed(mixer, [window] * layers), [moe] * layers, names, frame)
