"""Qwen2-MoE: biases on q, k and v, and a shared expert behind a sigmoid gate beside the routed ones."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import assemble
from .common import attention, moe_ffn, num_layers, softmax_router, sparse_layers, windowed, windows_by_type


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    mixer = attention(config, qkv_bias=config.flag("qkv_bias", True))
    last = config.integer("max_window_layers", 28, minimum=0, maximum=1 << 20)
    slides = config.flag("use_sliding_window", False)
    windows = windows_by_type(config, layers, [slides and i % 2 == 0 and i < last for i in range(layers)])
    shared_width = config.integer("shared_expert_intermediate_size", maximum=1 << 20)
    moe = moe_ffn(
        config,
        width_key="moe_intermediate_size",
        router=softmax_router(normalize=config.flag("norm_topk_prob", False)),
        shared={"intermediate_size": shared_width, "gate": "sigmoid"},
    )
    return assemble(config, tensors, windowed(mixer, windows), sparse_layers(config, layers, moe))
