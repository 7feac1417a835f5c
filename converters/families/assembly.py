"""From blocks to a decoder: the recipe as a whole, and every tensor by its name in the checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config import Config
from ..decoder import Decoder, DenseTensor, Kind, Source, SourceTensors
from ..derived import Mapped, PickedRows
from ..tensor import Tensor
from .common import MAX_CONTEXT, MAX_VOCAB, MAX_WIDTH, Recipe
from .experts import ExpertLayout, Fused, experts_of
from .mixers import add_gated_delta, add_latent_attention, add_short_conv


@dataclass(frozen=True)
class Names:
    """What a family calls the parts of a layer, where families differ; of several names any one may be there."""

    model: str = "model."
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    final_norm: str = "norm"
    output_projection: str = "o_proj"
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    joined_delta: bool = False  # the gated delta rule's projections lie by turns in one tensor
    zero_centred: bool = False  # norms' weights are less by one than what they multiply with
    dense: str = "mlp"
    ffn_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    moe: tuple[str, ...] = ("mlp",)
    router: tuple[str, ...] = ("gate.weight",)  # in the moe module, as its bias and the experts are
    router_bias: tuple[str, ...] = ("gate.bias",)
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    fused: Fused = "rows"
    experts_module: str | None = None  # where the experts are, if not in the moe module
    shared: str = "mlp.shared_expert"
    shared_router: str = "mlp.shared_expert_gate.weight"


CORRECTED = Names(router_bias=("gate.e_score_correction_bias",), shared="mlp.shared_experts")


@dataclass(frozen=True)
class Frame:
    """What holds for the model as a whole, where families differ."""

    embedding_scale: float = 1.0
    output_scale: float = 1.0
    residual_scale: float = 1.0
    layer_norm: bool = False
    output_bias: bool = False
    eps_key: str = "rms_norm_eps"
    tied: bool = False  # where config.json is silent
    softcap: float = 0.0  # of the logits; 0: none
    post_norms: bool = False  # behind mixer and ffn, and a factor for every layer


def assemble(
    config: Config,
    tensors: SourceTensors,
    mixers: list[Recipe],
    ffns: list[Recipe],
    names: Names | None = None,
    frame: Frame | None = None,
) -> Decoder:
    """The recipe and every tensor, layer by layer."""
    frame = frame or Frame()
    hidden = config.integer("hidden_size", maximum=MAX_WIDTH)
    eps = config.number(frame.eps_key, minimum=0.0, maximum=1.0)
    tied = config.flag("tie_word_embeddings", frame.tied)
    norm: Recipe = {"norm": "layer"} if frame.layer_norm else {}
    if frame.post_norms:
        norm |= {"post_norms": True, "scaled": True}
    blocks: list[Recipe] = [
        {**norm, "norm_eps": eps, "residual_scale": frame.residual_scale, "mixer": mixer, "ffn": ffn}
        for mixer, ffn in zip(mixers, ffns, strict=True)
    ]
    unique: list[Recipe] = []
    for block in blocks:
        if block not in unique:
            unique.append(block)
    output: Recipe = {"tied": tied, "scale": frame.output_scale}
    if frame.softcap:
        output["softcap"] = frame.softcap
    decoder = Decoder(
        {
            "version": 1,
            "architecture": config.get("model_type"),
            "hidden_size": hidden,
            "vocab_size": config.integer("vocab_size", maximum=MAX_VOCAB),
            "context_length": config.integer("max_position_embeddings", maximum=MAX_CONTEXT),
            "embedding": {"scale": frame.embedding_scale},
            "output": output | ({"bias": True} if frame.output_bias else {}),
            **({"final_norm": "layer"} if frame.layer_norm else {}),
            "final_norm_eps": eps,
            "blocks": unique,
            "layers": [unique.index(block) for block in blocks],
        }
    )
    Assembler(decoder, tensors, hidden, names or Names()).add_all(blocks)
    return decoder


class Assembler:
    """Finds the tensors of a decoder, part by part."""

    def __init__(self, decoder: Decoder, tensors: SourceTensors, hidden: int, names: Names) -> None:
        self.decoder = decoder
        self.tensors = tensors
        self.hidden = hidden
        self.names = names

    def add_all(self, blocks: list[Recipe]) -> None:
        self.ends()
        for index, block in enumerate(blocks):
            name, source = f"layers.{index}.", f"{self.names.model}layers.{index}."
            layer_norm = block.get("norm") == "layer"
            self.norm(name + "attention_norm", self.hidden, source + self.names.attention_norm, layer_norm)
            MIXERS[block["mixer"]["kind"]](self, name, source, block["mixer"])
            self.norm(name + "ffn_norm", self.hidden, source + self.names.ffn_norm, layer_norm)
            if "post_norms" in block:
                self.norm(name + "attention_post_norm", self.hidden, source + "post_attention_layernorm")
                self.norm(name + "ffn_post_norm", self.hidden, source + "post_feedforward_layernorm")
                self.add(name + "scale", "exact", (1,), source + "layer_scalar")
            if block["ffn"]["kind"] == "dense":
                self.ffn(name + "ffn.", f"{source}{self.names.dense}.", block["ffn"]["intermediate_size"])
            else:
                self.moe(index, name, source, block["ffn"])

    def add(self, name: str, kind: Kind, shape: tuple[int, ...], source: str) -> None:
        self.decoder.dense.append(DenseTensor(name, kind, shape, self.tensors.whole(source, shape)))

    def norm(self, name: str, width: int, source: str, layer_norm: bool = False) -> None:
        weight = self.tensors.whole(source + ".weight", (width,))
        if self.names.zero_centred:
            weight = replace(weight, tensor=Mapped(weight.tensor, _plus_one))
        self.decoder.dense.append(DenseTensor(name, "exact", (width,), weight))
        if layer_norm:
            self.add(name + "_bias", "exact", (width,), source + ".bias")

    def present(self, prefix: str, names: tuple[str, ...]) -> str:
        """The name of these that the checkpoint has, the first one if it has none."""
        return next((prefix + name for name in names if prefix + name in self.tensors), prefix + names[0])

    def ends(self) -> None:
        embedding, output = self.names.model + "embed_tokens.weight", "lm_head.weight"
        shape = (self.decoder.recipe["vocab_size"], self.hidden)
        if not self.decoder.recipe["output"]["tied"]:
            self.add("output", "output", shape, output)
        elif embedding not in self.tensors and output in self.tensors:
            embedding = output
        elif output in self.tensors:
            # transformers' versions disagree on which one counts, so they must agree with each other.
            self.decoder.same.append((self.tensors.find(embedding, shape), self.tensors.find(output, shape)))
        self.add("embedding", "embedding", shape, embedding)
        if self.decoder.recipe["output"].get("bias"):
            self.add("output_bias", "exact", shape[:1], "lm_head.bias")
        self.norm(
            "final_norm",
            self.hidden,
            self.names.model + self.names.final_norm,
            self.decoder.recipe.get("final_norm") == "layer",
        )

    def attention(self, layer: str, source: str, mixer: Recipe) -> None:
        name, source = layer + "attention.", source + "self_attn."
        queries = mixer["num_heads"] * mixer["head_dim"]
        keys = mixer["num_kv_heads"] * mixer["head_dim"]
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            if part == "v" and "values_are_keys" in mixer:
                continue
            if part == "q" and "output_gate" in mixer:
                self.gated_queries(name, source, mixer)
                continue
            self.add(name + part, "dense", (rows, self.hidden), f"{source}{part}_proj.weight")
            if mixer["qkv_bias"]:
                self.add(f"{name}{part}_bias", "exact", (rows,), f"{source}{part}_proj.bias")
        self.add(
            name + "o", "dense", (self.hidden, queries), f"{source}{self.names.output_projection}.weight"
        )
        if mixer["output_bias"]:
            self.add(name + "o_bias", "exact", (self.hidden,), f"{source}{self.names.output_projection}.bias")
        if mixer.get("sinks"):
            self.add(name + "sinks", "exact", (mixer["num_heads"],), source + "sinks")
        if mixer["qk_norm"] in ("head", "row"):
            per_head = mixer["qk_norm"] == "head"
            for part, rows, norm in zip("qk", (queries, keys), self.names.qk_norms, strict=True):
                self.norm(f"{name}{part}_norm", mixer["head_dim"] if per_head else rows, source + norm)

    def gated_queries(self, name: str, source: str, mixer: Recipe) -> None:
        """Each head's gate follows its query in the checkpoint."""
        dim = mixer["head_dim"]
        stored = self.tensors.find(source + "q_proj.weight", (2 * mixer["num_heads"] * dim, self.hidden))
        for part, first in (("q", 0), ("gate", dim)):
            self.add_rows(name + part, "dense", PickedRows(stored, first, dim, 2 * dim))

    def add_rows(self, name: str, kind: Kind, tensor: Tensor) -> None:
        """All rows of `tensor`."""
        rows, cols = tensor.shape
        self.decoder.dense.append(DenseTensor(name, kind, (rows, cols), Source(tensor, 0, rows, cols)))

    def add_convolution(self, name: str, source: str, channels: int, kernel: int) -> None:
        stored = self.tensors.find(source, (channels, 1, kernel))
        source_rows = Source(stored, 0, channels, kernel)
        self.decoder.dense.append(DenseTensor(name, "exact", (channels, kernel), source_rows))

    def ffn(self, name: str, source: str, width: int) -> None:
        if source + "input_linear.weight" in self.tensors:
            both = self.tensors.find(source + "input_linear.weight", (2 * width, self.hidden))
            for part, first in (("gate", 0), ("up", width)):
                rows = Source(both, first, width, self.hidden)
                self.decoder.dense.append(DenseTensor(name + part, "dense", (width, self.hidden), rows))
            self.add(name + "down", "dense", (self.hidden, width), source + "output_linear.weight")
            return
        gate, up, down = self.names.ffn_parts
        self.add(name + "gate", "dense", (width, self.hidden), f"{source}{gate}.weight")
        self.add(name + "up", "dense", (width, self.hidden), f"{source}{up}.weight")
        self.add(name + "down", "dense", (self.hidden, width), f"{source}{down}.weight")

    def moe(self, layer: int, name: str, source: str, ffn: Recipe) -> None:
        names, experts = self.names, ffn["num_experts"]
        routers = [f"{module}.{router}" for module in names.moe for router in names.router]
        router = self.present(source, tuple(routers))
        module = source + names.moe[routers.index(router.removeprefix(source)) // len(names.router)] + "."
        self.add(name + "router", "exact", (experts, self.hidden), router)
        if "bias" in ffn["router"]:
            bias = self.present(module, names.router_bias)
            self.vector(name + "router.bias", experts, bias)
        if ffn["shared"] is not None:
            self.ffn(name + "shared.", f"{source}{names.shared}.", ffn["shared"]["intermediate_size"])
            if ffn["shared"]["gate"] is not None:
                self.add(name + "shared.router", "exact", (1, self.hidden), source + names.shared_router)
        if "expert_scale" in ffn["router"]:
            self.add(name + "router.expert_scale", "exact", (experts,), module + "per_expert_scale")
        if "branch_norms" in ffn:
            self.branch_norms(name, source)
        if names.experts_module is not None:
            module = source + names.experts_module
        layout = ExpertLayout(module, names.experts, names.fused, ffn.get("expert_bias", False))
        self.decoder.experts += experts_of(self.tensors, layout, layer, ffn, self.hidden)

    def branch_norms(self, name: str, source: str) -> None:
        """Of router, routed and shared experts. The router's has a root of the width to divide by as well."""
        root = self.hidden**-0.5
        scale = self.tensors.whole(source + "router.scale", (self.hidden,))
        scale = replace(scale, tensor=Mapped(scale.tensor, lambda value: value * root))
        self.decoder.dense.append(DenseTensor(name + "router_norm", "exact", (self.hidden,), scale))
        self.norm(name + "experts_norm", self.hidden, source + "pre_feedforward_layernorm_2")
        self.norm(name + "experts_post_norm", self.hidden, source + "post_feedforward_layernorm_2")
        self.norm(name + "shared.post_norm", self.hidden, source + "post_feedforward_layernorm_1")

    def vector(self, name: str, size: int, source: str) -> None:
        """Of a tensor [size] or [1, size]."""
        row = self.tensors.shape(source) == (1, size)
        whole = self.tensors.whole(source, (1, size) if row else (size,))
        self.decoder.dense.append(DenseTensor(name, "exact", (size,), whole))


def _plus_one(weight: float) -> float:
    return 1.0 + weight


# What finds the tensors of a kind of sequence mixing: of a layer's name and source, and the mixer's recipe.
MIXERS: dict[str, Callable[[Assembler, str, str, Recipe], None]] = {
    "attention": Assembler.attention,
    "latent_attention": add_latent_attention,
    "gated_delta": add_gated_delta,
    "short_conv": add_short_conv,
}
