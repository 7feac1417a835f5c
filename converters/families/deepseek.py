"""DeepSeek-V2 and V3 and what is built like them (Kimi K2, Moonlight, GLM-4.7-Flash): latent attention, the first
layers dense, and shared experts beside those routed to in groups."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import CORRECTED, Names, assemble
from .common import (
    MAX_EXPERTS,
    MAX_LAYERS,
    Recipe,
    corrected_router,
    dense_ffn,
    moe_ffn,
    note_prediction,
    num_layers,
    shared_experts,
)
from .mixers import latent_attention


def v2(config: Config, tensors: SourceTensors) -> Decoder:
    experts = _routed_experts(config)
    router: Recipe = {
        "scoring": config.choice("scoring_func", "softmax", ("softmax",)),
        "normalize": False,
        "scale": config.number("routed_scaling_factor", 1.0, minimum=0.0),
    }
    method = config.choice("topk_method", "greedy", ("greedy", "group_limited_greedy"))
    groups = config.integer("n_group", 1, maximum=experts)
    keep = config.integer("topk_group", 1, maximum=groups)
    if experts % groups:
        config.fail("n_group", f"{groups} does not divide n_routed_experts, {experts}")
    if method == "group_limited_greedy" and keep < groups:
        router["groups"] = {"count": groups, "keep": keep, "score": "max"}
    if config.flag("norm_topk_prob", False):
        config.fail("norm_topk_prob", "true; this model type never normalizes")
    mixer = latent_attention(config, q_rank=1536, interleaved=True)
    layers = num_layers(config)
    dense = config.integer("first_k_dense_replace", 0, minimum=0, maximum=MAX_LAYERS)
    ffns = _ffns(config, layers, [index < dense for index in range(layers)], router)
    return assemble(config, tensors, [mixer] * layers, ffns, Names(shared="mlp.shared_experts"))


def v3(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    dense = config.integer("first_k_dense_replace", 3, minimum=0, maximum=MAX_LAYERS)
    return _corrected(config, tensors, [index < dense for index in range(layers)], q_rank=1536)


def glm4_moe_lite(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    first = config.integer("first_k_dense_replace", 1, minimum=0, maximum=MAX_LAYERS)
    types = config.get("mlp_layer_types", ["dense" if i < first else "sparse" for i in range(layers)])
    if not isinstance(types, list) or len(types) != layers or not set(types) <= {"dense", "sparse"}:
        config.fail(
            "mlp_layer_types", f"{str(types)[:80]}; dense or sparse for each of the {layers} layers is needed"
        )
    return _corrected(config, tensors, [kind == "dense" for kind in types], q_rank=768)


def _corrected(config: Config, tensors: SourceTensors, dense: list[bool], *, q_rank: int) -> Decoder:
    config.choice("scoring_func", "sigmoid", ("sigmoid",))
    config.choice("topk_method", "noaux_tc", ("noaux_tc",))
    router = corrected_router(config, _routed_experts(config))
    mixer = latent_attention(config, q_rank=q_rank, interleaved=config.flag("rope_interleave", True))
    ffns = _ffns(config, len(dense), dense, router)
    decoder = assemble(config, tensors, [mixer] * len(dense), ffns, CORRECTED)
    further = config.integer("num_nextn_predict_layers", 0, minimum=0, maximum=MAX_LAYERS)
    left_out = [tensors.leave_out(f"model.layers.{len(dense) + index}.") for index in range(further)]
    note_prediction(decoder, sum(left_out))
    return decoder


def _routed_experts(config: Config) -> int:
    return config.integer("n_routed_experts", maximum=MAX_EXPERTS)


def _ffns(config: Config, layers: int, dense: list[bool], router: Recipe) -> list[Recipe]:
    moe = moe_ffn(
        config,
        width_key="moe_intermediate_size",
        router=router,
        experts=_routed_experts(config),
        shared=shared_experts(config, "n_shared_experts", "moe_intermediate_size"),
    )
    if config.integer("moe_layer_freq", 1, maximum=MAX_LAYERS) != 1:
        config.fail("moe_layer_freq", "only 1 is known")
    config.get("intermediate_size")
    return [dense_ffn(config) if is_dense else moe for is_dense in dense]
