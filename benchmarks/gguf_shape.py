"""A GGUF of random weights in the shape of a model, for llama.cpp and for conversions to be measured with.

    python gguf_shape.py '{"model_type": "olmoe", "hidden_size": 2048, …}' OUT.gguf [Q4_0|Q4_K|MXFP4]

Every matrix is of the type given; with MXFP4 only experts are, as in published files, and the others Q8_0.

Runs in the interpreter that has llama.cpp: needs the packages `gguf` and `numpy`, and nothing of edgert. The
configuration is the model's config.json, as in edgert.shapes. Statistics are those of edgert's own shape bundles: a mean
of zero (a random sign a block), embeddings of unit scale, attention and experts that add what is small beside them.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ARCHITECTURES = {"olmoe": "olmoe", "qwen3_moe": "qwen3moe", "mixtral": "llama", "gpt_oss": "gpt-oss"}
_NORMS_OF_QUERIES = {
    "olmoe": "all heads",
    "qwen3_moe": "one head",
    "mixtral": None,
    "gpt_oss": None,
}  # and of keys: what one is of
# Standard deviation of a matrix's products, given inputs of unit scale.
_PRODUCT_DEVIATION = {"attn_output": 0.1, "ffn_down_exps": 0.25}
SLAB_BYTES = 32 << 20  # of a matrix, written at a time

Matrix = tuple[str, tuple[int, ...]]
Blocks = np.ndarray[Any, Any]  # u8 [blocks, bytes of one], random at first


@dataclass(frozen=True)
class BlockType:
    """A quantised type of ggml. `scale` sets the scales of random blocks so that their values have a standard deviation
    that is given, and a mean near zero."""

    elements: int
    bytes: int
    scale: Callable[[Blocks, float], None]


def _half(blocks: Blocks, at: int, value: float, *, signs: bool = False) -> None:
    """Scale `value` at byte `at`, with the sign that stands there by chance if `signs`."""
    bits = int(np.float16(value).view(np.uint16))
    blocks[:, at] = bits & 0xFF
    blocks[:, at + 1] = (blocks[:, at + 1] & 0x80 if signs else 0) | (bits >> 8)


def _scale_q4_0(blocks: Blocks, deviation: float) -> None:
    # Codes have a mean of -1/2: each block's scale keeps a random sign, so that the weights' mean is zero.
    _half(blocks, 0, deviation / (sum(code * code for code in range(-8, 8)) / 16) ** 0.5, signs=True)


def _scale_q8_0(blocks: Blocks, deviation: float) -> None:
    _half(blocks, 0, deviation / 73.9, signs=True)


def _scale_q4_k(blocks: Blocks, deviation: float) -> None:
    # scale * code - minimum, for scales and minima of 0 to 63 by chance: 258 is the deviation of s * c - 7.5 * m.
    _half(blocks, 0, deviation / 258)
    _half(blocks, 2, 7.5 * deviation / 258)


def _scale_mxfp4(blocks: Blocks, deviation: float) -> None:
    blocks[:, 0] = 127 + round(math.log2(deviation / 2.93))


TYPES = {
    "Q4_0": BlockType(32, 18, _scale_q4_0),
    "Q8_0": BlockType(32, 34, _scale_q8_0),
    "Q4_K": BlockType(256, 144, _scale_q4_k),
    "MXFP4": BlockType(32, 17, _scale_mxfp4),
}


def type_of(name: str, chosen: str) -> str:
    return "Q8_0" if chosen == "MXFP4" and "_exps" not in name else chosen


def head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))


def expert_width(config: Mapping[str, Any]) -> int:
    return int(config.get("moe_intermediate_size") or config["intermediate_size"])


def expert_count(config: Mapping[str, Any]) -> int:
    return int(config.get("num_experts") or config["num_local_experts"])


def matrices(config: Mapping[str, Any]) -> Iterator[Matrix]:
    """Name and shape (rows before columns) of each tensor; names with one dimension or `gate_inp` are f32."""
    hidden, experts = config["hidden_size"], expert_count(config)
    width = expert_width(config)
    queries = config["num_attention_heads"] * head_dim(config)
    keys = config["num_key_value_heads"] * head_dim(config)
    norms = {
        "all heads": (("attn_q_norm", (queries,)), ("attn_k_norm", (keys,))),
        "one head": (("attn_q_norm", (head_dim(config),)), ("attn_k_norm", (head_dim(config),))),
        None: (),
    }[_NORMS_OF_QUERIES[config["model_type"]]]
    yield "token_embd.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        biased = config["model_type"] == "gpt_oss"
        for name, shape in (
            ("attn_norm", (hidden,)),
            ("attn_q", (queries, hidden)),
            ("attn_k", (keys, hidden)),
            ("attn_v", (keys, hidden)),
            *norms,
            ("attn_output", (hidden, queries)),
            *((("attn_sinks", (config["num_attention_heads"],)),) if biased else ()),
            ("post_attention_norm" if biased else "ffn_norm", (hidden,)),
            ("ffn_gate_inp", (experts, hidden)),
            ("ffn_gate_exps", (experts, width, hidden)),
            ("ffn_up_exps", (experts, width, hidden)),
            ("ffn_down_exps", (experts, hidden, width)),
        ):
            yield f"blk.{layer}.{name}.weight", shape
            if biased and not name.endswith(("norm", "sinks")):
                yield f"blk.{layer}.{name}.bias", shape[:-1]
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (config["vocab_size"], hidden)


def is_f32(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 1 or "gate_inp" in name or name.endswith("bias")


def deviation(name: str, columns: int) -> float:
    """Standard deviation of a matrix's weights."""
    if name.startswith("token_embd"):
        return 1.0
    return float(_PRODUCT_DEVIATION.get(name.split(".")[-2], 1.0) / columns**0.5)


def random_blocks(
    rows: int, columns: int, kind: BlockType, scale: float, draw: np.random.Generator
) -> Blocks:
    """Packed rows whose values have the standard deviation `scale` and a mean of zero."""
    blocks = rows * columns // kind.elements
    words = draw.bytes(-(-blocks * kind.bytes // 8) * 8)
    packed = np.frombuffer(words, np.uint8)[: blocks * kind.bytes].reshape(blocks, kind.bytes).copy()
    kind.scale(packed, scale)
    return packed


def write(config: Mapping[str, Any], path: Path, chosen: str = "Q4_0") -> None:
    """Write the file whole or not at all."""
    import gguf

    partial = path.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, ARCHITECTURES[config["model_type"]])
    _add_metadata(writer, config)
    for name, shape in matrices(config):
        if is_f32(name, shape):
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        else:
            type_name = type_of(name, chosen)
            kind = TYPES[type_name]
            stored = (*shape[:-1], shape[-1] // kind.elements * kind.bytes)
            writer.add_tensor_info(
                name, stored, np.dtype(np.uint8), int(np.prod(stored)), gguf.GGMLQuantizationType[type_name]
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    draw = np.random.Generator(np.random.SFC64(1))
    with partial.open("ab") as file:
        for name, shape in matrices(config):
            _pad(file, writer.data_alignment)
            for slab in slabs(name, shape, TYPES[type_of(name, chosen)], draw):
                file.write(slab)
        _pad(file, writer.data_alignment)
        file.flush()
        os.fsync(file.fileno())  # only clean pages can be dropped
    partial.rename(path)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def slabs(name: str, shape: tuple[int, ...], kind: BlockType, draw: np.random.Generator) -> Iterator[Any]:
    """The bytes of a tensor."""
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    if len(shape) == 1:
        yield np.full(shape, 0.0 if name.endswith(("bias", "sinks.weight")) else 1.0, np.float32)
    elif is_f32(name, shape):
        yield draw.standard_normal(shape, np.float32) * np.float32(deviation(name, columns))
    else:
        height = max(1, SLAB_BYTES // (columns // kind.elements * kind.bytes))
        for first in range(0, rows, height):
            yield random_blocks(min(height, rows - first), columns, kind, deviation(name, columns), draw)


def _add_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    import gguf

    width = expert_width(config)
    writer.add_name("random weights")
    writer.add_quantization_version(2)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(width)
    if config["model_type"] in ("qwen3_moe", "gpt_oss"):
        writer.add_expert_feed_forward_length(width)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_expert_count(expert_count(config))
    if config["model_type"] == "gpt_oss":
        scaling = config["rope_scaling"]
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")  # the tokens measured are numbers


if __name__ == "__main__":
    write(json.loads(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
