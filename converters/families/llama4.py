"""Llama 4, its text: layers that rotate attend in chunks, the others to everything with queries that grow with the position;
an expert's input is weighed, and an expert is shared."""

from typing import Any

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import Names, assemble
from .common import (
    MAX_CONTEXT,
    MAX_LAYERS,
    MAX_WIDTH,
    Recipe,
    attention,
    dense_ffn,
    leave_out_images,
    moe_ffn,
    num_layers,
    text_config,
)

_NAMES = Names(
    dense="feed_forward",
    moe=("feed_forward",),
    router=("router.weight",),
    fused="columns",
    shared="feed_forward.shared_expert",
)
_ROUTER = {"scoring": "sigmoid", "normalize": False, "scale": 1.0, "weighs": "input"}


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    width = config.integer("intermediate_size", maximum=MAX_WIDTH)
    shared = {"intermediate_size": width, "gate": None}
    moe = moe_ffn(config, width_key="intermediate_size", router=_ROUTER, shared=shared)
    sparse = _sparse(config, layers)
    config.get("intermediate_size_mlp")  # stated also where every layer is sparse
    ffns = [moe if index in sparse else dense_ffn(config, "intermediate_size_mlp") for index in range(layers)]
    return assemble(config, tensors, _mixers(config, layers), ffns, _NAMES)


def with_images(config: Config, tensors: SourceTensors) -> Decoder:
    """The text half of a model that reads images as well."""
    text = text_config(config, ("image_token_index", "boi_token_index", "eoi_token_index"))
    inner = tensors.within("language_model.")
    decoded = decoder(text, inner)
    decoded.recipe["architecture"] = config.get("model_type")
    text.finish()
    inner.finish()
    leave_out_images(decoded, tensors, ("vision_model.", "multi_modal_projector."))
    return decoded


def _mixers(config: Config, layers: int) -> list[Recipe]:
    bias = config.flag("attention_bias", False)
    plain = attention(
        config, qkv_bias=bias, output_bias=bias, head_dim=128, rope_theta=500000.0, rope_layout="interleaved"
    )
    rotating = dict(plain)
    if config.flag("use_qk_norm", True):  # after the rotation, which leaves lengths as they are
        rotating["qk_norm"] = "unit"
        if plain["rope"]["attention_factor"] != 1.0:
            config.unsupported("rope_scaling", "an attention factor other than 1 beside use_qk_norm")
    still = {**plain, "rope": None}
    if _truth(config, "attn_temperature_tuning", True):
        still["temperature"] = {
            "floor": config.integer("floor_scale", 8192, maximum=MAX_CONTEXT),
            "scale": config.number("attn_scale", 0.1, minimum=0.0),
        }
    config.get("floor_scale"), config.get("attn_scale")
    rotates = _rotates(config, layers)
    chunk = config.integer("attention_chunk_size", 8192, maximum=MAX_CONTEXT)
    types = config.get("layer_types", ["chunked_attention" if r else "full_attention" for r in rotates])
    known = ("chunked_attention", "full_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
        config.fail("layer_types", f"{str(types)[:80]}; {layers} of {' and '.join(known)} are needed")
    return [
        {**(rotating if rotate else still), **({"chunk": chunk} if kind == "chunked_attention" else {})}
        for rotate, kind in zip(rotates, types, strict=True)
    ]


def _rotates(config: Config, layers: int) -> list[bool]:
    """Whether each layer has a rope; the key's name says the opposite."""
    interval = config.integer("no_rope_layer_interval", 4, maximum=MAX_LAYERS)
    listed = config.integers("no_rope_layers", maximum=1)
    if listed and len(listed) < layers:
        config.fail("no_rope_layers", f"{len(listed)} entries; one for each of the {layers} layers is needed")
    return [bool(listed[i]) if listed else (i + 1) % interval != 0 for i in range(layers)]


def _sparse(config: Config, layers: int) -> set[int]:
    """The layers with routed experts."""
    step = config.integer("interleave_moe_layer_step", 1, maximum=MAX_LAYERS)
    listed = config.integers("moe_layers", maximum=MAX_LAYERS)
    if config.get("moe_layers") is not None:
        return set(listed)
    return set(range(step - 1, layers, step))


def _truth(config: Config, key: str, default: bool) -> bool:
    """A flag that older files state as a number."""
    value: Any = config.get(key, default)
    return value != 0 if type(value) is int else config.flag(key, default)
