"""A checkpoint of random weights in the shape of a model, as publishers save it, for conversions to be measured with.

    python benchmarks/safetensors_shape.py gpt-oss-20b|qwen3-30b-a3b|… DIRECTORY mxfp4|gptq|bf16

mxfp4: experts as gpt-oss has them, gate and up in one tensor, blocks and scales apart; the others bf16. gptq: every
matrix but router, embeddings and head in 4 bits, groups of 128, with g_idx. The shapes are edgert.shapes', tensors and
statistics those of gguf_shape.py beside this file; shards and their index are as the hub has them.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf_shape
import numpy as np

from edgert.converters.gguf_architectures import architecture
from edgert.converters.gguf_names import Architecture
from edgert.shapes import SHAPES

_SHARD_BYTES = 5 << 30
_GPTQ_GROUP = 128
_MXFP4_GROUP = 32
_WIDTHS = {"BF16": 2, "F16": 2, "I32": 4, "U8": 1}
_QUANTIZATION: dict[str, dict[str, Any] | None] = {
    "mxfp4": {"quant_method": "mxfp4"},
    "gptq": {
        "quant_method": "gptq", "bits": 4, "group_size": _GPTQ_GROUP, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq",
    },
    "bf16": None,
}  # fmt: skip

Bytes = np.ndarray[Any, Any]  # u8
Draw = np.random.Generator


@dataclass(frozen=True)
class Part:
    """A tensor of the file. `fill` turns random bytes, which it may keep and change, into `count` bytes of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: Callable[[Bytes], Bytes]

    @property
    def bytes(self) -> int:
        return _WIDTHS[self.dtype] * math.prod(self.shape)


def _random(drawn: Bytes) -> Bytes:
    return drawn


def _constant(value: int, dtype: str) -> Callable[[Bytes], Bytes]:
    return lambda drawn: np.full(drawn.size // np.dtype(dtype).itemsize, value, dtype).view(np.uint8)


def _bf16(deviation: float) -> Callable[[Bytes], Bytes]:
    """Of a random sign and fraction under one exponent, which is a deviation of 1.53 units."""
    exponent = 127 + round(math.log2(deviation / 1.53))

    def fill(drawn: Bytes) -> Bytes:
        words = drawn.view("<u2")
        words &= 0x807F
        words |= exponent << 7
        return drawn

    return fill


def _signed_f16(value: float) -> Callable[[Bytes], Bytes]:
    bits = int(np.float16(value).view(np.uint16))

    def fill(drawn: Bytes) -> Bytes:
        words = drawn.view("<u2")
        words &= 0x8000
        words |= bits
        return drawn

    return fill


def _groups(inputs: int) -> Callable[[Bytes], Bytes]:
    return lambda drawn: (np.arange(inputs, dtype="<i4") // _GPTQ_GROUP).view(np.uint8)


_ONE = _constant(0x3F80, "<u2")  # bf16
_ZERO = _constant(0, "<u2")


def parts(config: Mapping[str, Any], scheme: str) -> Iterator[Part]:
    """Every tensor, in the order of the files."""
    own = architecture(gguf_shape.ARCHITECTURES[config["model_type"]], routed=True)
    assert own is not None
    for ggml_name, shape in gguf_shape.matrices(config):
        name = own.hugging_face_name(ggml_name)
        assert name is not None
        if "_exps." in ggml_name:
            yield from _experts(own, ggml_name, shape, config["model_type"], scheme)
        elif len(shape) == 1 or ggml_name.endswith("bias"):
            yield Part(name, "BF16", shape, _ZERO if name.endswith(("bias", "sinks")) else _ONE)
        else:
            plain = "attn" not in ggml_name or scheme != "gptq"
            kept = _dense if plain else _gptq
            yield from kept(name, shape, gguf_shape.deviation(ggml_name, shape[-1]))


def _experts(
    own: Architecture, ggml_name: str, shape: tuple[int, ...], model_type: str, scheme: str
) -> Iterator[Part]:
    name = own.hugging_face_name(ggml_name) or ""
    scale = gguf_shape.deviation(ggml_name, shape[-1])
    if model_type == "gpt_oss":
        if "up_exps" in ggml_name:
            return  # lies with the gate
        if "gate_exps" in ggml_name:
            name, shape = name.replace("gate_proj", "gate_up_proj"), (shape[0], 2 * shape[1], *shape[2:])
        if name.endswith("_bias"):
            yield Part(name, "BF16", shape, _ZERO)
        elif scheme == "mxfp4":
            yield from _mxfp4(name, shape, scale)
        else:
            yield from _dense(name, (shape[0], shape[2], shape[1]), scale)
        return
    kept = _gptq if scheme == "gptq" else _dense
    prefix, _, part = name.rpartition(".")
    for expert in range(shape[0]):
        yield from kept(f"{prefix}.{expert}.{part}.weight", shape[1:], scale)


def _dense(name: str, shape: tuple[int, ...], deviation: float) -> Iterator[Part]:
    yield Part(name, "BF16", shape, _bf16(deviation))


def _mxfp4(name: str, shape: tuple[int, ...], deviation: float) -> Iterator[Part]:
    *rows, cols = shape
    groups = cols // _MXFP4_GROUP
    exponent = 127 + round(math.log2(deviation / 2.93))
    yield Part(f"{name}_blocks", "U8", (*rows, groups, _MXFP4_GROUP // 2), _random)
    yield Part(f"{name}_scales", "U8", (*rows, groups), _constant(exponent, "u1"))


def _gptq(name: str, shape: tuple[int, ...], deviation: float) -> Iterator[Part]:
    outputs, inputs = shape
    stem, groups = name.removesuffix("weight"), inputs // _GPTQ_GROUP
    # Codes are 8 above what they stand for, of which every group's scale keeps a random sign.
    yield Part(f"{stem}qweight", "I32", (inputs // 8, outputs), _random)
    yield Part(f"{stem}qzeros", "I32", (groups, outputs // 8), _constant(0x77777777, "<u4"))
    yield Part(f"{stem}scales", "F16", (groups, outputs), _signed_f16(deviation / 4.64))
    yield Part(f"{stem}g_idx", "I32", (inputs,), _groups(inputs))


def shards(found: Iterator[Part], limit: int) -> list[list[Part]]:
    divided: list[list[Part]] = [[]]
    room = limit
    for part in found:
        if part.bytes > room and divided[-1]:
            divided.append([])
            room = limit
        divided[-1].append(part)
        room -= part.bytes
    return divided


def write(
    config: Mapping[str, Any], directory: Path, scheme: str, *, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write the checkpoint into a new directory, whole or not at all. Equal arguments give equal bytes."""
    partial = directory.with_name(directory.name + ".part")
    partial.mkdir(parents=True)
    draw = np.random.Generator(np.random.SFC64(1))
    divided = shards(parts(config, scheme), shard_bytes)
    index: dict[str, str] = {}
    for number, shard in enumerate(divided, 1):
        name = f"model-{number:05}-of-{len(divided):05}.safetensors"
        _write_shard(partial / name, shard, draw)
        index |= {part.name: name for part in shard}
    total = sum(part.bytes for shard in divided for part in shard)
    (partial / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    quantization = _QUANTIZATION[scheme]
    stated = {} if quantization is None else {"quantization_config": quantization}
    (partial / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", **stated}, indent=2))
    partial.rename(directory)


def _write_shard(path: Path, shard: list[Part], draw: Draw) -> None:
    header, offset = {}, 0
    for part in shard:
        header[part.name] = {
            "dtype": part.dtype, "shape": part.shape, "data_offsets": (offset, offset + part.bytes),
        }  # fmt: skip
        offset += part.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in shard:
            for slab in slabs(part, draw):
                file.write(slab)
        file.flush()
        os.fsync(file.fileno())  # only clean pages can be dropped


def slabs(part: Part, draw: Draw) -> Iterator[memoryview]:
    """The bytes of a tensor, piece by piece."""
    for begin in range(0, part.bytes, gguf_shape.SLAB_BYTES):
        count = min(gguf_shape.SLAB_BYTES, part.bytes - begin)
        words = draw.integers(0, 1 << 64, -(-count // 8), np.uint64)
        yield part.fill(words.view(np.uint8)[:count]).data


if __name__ == "__main__":
    write(SHAPES[sys.argv[1]], Path(sys.argv[2]), sys.argv[3])
