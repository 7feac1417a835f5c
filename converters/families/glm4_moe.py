"""GLM-4.5 and 4.6: half of a head rotates, corrected sigmoid routing, dense first layers."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import CORRECTED, assemble
from .common import (
    MAX_EXPERTS,
    attention,
    corrected_router,
    dense_ffn,
    moe_ffn,
    note_prediction,
    num_layers,
    shared_experts,
)


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    mixer = attention(
        config,
        qkv_bias=config.flag("attention_bias", False),
        qk_norm="head" if config.flag("use_qk_norm", False) else None,
        partial=0.5,
    )
    experts = config.integer("n_routed_experts", maximum=MAX_EXPERTS)
    moe = moe_ffn(
        config,
        width_key="moe_intermediate_size",
        router=corrected_router(config, experts),
        experts=experts,
        shared=shared_experts(config, "n_shared_experts", "moe_intermediate_size"),
    )
    dense = config.integer("first_k_dense_replace", 1, minimum=0, maximum=layers)
    ffns = [dense_ffn(config)] * dense + [moe] * (layers - dense)
    further = config.integer("num_nextn_predict_layers", 0, minimum=0, maximum=layers)
    left_out = sum(tensors.leave_out(f"model.layers.{layers + index}.") for index in range(further))
    decoder = assemble(config, tensors, [mixer] * layers, ffns, CORRECTED)
    note_prediction(decoder, left_out)
    return decoder
