"""Kinds of sequence mixing beside plain attention: their recipes, and where a checkpoint has their tensors."""

import math
from typing import TYPE_CHECKING

from ..config import Config
from ..decoder import DenseTensor, Kind, Source
from ..derived import Mapped, PickedRows, TransposedHeads
from ..rope import query_scale, rope_from
from .common import MAX_HEAD_DIM, MAX_WIDTH, Recipe

if TYPE_CHECKING:
    from .assembly import Assembler

_LATENT_NORM_EPS = 1e-6  # whatever rms_norm_eps says
_MAX_KERNEL = 8


# --- latent attention ---------------------------------------------------------------------------------


def latent_attention(config: Config, *, q_rank: int | None, interleaved: bool) -> Recipe:
    """`q_rank` counts where config.json is silent; an explicit null there means none."""
    heads = config.integer("num_attention_heads", maximum=MAX_WIDTH)
    if config.integer("num_key_value_heads", heads, maximum=heads) != heads:
        config.fail("num_key_value_heads", f"latent attention has as many as num_attention_heads, {heads}")
    nope = config.integer("qk_nope_head_dim", maximum=MAX_HEAD_DIM)
    rotated = config.integer("qk_rope_head_dim", maximum=MAX_HEAD_DIM)
    for key, size in (("head_dim", rotated), ("qk_head_dim", nope + rotated)):
        if config.integer(key, size, maximum=MAX_HEAD_DIM) != size:
            config.fail(key, f"{config.get(key)}; {size} follows from qk_nope_head_dim and qk_rope_head_dim")
    if config.stated("q_lora_rank"):
        q_rank = (
            None if config.get("q_lora_rank") is None else config.integer("q_lora_rank", maximum=MAX_WIDTH)
        )
    bias = config.flag("attention_bias", False)
    rope = rope_from(config, rotated)
    rope["layout"] = "interleaved" if interleaved else "half"
    return {
        "kind": "latent_attention",
        "num_heads": heads,
        "q_rank": q_rank,
        "kv_rank": config.integer("kv_lora_rank", maximum=MAX_WIDTH),
        "nope_head_dim": nope,
        "rope_head_dim": rotated,
        "value_head_dim": config.integer("v_head_dim", maximum=MAX_HEAD_DIM),
        "scale": (nope + rotated) ** -0.5 * query_scale(config),
        "norm_eps": _LATENT_NORM_EPS,
        "rope": rope,
        **({"qkv_bias": True, "output_bias": True} if bias else {}),
    }


def add_latent_attention(assembler: "Assembler", layer: str, source: str, mixer: Recipe) -> None:
    name, source, hidden = layer + "attention.", source + "self_attn.", assembler.hidden
    heads, rank, values = mixer["num_heads"], mixer["kv_rank"], mixer["value_head_dim"]
    nope, rotated, q_rank = mixer["nope_head_dim"], mixer["rope_head_dim"], mixer["q_rank"]
    biased = mixer.get("qkv_bias", False)
    if q_rank is None:
        assembler.add(name + "q", "dense", (heads * (nope + rotated), hidden), source + "q_proj.weight")
    else:
        assembler.add(name + "q_a", "dense", (q_rank, hidden), source + "q_a_proj.weight")
        assembler.norm(name + "q_a_norm", q_rank, source + "q_a_layernorm")
        if biased:
            assembler.add(name + "q_a_bias", "exact", (q_rank,), source + "q_a_proj.bias")
        assembler.add(name + "q_b", "dense", (heads * (nope + rotated), q_rank), source + "q_b_proj.weight")
    assembler.add(name + "kv_a", "dense", (rank + rotated, hidden), source + "kv_a_proj_with_mqa.weight")
    assembler.norm(name + "kv_a_norm", rank, source + "kv_a_layernorm")
    if biased:
        assembler.add(name + "kv_a_bias", "exact", (rank + rotated,), source + "kv_a_proj_with_mqa.bias")
    if (
        source + "kv_b_proj.weight" not in assembler.tensors
        and source + "k_b_proj.weight" in assembler.tensors
    ):  # GGUF files have the two apart, the first transposed
        for part, shape in (("k_b", (heads, rank, nope)), ("v_b", (heads, values, rank))):
            stored = assembler.tensors.find(f"{source}{part}_proj.weight", shape)
            rows = Source(stored, 0, shape[0] * shape[1], shape[2])
            assembler.decoder.dense.append(DenseTensor(name + part, "dense", (rows.rows, rows.cols), rows))
    else:
        stored = assembler.tensors.find(source + "kv_b_proj.weight", (heads * (nope + values), rank))
        assembler.add_rows(name + "k_b", "dense", TransposedHeads(stored, nope, nope + values))
        assembler.add_rows(name + "v_b", "dense", PickedRows(stored, nope, values, nope + values))
    assembler.add(name + "o", "dense", (hidden, heads * values), source + "o_proj.weight")
    if mixer.get("output_bias", False):
        assembler.add(name + "o_bias", "exact", (hidden,), source + "o_proj.bias")


# --- gated delta rule ---------------------------------------------------------------------------------


def gated_delta(config: Config) -> Recipe:
    key_heads = config.integer("linear_num_key_heads", maximum=MAX_WIDTH)
    value_heads = config.integer("linear_num_value_heads", maximum=MAX_WIDTH)
    if value_heads % key_heads:
        config.fail("linear_num_value_heads", f"{value_heads}; a multiple of {key_heads} is needed")
    config.choice("hidden_act", "silu", ("silu",))
    return {
        "kind": "gated_delta",
        "num_key_heads": key_heads,
        "num_value_heads": value_heads,
        "key_head_dim": config.integer("linear_key_head_dim", maximum=MAX_HEAD_DIM),
        "value_head_dim": config.integer("linear_value_head_dim", maximum=MAX_HEAD_DIM),
        "conv_kernel": config.integer("linear_conv_kernel_dim", minimum=2, maximum=_MAX_KERNEL),
        "norm_eps": config.number("rms_norm_eps", minimum=0.0, maximum=1.0),
        **(
            {"tiled": True} if config.flag("linear_value_heads_tiled", False) else {}
        ),  # as GGUF files may have them
    }


def add_gated_delta(assembler: "Assembler", layer: str, source: str, mixer: Recipe) -> None:
    name, source, hidden = layer + "delta.", source + "linear_attn.", assembler.hidden
    heads, key_dim, value_dim = mixer["num_value_heads"], mixer["key_head_dim"], mixer["value_head_dim"]
    keys, values = mixer["num_key_heads"] * key_dim, heads * value_dim
    apart = source + "in_proj_qkvz.weight" not in assembler.tensors  # in the newer GGUF files
    if assembler.names.joined_delta and not (apart and source + "in_proj_qkv.weight" in assembler.tensors):
        _add_joined(assembler, name, source, mixer, "qkvz")
    else:
        stored = assembler.tensors.find(source + "in_proj_qkv.weight", (2 * keys + values, hidden))
        for part, first, rows in (("q", 0, keys), ("k", keys, keys), ("v", 2 * keys, values)):
            part_source = Source(stored, first, rows, hidden)
            assembler.decoder.dense.append(DenseTensor(name + part, "dense", (rows, hidden), part_source))
        assembler.add(name + "z", "dense", (values, hidden), source + "in_proj_z.weight")
    if assembler.names.joined_delta:
        _add_joined(assembler, name, source, mixer, "ba")
    else:
        for part in ("b", "a"):
            assembler.add(name + part, "exact", (heads, hidden), f"{source}in_proj_{part}.weight")
    assembler.add_convolution(
        name + "conv", source + "conv1d.weight", 2 * keys + values, mixer["conv_kernel"]
    )
    assembler.add(name + "dt_bias", "exact", (heads,), source + "dt_bias")
    if (
        source + "A_log" not in assembler.tensors and source + "decay" in assembler.tensors
    ):  # as GGUF files have it
        assembler.add(name + "decay", "exact", (heads,), source + "decay")
    else:
        decay = assembler.tensors.whole(source + "A_log", (heads,))
        decay = Source(Mapped(decay.tensor, lambda value: -math.exp(value)), 0, 1, heads)
        assembler.decoder.dense.append(DenseTensor(name + "decay", "exact", (heads,), decay))
    assembler.add(name + "norm", "exact", (value_dim,), source + "norm.weight")  # never zero-centred
    assembler.add(name + "o", "dense", (hidden, values), source + "out_proj.weight")


def _add_joined(assembler: "Assembler", name: str, source: str, mixer: Recipe, parts: str) -> None:
    """Of each key head, one after the other: q, k, v and z; or b and a."""
    key_heads, key_dim, hidden = mixer["num_key_heads"], mixer["key_head_dim"], assembler.hidden
    sharing = mixer["num_value_heads"] // key_heads
    value_dim = sharing * mixer["value_head_dim"]
    rows_of = {"q": key_dim, "k": key_dim, "v": value_dim, "z": value_dim, "b": sharing, "a": sharing}
    period = sum(rows_of[part] for part in parts)
    stored = assembler.tensors.find(f"{source}in_proj_{parts}.weight", (key_heads * period, hidden))
    kind: Kind = "exact" if parts == "ba" else "dense"
    first = 0
    for part in parts:
        assembler.add_rows(name + part, kind, PickedRows(stored, first, rows_of[part], period))
        first += rows_of[part]


# --- short convolution --------------------------------------------------------------------------------


def short_conv(config: Config) -> Recipe:
    kernel = config.integer("conv_L_cache", 3, minimum=2, maximum=_MAX_KERNEL)
    biased = {"bias": True} if config.flag("conv_bias", False) else {}
    return {"kind": "short_conv", "conv_kernel": kernel, **biased}


def add_short_conv(assembler: "Assembler", layer: str, source: str, mixer: Recipe) -> None:
    name, source, hidden = layer + "conv.", source + "conv.", assembler.hidden
    assembler.add(name + "in", "dense", (3 * hidden, hidden), source + "in_proj.weight")
    assembler.add_convolution(name + "conv", source + "conv.weight", hidden, mixer["conv_kernel"])
    assembler.add(name + "o", "dense", (hidden, hidden), source + "out_proj.weight")
    if "bias" in mixer:
        assembler.add(name + "in_bias", "exact", (3 * hidden,), source + "in_proj.bias")
        assembler.add(name + "bias", "exact", (hidden,), source + "conv.bias")
        assembler.add(name + "o_bias", "exact", (hidden,), source + "out_proj.bias")
