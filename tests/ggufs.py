"""GGUF files written by hand, so that the tests do not depend on the library whose files they stand for."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SCALARS = {"uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6, "bool": 7,
           "uint64": 10, "int64": 11, "float64": 12}  # fmt: skip
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "IQ2_XXS": 16, "BF16": 30}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any, kind: str | None = None) -> bytes:
    """The type and the bytes of a value; ints are uint32 and floats float32 unless `kind` says otherwise."""
    if isinstance(item, str | bytes):
        return struct.pack("<I", STRING) + string(item)
    if isinstance(item, list | tuple):
        body = [value(element, kind)[4:] for element in item]
        first = struct.unpack("<I", value(item[0], kind)[:4])[0] if item else SCALARS["uint32"]
        return struct.pack("<IIQ", ARRAY, first, len(body)) + b"".join(body)
    kind = kind or {bool: "bool", int: "uint32", float: "float32"}[type(item)]
    number = SCALARS[kind]
    return struct.pack("<I" + CODES[number], number, item)


def field(key: str, item: Any, kind: str | None = None) -> bytes:
    return string(key) + value(item, kind)


class Tensor:
    """`data` of a type; `shape` is numpy's, columns last."""

    def __init__(self, shape: Sequence[int], kind: str, data: bytes) -> None:
        self.shape, self.kind, self.data = tuple(shape), kind, data

    @classmethod
    def of(cls, array: np.ndarray, kind: str = "F32") -> Tensor:
        from checkpoints import encode

        data = q8_0(array) if kind == "Q8_0" else encode(array, kind)
        return cls(array.shape, kind, data)


def q8_0(array: np.ndarray) -> bytes:
    """Blocks of 32 weights: an f16 scale and int8 codes."""
    blocks = np.asarray(array, np.float32).reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype("<f2")
    safe = np.where(scales == 0, 1, scales).astype(np.float32)
    codes = np.clip(np.rint(blocks / safe), -127, 127).astype(np.int8)
    return b"".join(s.tobytes() + c.tobytes() for s, c in zip(scales, codes, strict=True))


def from_q8_0(data: bytes, shape: Sequence[int]) -> np.ndarray:
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 34)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return np.asarray((scales * blocks[:, 2:].view(np.int8).astype(np.float32)).reshape(shape))


def info(name: str | bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
    """One tensor's entry; dimensions are written with the columns first."""
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(list(shape)), kind, offset)


def gguf(
    fields: Sequence[bytes], tensors: Mapping[str, Tensor] = {}, *, version: int = 3, alignment: int = 32
) -> bytes:
    """A whole file; `fields` as field() makes them."""
    infos, data = [], bytearray()
    for name, tensor in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        infos.append(info(name, tensor.shape, TYPES[tensor.kind], len(data)))
        data += tensor.data
    head = (
        b"GGUF" + struct.pack("<IQQ", version, len(infos), len(fields)) + b"".join(fields) + b"".join(infos)
    )
    data += b"\0" * (-len(data) % alignment)
    return head + b"\0" * (-len(head) % alignment) + bytes(data)


# --- a whole model --------------------------------------------------------------------------------------

_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
_ENDS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}  # fmt: skip


def gguf_arrays(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's tensors under llama.cpp's names, the experts of a layer in one."""
    renamed: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, array in tensors.items():
        if name in _ENDS:
            renamed[_ENDS[name]] = array
            continue
        _, _, layer, rest = name.split(".", 3)
        stem, _, ending = rest.rpartition(".")
        if ".experts." in stem:
            index, part = stem.split(".experts.")[1].split(".")
            part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(part, part)
            stacked = f"blk.{layer}.ffn_{part.removesuffix('_proj')}_exps.weight"
            experts.setdefault(stacked, {})[int(index)] = array
        else:
            own = f"blk.{layer}.{_LAYER[stem]}.{ending}"
            renamed[own] = array[0] if own.endswith("ffn_gate_inp_shexp.weight") else array
    for name, arrays in experts.items():
        renamed[name] = np.stack([arrays[index] for index in range(len(arrays))])
    return renamed


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of llama's GGUF files: the halves of a head taken alternately."""
    rows = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.asarray(rows.swapaxes(1, 2).reshape(array.shape))


def write_gguf(
    path: Path,
    fields: Sequence[bytes],
    arrays: Mapping[str, np.ndarray],
    kind: str = "F32",
    **options: Any,
) -> Path:
    """Matrices in `kind`, vectors and routers in f32."""
    tensors = {
        name: Tensor.of(array, kind if array.ndim > 1 and "ffn_gate_inp" not in name else "F32")
        for name, array in arrays.items()
    }
    path.write_bytes(gguf(fields, tensors, **options))
    return path


def metadata(architecture: str, values: Mapping[str, Any], **others: Any) -> list[bytes]:
    """Fields of an architecture, and `others` with "__" for dots."""
    fields = [field("general.architecture", architecture)]
    fields += [field(f"{architecture}.{key}", item) for key, item in values.items()]
    return fields + [field(key.replace("__", "."), item) for key, item in others.items()]


QWEN3_MOE: dict[str, Any] = {
    "block_count": 3, "context_length": 512, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
    "attention.value_length": 16, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0,
    "expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32,
}  # fmt: skip


def qwen3_moe_arrays(seed: int = 0, vocab_size: int = 320) -> dict[str, np.ndarray]:
    """Random weights for QWEN3_MOE under Hugging Face's names."""
    from checkpoints import TINY_CONFIG, qwen3_moe_shapes, random_weights

    config = TINY_CONFIG | {"hidden_size": 64, "moe_intermediate_size": 32, "vocab_size": vocab_size}
    return random_weights(qwen3_moe_shapes(config), seed)


def fields_of(path: Path) -> list[bytes]:
    """The metadata of a GGUF file, as it stands in it."""
    from edgert.converters.gguf import GgufFile

    file = GgufFile(path)
    content = path.read_bytes()
    ends = [f.offset for f in list(file.fields.values())[1:]]
    begins = [24]
    for key, end in zip(list(file.fields)[1:], ends, strict=True):
        array = 12 if "array" in file.fields[key].kind else 0
        begins.append(end - array - 4 - len(key.encode()) - 8)
    name = next(iter(file.tensors)).encode()
    last = content.index(len(name).to_bytes(8, "little") + name, begins[-1])
    return [content[a:b] for a, b in zip(begins, [*begins[1:], last], strict=True)]
