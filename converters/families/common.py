"""The parts of a recipe that decoder families share; they differ in a handful of values, stated in their own files."""

from collections.abc import Collection, Sequence
from typing import Any

from ..config import Config
from ..decoder import Decoder, SourceTensors
from ..rope import rope_from

MAX_WIDTH = 1 << 20
MAX_HEAD_DIM = 1 << 14
MAX_VOCAB = 1 << 24
MAX_LAYERS = 1024
MAX_EXPERTS = 4096
MAX_CONTEXT = 1 << 30

Recipe = dict[str, Any]


def num_layers(config: Config) -> int:
    return config.integer("num_hidden_layers", maximum=MAX_LAYERS)


def attention(
    config: Config,
    *,
    qk_norm: str | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    clip_qkv: float | None = None,
    head_dim: int | None = None,
    rope_theta: float = 10000.0,
    rope_layout: str = "half",
    partial: float | None = None,
    rope_unused: tuple[str, ...] = (),
) -> Recipe:
    """The mixer, without its window. `head_dim` and `rope_theta` count where config.json is silent; `partial` and
    `rope_unused`: see rope_from()."""
    heads = config.integer("num_attention_heads", maximum=MAX_WIDTH)
    kv_heads = config.integer("num_key_value_heads", heads, maximum=heads)
    if heads % kv_heads:
        config.fail("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads, {heads}")
    hidden = config.integer("hidden_size", maximum=MAX_WIDTH)
    if head_dim is None and config.get("head_dim") is None and hidden % heads:
        config.fail(
            "num_attention_heads", f"{heads} does not divide hidden_size, {hidden}, and head_dim is absent"
        )
    size = config.integer("head_dim", head_dim or hidden // heads, maximum=MAX_HEAD_DIM)
    return {
        "kind": "attention",
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": size,
        "scale": size**-0.5,
        "qkv_bias": qkv_bias,
        "output_bias": output_bias,
        "qk_norm": qk_norm,
        "clip_qkv": clip_qkv,
        "window": None,
        "rope": rope_from(config, size, rope_theta, partial=partial, layout=rope_layout, unused=rope_unused),
    }


def text_config(config: Config, unused: Collection[str], *, tied: bool = False) -> Config:
    """The configuration of the text half of a model that reads images as well, for which `unused` keys are; its finish() is
    the caller's to call. `tied`: whether embeddings are tied where it is silent."""
    text = config.inner("text_config")
    if config.flag("tie_word_embeddings", tied) != text.flag("tie_word_embeddings", tied):
        config.fail("tie_word_embeddings", "differs from that of text_config")
    for key in ("vision_config", *unused):
        config.get(key)
    return text


def leave_out_images(decoder: Decoder, tensors: SourceTensors, prefixes: Collection[str]) -> None:
    left_out = sum(tensors.leave_out(prefix) for prefix in prefixes)
    if left_out:
        decoder.notes.append(f"{left_out} tensors for other than text are left out: this version reads text")


def windowed(mixer: Recipe, windows: Sequence[int | None]) -> list[Recipe]:
    """The mixer of every layer."""
    return [{**mixer, "window": window} for window in windows]


def sliding_window(config: Config) -> int:
    return config.integer("sliding_window", maximum=MAX_CONTEXT)


def windows_by_type(
    config: Config, layers: int, default: list[bool], switch: str | None = "use_sliding_window"
) -> list[int | None]:
    """One window a layer: from `layer_types`, or from `default` where config.json does not list them. `switch`: the flag
    that turns windows on, if there is one."""
    kinds = ("full_attention", "sliding_attention")
    types = layer_types(config, layers, [kinds[slides] for slides in default], kinds)
    sliding = [kind == "sliding_attention" for kind in types]
    if not any(sliding):
        config.get("sliding_window")
        return [None] * layers
    if switch is not None and not config.flag(switch, False):
        config.fail("layer_types", f"holds sliding_attention, but {switch} is false")
    return [sliding_window(config) if slides else None for slides in sliding]


def layer_types(config: Config, layers: int, default: list[str], allowed: tuple[str, str]) -> list[str]:
    """`layer_types`, or `default` where config.json does not list them."""
    types = config.get("layer_types", default)
    if not isinstance(types, list) or len(types) != layers:
        config.fail("layer_types", f"{str(types)[:80]}; one entry for each of the {layers} layers is needed")
    for kind in types:
        if kind not in allowed:
            config.fail("layer_types", f"{str(kind)[:80]!r}; {' and '.join(allowed)} are allowed")
    return types


def dense_ffn(config: Config, width_key: str = "intermediate_size") -> Recipe:
    return {
        "kind": "dense",
        "intermediate_size": config.integer(width_key, maximum=MAX_WIDTH),
        "activation": config.choice("hidden_act", "silu", ("silu",)),
    }


def softmax_router(*, normalize: bool, **more: Any) -> Recipe:
    return {"scoring": "softmax", "normalize": normalize, "scale": 1.0, **more}


def corrected_router(config: Config, experts: int) -> Recipe:
    """DeepSeek-V3's: sigmoid scores, experts chosen with a correction bias and inside the best groups."""
    router: Recipe = {
        "scoring": "sigmoid",
        "normalize": config.flag("norm_topk_prob", True),
        "norm_epsilon": 1e-20,
        "scale": config.number("routed_scaling_factor", 1.0, minimum=0.0),
        "bias": "selection",
    }
    count = config.integer("n_group", 1, maximum=experts)
    keep = config.integer("topk_group", 1, maximum=count)
    if experts % count:
        config.fail("n_group", f"{count} does not divide the number of experts, {experts}")
    if keep < count:
        router["groups"] = {"count": count, "keep": keep, "score": "sum_of_top_2"}
    return router


def moe_ffn(
    config: Config,
    *,
    width_key: str,
    router: Recipe,
    experts: int | None = None,
    top_key: str = "num_experts_per_tok",
    shared: Recipe | None = None,
) -> Recipe:
    """`experts`: their number, where config.json does not say it as num_experts or num_local_experts."""
    experts = experts or num_experts(config)
    return {
        "kind": "moe",
        "num_experts": experts,
        "num_experts_per_tok": config.integer(top_key, maximum=experts),
        "moe_intermediate_size": config.integer(width_key, maximum=MAX_WIDTH),
        "activation": config.choice("hidden_act", "silu", ("silu",)),
        "router": router,
        "shared": shared,
    }


def shared_experts(config: Config, count_key: str, width_key: str) -> Recipe | None:
    """So many shared experts side by side, which are one that is as wide as all; None where there are none."""
    count = config.integer(count_key, 0, minimum=0, maximum=MAX_EXPERTS)
    width = config.integer(width_key, maximum=MAX_WIDTH)
    return {"intermediate_size": count * width, "gate": None} if count else None


def note_prediction(decoder: Decoder, left_out: int) -> None:
    if left_out:
        decoder.notes.append(f"{left_out} tensors for multi-token prediction are left out")


def num_experts(config: Config) -> int:
    both = [config.get("num_experts"), config.get("num_local_experts")]
    if None not in both and both[0] != both[1]:
        config.fail("num_local_experts", f"{str(both[1])[:80]}, but num_experts is {str(both[0])[:80]}")
    return config.integer("num_experts" if both[1] is None else "num_local_experts", maximum=MAX_EXPERTS)


def sparse_layers(config: Config, layers: int, moe: Recipe) -> list[Recipe]:
    """MoE in every `decoder_sparse_step`-th layer except `mlp_only_layers`; a dense ffn in the others."""
    step = config.integer("decoder_sparse_step", 1, maximum=MAX_LAYERS)
    only_dense = set(config.integers("mlp_only_layers", maximum=MAX_LAYERS))
    sparse = [index not in only_dense and (index + 1) % step == 0 for index in range(layers)]
    config.get("intermediate_size")
    return [moe if is_sparse else dense_ffn(config) for is_sparse in sparse]
