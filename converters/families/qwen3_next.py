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
    leave_out_images,
    moe_ffn,
    note_prediction,
    num_layers,
    softmax_router,
    sparse_layers,
    text_config,
)
from .mixers import gated_delta

_IMAGE_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    return _decoder(config, tensors, Names(zero_centred=_zero_centred(config), joined_delta=True))


def qwen3_5_moe_text(config: Config, tensors: SourceTensors) -> Decoder:
    return _qwen3_5(config, tensors, Names(zero_centred=_zero_centred(config)))


def qwen3_5_moe(config: Config, tensors: SourceTensors) -> Decoder:
    """The text half of a model that reads images as well."""
    text = text_config(config, _IMAGE_TOKENS)
    text.choice("model_type", "qwen3_5_moe_text", ("qwen3_5_moe_text",))
    result = _qwen3_5(text, tensors, Names(model="model.language_model.", zero_centred=True))
    text.finish()
    leave_out_images(result, tensors, ("model.visual.",))
    return result


def _zero_centred(config: Config) -> bool:
    """GGUF files have the norms' weights as they are multiplied with."""
    return config.flag("norms_are_zero_centred", True)


def _qwen3_5(config: Config, tensors: SourceTensors, names: Names) -> Decoder:
    if not config.flag("attn_output_gate", True):
        config.fail("attn_output_gate", "false; this model type always has the gate")
    for key in ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"):
        config.get(key)  # of what is left out, and of how others store the state
    # Sections tell the positions of images; those of text are the same in all of them.
    return _decoder(config, tensors, names, rope_unused=("mrope_section", "mrope_interleaved"))


def _decoder(
    config: Config, tensors: SourceTensors, names: Names, rope_unused: tuple[str, ...] = ()
) -> Decoder:
    layers = num_layers(config)
    interval = config.integer("full_attention_interval", 4, maximum=MAX_LAYERS)
    default = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]
    types = layer_types(config, layers, default, ("full_attention", "linear_attention"))
    gated = attention(config, qk_norm="head", head_dim=256, partial=0.25, rope_unused=rope_unused)
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
    further = config.integer("num_nextn_predict_layers", 0, minimum=0, maximum=MAX_LAYERS)
    left_out = [tensors.leave_out(f"model.layers.{layers + index}.") for index in range(further)]
    note_prediction(result, sum(left_out) + tensors.leave_out("mtp."))
    return result
