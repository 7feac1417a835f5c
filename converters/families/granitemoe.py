"""Granite-MoE: scaled embeddings, residuals, scores and logits; the shared form has an expert beside the routed ones."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import Frame, Names, assemble
from .common import MAX_WIDTH, attention, moe_ffn, num_layers, softmax_router


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    bias = config.flag("attention_bias", False)
    mixer = attention(config, qkv_bias=bias, output_bias=bias)
    mixer["scale"] = config.number("attention_multiplier", 1.0, minimum=0.0)
    width = config.integer("shared_intermediate_size", 0, minimum=0, maximum=MAX_WIDTH)
    moe = moe_ffn(
        config,
        width_key="intermediate_size",
        router=softmax_router(normalize=True),
        shared={"intermediate_size": width, "gate": None} if width else None,
    )
    frame = Frame(
        embedding_scale=config.number("embedding_multiplier", 1.0, minimum=0.0),
        output_scale=1 / config.number("logits_scaling", 1.0, minimum=1e-6),
        residual_scale=config.number("residual_multiplier", 1.0, minimum=0.0),
    )
    names = Names(
        moe=("block_sparse_moe",), router=("router.layer.weight", "router.weight"), shared="shared_mlp"
    )
    return assemble(config, tensors, [mixer] * layers, [moe] * layers, names, frame)
