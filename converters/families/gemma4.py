"""Gemma 4, its text: norms behind mixer and ffn, wider heads where attention is full, and routed experts beside the dense
ffn, each with norms of their own."""

import math
from dataclasses import replace

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import Frame, Names, assemble
from .common import (
    MAX_LAYERS,
    MAX_WIDTH,
    Recipe,
    attention,
    leave_out_images,
    moe_ffn,
    num_layers,
    sliding_window,
    text_config,
)

_NAMES = Names(
    ffn_norm="pre_feedforward_layernorm",
    moe=("router",),
    router=("proj.weight",),
    experts_module="",
    shared="mlp",
)


_OTHER_KEYS = (
    "audio_config", "boi_token_id", "eoi_token_id", "image_token_id", "video_token_id", "boa_token_id",
    "eoa_token_id", "eoa_token_index", "audio_token_id", "vision_soft_tokens_per_image",
)  # fmt: skip


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    return _decoder(config, tensors, _NAMES)


def _decoder(config: Config, tensors: SourceTensors, names: Names) -> Decoder:
    layers = num_layers(config)
    _refuse_what_is_missing(config)
    config.choice("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    ffn = _ffn(config)
    frame = Frame(
        embedding_scale=math.sqrt(config.integer("hidden_size", maximum=MAX_WIDTH)),
        tied=True,
        softcap=config.number("final_logit_softcapping", 0.0, minimum=0.0),
        post_norms=True,
    )
    mixers = _mixers(config, layers)
    return assemble(config, tensors, mixers, [ffn] * layers, names, frame)


def with_images(config: Config, tensors: SourceTensors) -> Decoder:
    """The text half of a model that reads images, and hears, as well."""
    text = text_config(config, _OTHER_KEYS, tied=True)
    decoded = _decoder(text, tensors, replace(_NAMES, model="model.language_model."))
    decoded.recipe["architecture"] = config.get("model_type")
    text.finish()
    others = ("vision_tower", "embed_vision", "audio_tower", "embed_audio")
    leave_out_images(decoded, tensors, [f"model.{part}." for part in others])
    return decoded


def _refuse_what_is_missing(config: Config) -> None:
    if config.integer("hidden_size_per_layer_input", 256, minimum=0, maximum=MAX_WIDTH):
        config.unsupported("hidden_size_per_layer_input", "embeddings of every layer are not built in")
    if config.integer("num_kv_shared_layers", 0, minimum=0, maximum=MAX_LAYERS):
        config.unsupported("num_kv_shared_layers", "layers that share keys and values are not built in")
    if config.get("use_bidirectional_attention") not in (None, "vision"):
        config.unsupported("use_bidirectional_attention", "attention to later tokens is not built in")
    for key in ("vocab_size_per_layer_input", "use_double_wide_mlp"):  # of what is refused
        config.get(key)


def _ffn(config: Config) -> Recipe:
    width = config.integer("intermediate_size", maximum=MAX_WIDTH)
    if not config.flag("enable_moe_block", False):
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            config.get(key)
        return {"kind": "dense", "intermediate_size": width, "activation": "gelu_tanh"}
    router = {"scoring": "softmax", "normalize": True, "scale": 1.0, "expert_scale": True}
    moe = moe_ffn(
        config,
        width_key="moe_intermediate_size",
        router=router,
        top_key="top_k_experts",
        shared={"intermediate_size": width, "gate": None},
    )
    return {**moe, "activation": "gelu_tanh", "branch_norms": True}


def _mixers(config: Config, layers: int) -> list[Recipe]:
    types = config.get(
        "layer_types", ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
    )
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
        config.fail("layer_types", f"{str(types)[:80]}; {layers} of {' and '.join(known)} are needed")
    ropes = config.inner("rope_parameters")
    sliding = _mixer(config, ropes, "sliding_attention", {})
    sliding["window"] = sliding_window(config)
    full = _mixer(config, ropes, "full_attention", _full_layers(config, types))
    if config.flag("attention_k_eq_v", False):
        full["values_are_keys"] = True
    ropes.finish()
    return [full if kind == "full_attention" else sliding for kind in types]


def _full_layers(config: Config, types: list[str]) -> dict[str, int]:
    """What heads of the layers with full attention are like: as older files state it, or layer by layer."""
    stated = {
        "head_dim": config.get("global_head_dim"),
        "num_key_value_heads": config.get("num_global_key_value_heads"),
    }
    by_layer = config.get("per_layer_config", {})
    full = {str(index) for index, kind in enumerate(types) if kind == "full_attention"}
    if by_layer:
        if (
            not isinstance(by_layer, dict)
            or set(by_layer) != full
            or len({str(v) for v in by_layer.values()}) != 1
        ):
            config.unsupported("per_layer_config", "heads may differ between full and sliding attention only")
        stated = next(iter(by_layer.values()))
        if not isinstance(stated, dict) or not set(stated) <= {"head_dim", "num_key_value_heads"}:
            config.unsupported("per_layer_config", "only head_dim and num_key_value_heads may differ")
    elif stated["head_dim"] is None:
        stated["head_dim"] = 512
    return {key: value for key, value in stated.items() if value is not None}


def _mixer(config: Config, ropes: Config, kind: str, heads: dict[str, int]) -> Recipe:
    own = config.changed({**heads, "rope_parameters": ropes.get(kind, {})})
    bias = config.flag("attention_bias", False)
    mixer = attention(own, qk_norm="head", qkv_bias=bias, output_bias=bias, head_dim=256)
    return {**mixer, "scale": 1.0, "value_norm": True}
