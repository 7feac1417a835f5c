"""From blocks to a decoder: the recipe as a whole, and every tensor by its name in the checkpoint."""

import json
from dataclasses import dataclass

from ..config import Config
from ..decoder import Decoder, DenseTensor, Kind, SourceTensors
from .common import MAX_CONTEXT, MAX_VOCAB, MAX_WIDTH, Recipe
from .experts import ExpertLayout, Fused, experts_of


@dataclass(frozen=True)
class Names:
    """What a family calls the parts of a layer, where families differ."""

    moe: tuple[str, ...] = ("mlp",)  # any of these
    router: str = "gate"
    router_bias: str = "gate.bias"
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_module: str = "experts."
    fused: Fused = "rows"
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
    hidden = config.integer("hidden_size", maximum=MAX_WIDTH)
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
            "vocab_size": config.integer("vocab_size", maximum=MAX_VOCAB),
            "context_length": config.integer("max_position_embeddings", maximum=MAX_CONTEXT),
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
        if mixer.get("sinks"):
            self.add(name + "sinks", "exact", (mixer["num_heads"],), source + "sinks")
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
        layout = ExpertLayout(
            source + names.expert_module, names.experts, names.fused, ffn.get("expert_bias", False)
        )
        self.decoder.experts += experts_of(self.tensors, layout, layer, ffn, self.hidden)
