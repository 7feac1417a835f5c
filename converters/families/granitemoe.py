"""Granite, dense and with experts: scaled embeddings, residuals, scores and logits; the shared form has an expert beside the
routed ones."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import Frame, Names, assemble
from .common import MAX_WIDTH, Recipe, attention, dense_ffn, moe_ffn, num_layers, softmax_router


def dense(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    if config.flag("mlp_bias", False):
        config.unsupported("mlp_bias", "biases in the ffn are not built in")
    return assemble(
        config, tensors, [_mixer(config)] * layers, [dense_ffn(config)] * layers, frame=_frame(config)
    )


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    width = config.integer("shared_intermediate_size", 0, minimum=0, maximum=MAX_WIDTH)
    moe = moe_ffn(
        config,
        width_key="intermediate_size",
        router=softmax_router(normalize=True),
        shared={"intermediate_size": width, "gate": None} if width else None,
    )
    names = Names(
        moe=("block_sparse_moe",), router=("router.layer.weight", "router.weight"), shared="shared_mlp"
    )
    return assemble(config, tensors, [_mixer(config)] * layers, [moe] * layers, names, _frame(config))


def _mixer(config: Config) -> Recipe:
    bias = config.flag("attention_bias", False)
    mixer = attention(config, qkv_bias=bias, output_bias=bias)
    return {**mixer, "scale": config.number("attention_multiplier", 1.0, minimum=0.0)}


def _frame(config: Config) -> Frame:
    return Frame(
        embedding_scale=config.number("embedding_multiplier", 1.0, minimum=0.0),
        output_scale=1 / config.number("logits_scaling", 1.0, minimum=1e-6),
        residual_scale=config.number("residual_multiplier", 1.0, minimum=0.0),
    )
