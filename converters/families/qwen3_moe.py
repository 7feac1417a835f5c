"""Qwen3-MoE: QK-norm per head, routed experts without a shared one."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import assemble
from .common import attention, moe_ffn, num_layers, sliding_window, softmax_router, sparse_layers, windowed


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    bias = config.flag("attention_bias", False)
    mixer = attention(config, qk_norm="head", qkv_bias=bias, output_bias=bias)
    slides = config.flag("use_sliding_window", False)
    config.get("sliding_window")
    config.get("max_window_layers")  # older tools write it; a window is every layer's
    if not config.flag("use_qk_norm", True):  # Qwen3-Coder states it
        config.fail("use_qk_norm", "false; this model type always has QK-norm")
    moe = moe_ffn(
        config,
        width_key="moe_intermediate_size",
        router=softmax_router(normalize=config.flag("norm_topk_prob", False)),
    )
    windows = [sliding_window(config) if slides else None] * layers
    return assemble(config, tensors, windowed(mixer, windows), sparse_layers(config, layers, moe))
