"""What decoder families share; they differ in a handful of values, stated in their own files."""

import json
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..decoder import Decoder, DenseTensor, Expert, Kind, Source, SourceTensors
from ..rope import rope_from

_MAX_WIDTH = 1 << 20
_MAX_HEAD_DIM = 1 << 14
_MAX_VOCAB = 1 << 24
_MAX_LAYERS = 1024
_MAX_EXPERTS = 4096
_MAX_CONTEXT = 1 << 30

Recipe = dict[str, Any]


def num_layers(config: Config) -> int:
    return config.integer("num_hidden_layers", maximum=_MAX_LAYERS)


def attention(
    config: Config,
    *,
    qk_norm: str | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    clip_qkv: float | None = None,
    head_dim: int | None = None,
    rope_theta: float = 10000.0,
) -> Recipe:
    """The mixer, without its window. `head_dim` and `rope_theta` count where config.json is silent."""
    heads = config.integer("num_attention_heads", maximum=_MAX_WIDTH)
    kv_heads = config.integer("num_key_value_heads", heads, maximum=heads)
    if heads % kv_heads:
        config.fail("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads, {heads}")
    hidden = config.integer("hidden_size", maximum=_MAX_WIDTH)
    if head_dim is None and config.get("head_dim") is None and hidden % heads:
        config.fail(
            "num_attention_heads", f"{heads} does not divide hidden_size, {hidden}, and head_dim is absent"
        )
    size = config.integer("head_dim", head_dim or hidden // heads, maximum=_MAX_HEAD_DIM)
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
        "rope": rope_from(config, size, rope_theta),
    }


def sliding_window(config: Config) -> int:
    return config.integer("sliding_window", maximum=_MAX_CONTEXT)


def windows_by_type(config: Config, layers: int, default: list[bool]) -> list[int | None]:
    """One window a layer: from `layer_types`, or from `default` where config.json does not list them."""
    sliding = default
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            config.fail(
                "layer_types", f"{str(types)[:80]}; one entry for each of the {layers} layers is needed"
            )
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                config.fail(
                    "layer_types", f"{str(kind)[:80]!r}; full_attention and sliding_attention are allowed"
                )
        sliding = [kind == "sliding_attention" for kind in types]
    if not any(sliding):
        config.get("sliding_window")
        return [None] * layers
    if not config.flag("use_sliding_window", False):
        config.fail("layer_types", "holds sliding_attention, but use_sliding_window is false")
    return [sliding_window(config) if slides else None for slides in sliding]


def dense_ffn(config: Config) -> Recipe:
    return {
        "kind": "dense",
        "intermediate_size": config.integer("intermediate_size", maximum=_MAX_WIDTH),
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
    shared: Recipe | None = None,
) -> Recipe:
    """`experts`: their number, where config.json does not say it as num_experts or num_local_experts."""
    experts = experts or num_experts(config)
    return {
        "kind": "moe",
        "num_experts": experts,
        "num_experts_per_tok": config.integer("num_experts_per_tok", maximum=experts),
        "moe_intermediate_size": config.integer(width_key, maximum=_MAX_WIDTH),
        "activation": config.choice("hidden_act", "silu", ("silu",)),
        "router": router,
        "shared": shared,
    }


def num_experts(config: Config) -> int:
    both = [config.get("num_experts"), config.get("num_local_experts")]
    if None not in both and both[0] != both[1]:
        config.fail("num_local_experts", f"{str(both[1])[:80]}, but num_experts is {str(both[0])[:80]}")
    return config.integer("num_experts" if both[1] is None else "num_local_experts", maximum=_MAX_EXPERTS)


def sparse_layers(config: Config, layers: int, moe: Recipe) -> list[Recipe]:
    """MoE in every `decoder_sparse_step`-th layer except `mlp_only_layers`; a dense ffn in the others."""
    step = config.integer("decoder_sparse_step", 1, maximum=_MAX_LAYERS)
    only_dense = set(config.integers("mlp_only_layers", maximum=_MAX_LAYERS))
    sparse = [index not in only_dense and (index + 1) % step == 0 for index in range(layers)]
    config.get("intermediate_size")
    return [moe if is_sparse else dense_ffn(config) for is_sparse in sparse]


@dataclass(frozen=True)
class Names:
    """What a family calls the parts of a layer, where families differ."""

    moe: tuple[str, ...] = ("mlp",)  # any of these
    router: str = "gate"
    router_bias: str = "gate.bias"
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_expert"
    shared_router: str = "shared_expert_gate"


CORRECTED = Names(router_bias="gate.e_score_correction_bias", shared="shared_experts")


def assemble(
    config: Config,
    tensors: SourceTensors,
    mixer: Recipe,
    windows: list[int | None],
    ffns: list[Recipe],
    names: Names | None = None,
) -> Decoder:
    """The recipe and every tensor, layer by layer."""
    hidden = config.integer("hidden_size", maximum=_MAX_WIDTH)
    eps = config.number("rms_norm_eps", minimum=0.0, maximum=1.0)
    tied = config.flag("tie_word_embeddings", False)
    blocks: list[Recipe] = [
        {"norm_eps": eps, "residual_scale": 1.0, "mixer": {**mixer, "window": window}, "ffn": ffn}
        for window, ffn in zip(windows, ffns, strict=True)
    ]
    keys = [json.dumps([block["mixer"]["window"], block["ffn"]]) for block in blocks]  # all that differs
    unique = dict(zip(keys, blocks, strict=True))
    numbers = {key: number for number, key in enumerate(unique)}
    decoder = Decoder(
        {
            "version": 1,
            "architecture": config.get("model_type"),
            "hidden_size": hidden,
            "vocab_size": config.integer("vocab_size", maximum=_MAX_VOCAB),
            "context_length": config.integer("max_position_embeddings", maximum=_MAX_CONTEXT),
            "embedding": {"scale": 1.0},
            "output": {"tied": tied, "scale": 1.0},
            "final_norm_eps": eps,
            "blocks": list(unique.values()),
            "layers": [numbers[key] for key in keys],
        }
    )
    _Assembler(decoder, tensors, hidden, names or Names()).add_all(blocks)
    return decoder


class _Assembler:
    def __init__(self, decoder: Decoder, tensors: SourceTensors, hidden: int, names: Names) -> None:
        self.decoder = decoder
        self.tensors = tensors
        self.hidden = hidden
        self.names = names

    def add_all(self, blocks: list[Recipe]) -> None:
        self.ends()
        for index, block in enumerate(blocks):
            name, source = f"layers.{index}.", f"model.layers.{index}."
            self.add(name + "attention_norm", "exact", (self.hidden,), source + "input_layernorm.weight")
            self.attention(name + "attention.", source + "self_attn.", block["mixer"])
            self.add(name + "ffn_norm", "exact", (self.hidden,), source + "post_attention_layernorm.weight")
            if block["ffn"]["kind"] == "dense":
                self.ffn(name + "ffn.", source + "mlp.", block["ffn"]["intermediate_size"])
            else:
                self.moe(index, name, source, block["ffn"])

    def add(self, name: str, kind: Kind, shape: tuple[int, ...], source: str) -> None:
        self.decoder.dense.append(DenseTensor(name, kind, shape, self.tensors.whole(source, shape)))

    def ends(self) -> None:
        embedding, output = "model.embed_tokens.weight", "lm_head.weight"
        shape = (self.decoder.recipe["vocab_size"], self.hidden)
        if not self.decoder.recipe["output"]["tied"]:
            self.add("output", "output", shape, output)
        elif embedding not in self.tensors and output in self.tensors:
            embedding = output
        elif output in self.tensors:
            # transformers' versions disagree on which one counts, so they must agree with each other.
            self.decoder.same.append((self.tensors.find(embedding, shape), self.tensors.find(output, shape)))
        self.add("embedding", "embedding", shape, embedding)
        self.add("final_norm", "exact", (self.hidden,), "model.norm.weight")

    def attention(self, name: str, source: str, mixer: Recipe) -> None:
        queries = mixer["num_heads"] * mixer["head_dim"]
        keys = mixer["num_kv_heads"] * mixer["head_dim"]
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            self.add(name + part, "dense", (rows, self.hidden), f"{source}{part}_proj.weight")
            if mixer["qkv_bias"]:
                self.add(f"{name}{part}_bias", "exact", (rows,), f"{source}{part}_proj.bias")
        self.add(name + "o", "dense", (self.hidden, queries), source + "o_proj.weight")
        if mixer["output_bias"]:
            self.add(name + "o_bias", "exact", (self.hidden,), source + "o_proj.bias")
        if mixer["qk_norm"] is not None:
            per_head = mixer["qk_norm"] == "head"
            for part, rows in (("q", queries), ("k", keys)):
                width = mixer["head_dim"] if per_head else rows
                self.add(f"{name}{part}_norm", "exact", (width,), f"{source}{part}_norm.weight")

    def ffn(self, name: str, source: str, width: int) -> None:
        self.add(name + "gate", "dense", (width, self.hidden), source + "gate_proj.weight")
        self.add(name + "up", "dense", (width, self.hidden), source + "up_proj.weight")
        self.add(name + "down", "dense", (self.hidden, width), source + "down_proj.weight")

    def moe(self, layer: int, name: str, source: str, ffn: Recipe) -> None:
        names, experts = self.names, ffn["num_experts"]
        candidates = [f"{source}{module}." for module in names.moe]
        router = f"{names.router}.weight"
        source = next((prefix for prefix in candidates if prefix + router in self.tensors), candidates[0])
        self.add(name + "router", "exact", (experts, self.hidden), source + router)
        if "bias" in ffn["router"]:
            self.add(name + "router.bias", "exact", (experts,), source + names.router_bias)
        if ffn["shared"] is not None:
            self.ffn(name + "shared.", f"{source}{names.shared}.", ffn["shared"]["intermediate_size"])
            if ffn["shared"]["gate"] is not None:
                gate = f"{source}{names.shared_router}.weight"
                self.add(name + "shared.router", "exact", (1, self.hidden), gate)
        fused = source + "experts.gate_up_proj" in self.tensors
        experts = self.fused_experts if fused else self.separate_experts
        experts(layer, source + "experts.", ffn["num_experts"], ffn["moe_intermediate_size"])

    def separate_experts(self, layer: int, source: str, count: int, width: int) -> None:
        shapes = ((width, self.hidden), (width, self.hidden), (self.hidden, width))
        for index in range(count):
            gate, up, down = (
                self.tensors.whole(f"{source}{index}.{part}.weight", shape)
                for part, shape in zip(self.names.experts, shapes, strict=True)
            )
            self.decoder.experts.append(Expert(layer, index, gate, up, down))

    def fused_experts(self, layer: int, source: str, count: int, width: int) -> None:
        """One tensor [experts, gate rows then up rows, hidden] and one [experts, hidden, width]."""
        gate_up = self.tensors.find(source + "gate_up_proj", (count, 2 * width, self.hidden))
        down = self.tensors.find(source + "down_proj", (count, self.hidden, width))
        for index in range(count):
            first = 2 * width * index
            self.decoder.experts.append(
                Expert(
                    layer,
                    index,
                    Source(gate_up, first, width, self.hidden),
                    Source(gate_up, first + width, width, self.hidden),
                    Source(down, self.hidden * index, self.hidden, width),
                )
            )
