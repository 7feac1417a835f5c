"""ERNIE 4.5: experts chosen with a correction bias on softmax scores, shared experts, dense first layers."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import Names, assemble
from .common import MAX_EXPERTS, dense_ffn, moe_ffn, num_layers, shared_experts, softmax_router
from .ernie4_5 import mixer


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    minimum = config.number("moe_norm_min", 1e-12, minimum=0.0)
    moe = moe_ffn(
        config,
        width_key="moe_intermediate_size",
        router=softmax_router(normalize=True, norm_minimum=minimum, bias="selection"),
        experts=config.integer("moe_num_experts", maximum=MAX_EXPERTS),
        top_key="moe_k",
        shared=shared_experts(config, "moe_num_shared_experts", "moe_intermediate_size"),
    )
    config.choice("moe_gate", "topk", ("topk",))
    if not config.flag("use_rmsnorm", True):
        config.unsupported("use_rmsnorm", "this model type has RMS norms")
    for training in ("moe_capacity", "moe_use_aux_free", "num_nextn_predict_layers"):
        config.get(training)
    left_out = tensors.leave_out("model.mtp")
    names = Names(
        router_bias=("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"),
        shared="mlp.shared_experts",
    )
    ffns = [moe if sparse else dense_ffn(config) for sparse in _sparse(config, layers)]
    decoder = assemble(config, tensors, [mixer(config)] * layers, ffns, names)
    if left_out:
        decoder.notes.append(f"{left_out} tensors for multi-token prediction are left out")
    return decoder


def _sparse(config: Config, layers: int) -> list[bool]:
    """Whether each layer has routed experts."""
    interval = config.integer("moe_layer_interval", 1, maximum=layers)
    first = config.integer("moe_layer_start_index", 1, minimum=0, maximum=layers)
    last = config.integer("moe_layer_end_index", -1, minimum=-1, maximum=layers)
    end = layers if last == -1 else last + 1
    return [first <= index < end and (index + 1) % interval == 0 for index in range(layers)]
