"""Qwen3-Next and Qwen3.5-MoE: three layers of the gated delta rule to one of gated attention, zero-centred norms, and a
shared expert behind a sigmoid gate beside the routed ones."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import Names, assemble
from .common import (
    MAX_LAYERS,
    MAX_WIDTH,
    attention,
    layer_types,
    moe_ffn,
    note_prediction,
    num_layers,
    softmax_router,
    sparse_layers,
)
from .mixers import gated_delta


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    return _decoder(config, tensors, Names(zero_centred=True, joined_delta=True))


def qwen3_5_moe_text(config: Config, tensors: SourceTensors) -> Decoder:
    return _decoder(config, tensors, Names(zero_centred=True))


def _decoder(config: Config, tensors: SourceTensors, names: Names) -> Decoder:
    layers = num_layers(config)
    interval = config.integer("full_attention_interval", 4, maximum=MAX_LAYERS)
    default = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]
    types = layer_types(config, layers, default, ("full_attention", "linear_attention"))
    gated = attention(config, qk_norm="head", head_dim=256, partial=0.25)
    gated["output_gate"] = "sigmoid"
    mixers = {"full_attention": gated, "linear_attention": gated_delta(config)}
    shared_width = config.integer("shared_expert_intermediate_size", maximum=MAX_WIDTH)
    moe = moe_ffn(
        config,
        width_key="moe_intermediate_size",
        router=softmax_router(normalize=config.flag("norm_topk_prob", True)),
        shared={"intermediate_size": shared_width, "gate": "sigmoid"},
    )
    ffns = sparse_layers(config, layers, moe)
    result = assemble(config, tensors, [mixers[kind] for kind in types], ffns, names)
    note_prediction(result, tensors.leave_out("mtp."))
    return result
