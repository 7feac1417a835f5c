"""gpt-oss: attention sinks, windows in every other layer, biases everywhere, and experts with a clamped SwiGLU whose
gate and up lie by turns."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import Names, assemble
from .common import attention, moe_ffn, num_layers, softmax_router, windowed, windows_by_type


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    bias = config.flag("attention_bias", True)
    mixer = attention(config, qkv_bias=bias, output_bias=bias, head_dim=64, rope_theta=150000.0)
    mixer["sinks"] = True
    windows = windows_by_type(config, layers, [index % 2 == 0 for index in range(layers)], switch=None)
    moe = moe_ffn(config, width_key="intermediate_size", router=softmax_router(normalize=True, bias="logits"))
    moe["activation"] = "clamped_swiglu"
    moe["activation_alpha"] = config.number("swiglu_alpha", 1.702, minimum=0.0)
    moe["activation_limit"] = config.number("swiglu_limit", 7.0, minimum=1e-3)
    moe["expert_bias"] = True
    config.same("experts_per_token", "num_experts_per_tok")
    config.get("initial_context_length")  # rope's original context, which its own parameters state
    names = Names(router=("router.weight",), router_bias=("router.bias",), fused="interleaved")
    return assemble(config, tensors, windowed(mixer, windows), [moe] * layers, names=names)
