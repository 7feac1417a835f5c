"""What an architecture of GGUF says otherwise than config.json, where that is no mere renaming.

Each function completes the configuration of one architecture from its metadata. What contradicts the model type is stated
under a key that no family reads, and so refused by its name.
"""

from collections.abc import Sequence
from typing import Any

from .gguf_names import SIGMOID, Config, Metadata


def partial_rotation(metadata: Metadata, config: Config) -> None:
    rotated, head = metadata.value("rope.dimension_count"), config.get("head_dim")
    if rotated is not None and isinstance(head, int) and head > 0:
        config["partial_rotary_factor"] = rotated / head


def gpt_oss(metadata: Metadata, config: Config) -> None:
    scaling = config.get("rope_scaling")
    if scaling is not None and scaling["rope_type"] == "yarn":
        scaling["truncate"] = False  # as the model does it, and no key says


def further_layers(metadata: Metadata, config: Config) -> None:
    """Layers that predict further tokens count among all."""
    further = metadata.value("nextn_predict_layers") or 0
    if further:
        config["num_nextn_predict_layers"] = further
        config["num_hidden_layers"] -= further


def corrected_routing(metadata: Metadata, config: Config) -> None:
    config["first_k_dense_replace"] = metadata.value("leading_dense_block_count") or 0
    config["n_shared_experts"] = metadata.value("expert_shared_count") or 0
    config["routed_scaling_factor"] = metadata.value("expert_weights_scale") or 1.0
    config["norm_topk_prob"] = bool(metadata.value("expert_weights_norm"))
    config["n_group"] = metadata.value("expert_group_count") or 1
    config["topk_group"] = metadata.value("expert_group_used_count") or config["n_group"]


def glm4_moe(metadata: Metadata, config: Config) -> None:
    partial_rotation(metadata, config)
    corrected_routing(metadata, config)
    further_layers(metadata, config)
    if metadata.value("expert_gating_func") not in (None, SIGMOID):
        config["scoring_func"] = "not sigmoid"  # which nobody reads, so it is refused
    config["use_qk_norm"] = metadata.has("blk.0.attn_q_norm.weight")


def deepseek(metadata: Metadata, config: Config) -> None:
    corrected_routing(metadata, config)
    further_layers(metadata, config)
    rotated = metadata.value("rope.dimension_count") or 0
    # Where k_b and v_b are apart, the lengths of heads are those in the latent space, and others state the model's own.
    lengths = [(metadata.value(f"attention.{part}_length_mla"), metadata.value(f"attention.{part}_length"))
               for part in ("key", "value")]  # fmt: skip
    key, value = (own or general for own, general in lengths)
    config |= {"qk_rope_head_dim": rotated, "qk_nope_head_dim": (key or 0) - rotated, "v_head_dim": value}
    config["q_lora_rank"] = metadata.value("attention.q_lora_rank") or None
    config["kv_lora_rank"] = metadata.value("attention.kv_lora_rank")
    config["num_key_value_heads"] = config.get("num_attention_heads")
    gating = metadata.value("expert_gating_func")
    if not gating and metadata.has(f"blk.{config['first_k_dense_replace']}.exp_probs_b.bias"):
        gating = SIGMOID  # older files do not state it
    if gating == SIGMOID:
        config |= {"model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    else:
        limited = config["topk_group"] < config["n_group"]
        config["topk_method"] = "group_limited_greedy" if limited else "greedy"
    multiplier, scaling = metadata.value("rope.scaling.yarn_log_multiplier"), config.get("rope_scaling")
    if multiplier and scaling is not None:
        scaling |= {"mscale": 10 * multiplier, "mscale_all_dim": 10 * multiplier}


def granite(metadata: Metadata, config: Config) -> None:
    if metadata.value("rope.scaling.finetuned") is False:
        config["position_embedding_type"] = "nope"
    if config.get("shared_intermediate_size"):
        config["model_type"] = "granitemoeshared"


def ernie(metadata: Metadata, config: Config) -> None:
    config["moe_num_shared_experts"] = metadata.value("expert_shared_count") or 0
    config["moe_layer_interval"] = metadata.value("interleave_moe_layer_step") or 1
    config["moe_layer_start_index"] = metadata.value("leading_dense_block_count") or 0
    metadata.value("expert_shared_feed_forward_length")  # the tensors' shapes say it


def lfm2(metadata: Metadata, config: Config) -> None:
    heads = metadata.values("attention.head_count_kv") or ()
    config["layer_types"] = ["full_attention" if count else "conv" for count in heads]
    config["num_key_value_heads"] = max(heads, default=0)
    config["norm_eps"] = config.pop("rms_norm_eps", None)
    if config["model_type"] == "lfm2":
        config["block_auto_adjust_ff_dim"] = False
        return
    config["num_dense_layers"] = metadata.value("leading_dense_block_count") or 0
    config["use_expert_bias"] = any(metadata.has(f"blk.{i}.exp_probs_b.bias") for i in range(len(heads)))
    config.setdefault("norm_topk_prob", True)
    if metadata.value("expert_gating_func") not in (None, SIGMOID):
        config["scoring_func"] = "not sigmoid"


def qwen3_next(metadata: Metadata, config: Config) -> None:
    partial_rotation(metadata, config)
    further_layers(metadata, config)
    config["linear_num_value_heads"] = heads = metadata.value("ssm.time_step_rank")
    width = metadata.value("ssm.inner_size")
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        config["linear_value_head_dim"] = width // heads
    recurrent = metadata.values("attention.recurrent_layers")
    if recurrent is not None:
        kinds = ("full_attention", "linear_attention")
        config["layer_types"] = [kinds[bool(each)] for each in recurrent][: config["num_hidden_layers"]]


def phimoe(metadata: Metadata, config: Config) -> None:
    window = config.get("sliding_window")
    if window == 0 or window == config.get("max_position_embeddings"):
        config["sliding_window"] = None
    config["lm_head_bias"] = metadata.has("output.bias")


def qwen3_5_moe(metadata: Metadata, config: Config) -> None:
    qwen3_next(metadata, config)
    metadata.values("rope.dimension_sections")  # of images' positions; those of text are the same in all


_LLAMA4_CONTEXT = 8192  # of a chunk, and until queries grow
_LLAMA4_PLAIN = 128  # experts of the one model without norms of queries and keys


def llama4(metadata: Metadata, config: Config) -> None:
    """What llama.cpp states in code."""
    config |= {"attention_chunk_size": _LLAMA4_CONTEXT, "floor_scale": _LLAMA4_CONTEXT, "attn_scale": 0.1}
    config["use_qk_norm"] = config.get("num_local_experts") != _LLAMA4_PLAIN
    window = metadata.value("attention.sliding_window")
    if window not in (None, _LLAMA4_CONTEXT):
        config["sliding_window"] = window


def mistral3(metadata: Metadata, config: Config) -> None:
    growth, scaling = metadata.value("attention.temperature_scale"), config.get("rope_scaling")
    logarithm = metadata.value("rope.scaling.yarn_log_multiplier")
    if logarithm and scaling is not None:
        scaling |= {"mscale": logarithm, "mscale_all_dim": logarithm}
    if growth:
        config["model_type"] = "ministral3"
        config["rope_scaling"] = (scaling or {"rope_type": "default"}) | {"llama_4_scaling_beta": growth}


_STILL = 1e29  # what a frequency is divided by where nothing rotates


def gemma4(metadata: Metadata, config: Config) -> None:
    slides = [bool(each) for each in metadata.values("attention.sliding_window_pattern") or ()]
    config["layer_types"] = ["sliding_attention" if each else "full_attention" for each in slides]
    config["enable_moe_block"] = bool(config.get("num_experts"))
    config["attention_k_eq_v"] = any(
        not each and not metadata.has(f"blk.{layer}.attn_v.weight") for layer, each in enumerate(slides)
    )
    heads: Sequence[Any] = metadata.values("attention.head_count_kv") or ()
    if not heads:
        heads = [metadata.value("attention.head_count_kv")] * len(slides)
    full, sliding = (
        {count for count, each in zip(heads, slides, strict=False) if each is kind} for kind in (False, True)
    )
    if max(len(full), len(sliding)) > 1 or len(heads) != len(slides):
        config["head_count_kv"] = list(heads)  # which nobody reads
    config["num_key_value_heads"] = next(iter(sliding or full), None)
    config["num_global_key_value_heads"] = next(iter(full or sliding), None)

    config["global_head_dim"] = config.pop("head_dim", None)
    config["head_dim"] = metadata.value("attention.key_length_swa")
    for key, length in (
        ("attention.value_length", config["global_head_dim"]), ("attention.value_length_swa", config["head_dim"]),
        ("rope.dimension_count", config["global_head_dim"]), ("rope.dimension_count_swa", config["head_dim"]),
    ):  # fmt: skip
        if metadata.value(key) not in (None, length):
            config[key] = metadata.value(key)
    rotation = config.pop("rope_scaling", {"rope_type": "default"})
    factors = rotation.get("factors", ())
    rotating = sum(factor == 1.0 for factor in factors)
    if factors and all(factor > _STILL for factor in factors[rotating:]):
        rotation = {"rope_type": "proportional", "partial_rotary_factor": rotating / len(factors)}
    config["rope_parameters"] = {
        "full_attention": rotation | {"rope_theta": config.pop("rope_theta", 1e6)},
        "sliding_attention": {
            "rope_type": "default", "rope_theta": metadata.value("rope.freq_base_swa") or 1e4,
        },
    }  # fmt: skip
