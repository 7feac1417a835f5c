"""Mistral, dense: a sliding window in every layer, or in none; Ministral 3's queries grow with the position."""

from ..config import Config
from ..decoder import Decoder, SourceTensors
from .assembly import assemble
from .common import MAX_CONTEXT, attention, dense_ffn, leave_out_images, num_layers, sliding_window, windowed

_IMAGE_KEYS = (
    "vision_config", "image_token_index", "multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size",
    "vision_feature_layer",
)  # fmt: skip


def decoder(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    window = None if config.get("sliding_window") is None else sliding_window(config)
    mixers = windowed(attention(config), [window] * layers)
    return assemble(config, tensors, mixers, [dense_ffn(config)] * layers)


def ministral3(config: Config, tensors: SourceTensors) -> Decoder:
    layers = num_layers(config)
    mixer = attention(
        config, head_dim=128, rope_theta=1e6, rope_unused=("llama_4_scaling_beta", "max_position_embeddings")
    )
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.inner(key)
    mixer["temperature"] = {
        "floor": scaling.integer("original_max_position_embeddings", maximum=MAX_CONTEXT),
        "scale": scaling.number("llama_4_scaling_beta", minimum=0.0),
        "offset": 0,
    }
    return assemble(config, tensors, [mixer] * layers, [dense_ffn(config)] * layers)


def with_images(config: Config, tensors: SourceTensors) -> Decoder:
    """The text half of Mistral Small 3.1 and of Ministral 3, which read images as well."""
    inner = tensors.within("language_model.")
    text = config.inner("text_config")
    tied = config.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False)
    # The two disagree in files that transformers writes, which leave the head out where it is tied.
    text = text.changed({"tie_word_embeddings": tied and "lm_head.weight" not in inner})
    kind = text.choice("model_type", "mistral", ("mistral", "ministral3"))
    decoded = ministral3(text, inner) if kind == "ministral3" else decoder(text, inner)
    decoded.recipe["architecture"] = config.get("model_type")
    for key in _IMAGE_KEYS:
        config.get(key)
    text.finish()
    inner.finish()
    leave_out_images(decoded, tensors, ("vision_tower.", "multi_modal_projector."))
    return decoded
