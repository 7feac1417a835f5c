"""LFM2, dense and MoE: short convolutions between gates, with attention in some layers."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import Frame, Names, assemble
from .common import MAX_LAYERS, MAX_WIDTH, Recipe, attention, layer_types, moe_ffn, num_layers
from .mixers import short_conv

_NAMES = Names(
    attention_norm="operator_norm",
    ffn_norm="ffn_norm",
    final_norm="embedding_norm",
    output_projection="out_proj",
    qk_norms=("q_layernorm", "k_layernorm"),
    dense="feed_forward",
    ffn_parts=("w1", "w3", "w2"),
    moe=("feed_forward",),
    router_bias=("expert_bias",),
    experts=("w1", "w3", "w2"),
)


def lfm2(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    stated = "intermediate_size" if config.get("block_ff_dim") is None else "block_ff_dim"  # goes before
    config.get("intermediate_size")
    ffn = _ffn(_adjusted(config, config.integer(stated, maximum=MAX_WIDTH)))
    indices = config.get("full_attn_idxs", list(range(layers)))
    if not isinstance(indices, list):
        config.fail("full_attn_idxs", f"{str(indices)[:80]}; a list of layers is allowed")
    default = ["full_attention" if index in indices else "conv" for index in range(layers)]
    return _decoder(config, tensors, default, [ffn] * layers)


def moe(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    router: Recipe = {
        "scoring": "sigmoid",
        "normalize": config.flag("norm_topk_prob", True),
        "norm_epsilon": 1e-6,
        "scale": config.number("routed_scaling_factor", 1.0, minimum=0.0),
        **({"bias": "selection"} if config.flag("use_expert_bias", True) else {}),
    }
    sparse = moe_ffn(config, width_key="moe_intermediate_size", router=router)
    dense = _ffn(config.integer("intermediate_size", maximum=MAX_WIDTH))
    count = config.integer("num_dense_layers", 2, minimum=0, maximum=MAX_LAYERS)
    ffns = [dense if index < count else sparse for index in range(layers)]
    return _decoder(config, tensors, ["full_attention"] * layers, ffns)


def _decoder(config: Config, tensors: SourceTensors, default: list[str], ffns: list[Recipe]) -> Decoder:
    _check_old_keys(config)
    types = layer_types(config, len(ffns), default, ("full_attention", "conv"))
    full = attention(config, qk_norm="head", rope_theta=1e6)
    mixers = {"full_attention": full, "conv": short_conv(config)}
    tied = config.flag("tie_embedding", True)
    frame = Frame(eps_key="norm_eps", tied=tied)
    return assemble(config, tensors, [mixers[kind] for kind in types], ffns, _NAMES, frame)


def _check_old_keys(config: Config) -> None:
    """What older configurations say again, or of how a model began its training."""
    for key in ("block_dim", "conv_dim", "conv_dim_out"):
        config.same(key, "hidden_size")
    config.same("num_heads", "num_attention_heads")
    config.same("block_norm_eps", "norm_eps")
    for key in ("block_use_swiglu", "use_pos_enc"):
        if not config.flag(key, True):
            config.fail(key, "false; this model type always has it")
    for key in (
        "block_mlp_init_scale",
        "block_out_init_scale",
        "block_use_xavier_init",
        "conv_use_xavier_init",
    ):
        config.get(key)


def _ffn(width: int) -> Recipe:
    return {"kind": "dense", "intermediate_size": width, "activation": "silu"}


def _adjusted(config: Config, width: int) -> int:
    """What the layers have of the width that config.json states."""
    multiple = config.integer("block_multiple_of", 256, maximum=MAX_WIDTH)
    multiplier = config.number("block_ffn_dim_multiplier", 1.0, minimum=0.0, maximum=1e3)
    if not config.flag("block_auto_adjust_ff_dim", True):
        return width
    width = int(multiplier * int(2 * width / 3))
    return -(-width // multiple) * multiple
