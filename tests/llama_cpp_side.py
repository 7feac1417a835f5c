"""What only an interpreter with llama-cpp-python and gguf can do, run by the tests as a script of its own.

write CHECKPOINT OUT.gguf          the qwen3_moe checkpoint in bf16 or f32 as an f32 GGUF, by gguf-py
quantize IN.gguf OUT.gguf TYPE     by llama.cpp's own quantiser, every matrix in one type where it can
logits IN.gguf TOKENS.json OUT.npy
dequantize IN.gguf OUT.npz         every tensor as f32, by gguf-py
tokenize IN.gguf TEXTS.json OUT.json
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

FILE_TYPES = {
    "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17,
    "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "MXFP4": 38, "Q4_K_M": 15,
}  # fmt: skip
MIXED = ("F16", "BF16", "MXFP4", "Q4_K_M")  # llama.cpp's own mixture of types
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:begin]).items():
        if name != "__metadata__":
            data = raw[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]]
            if entry["dtype"] == "BF16":
                array = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
            else:
                array = np.frombuffer(data, "<f4")
            tensors[name] = array.reshape(entry["shape"])
    return tensors


def write(source: Path, output: Path) -> None:
    import gguf

    config = json.loads((source / "config.json").read_text())
    tensors = read_safetensors(source / "model.safetensors")
    writer = gguf.GGUFWriter(str(output), "qwen3moe")
    writer.add_name("test")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    add_vocabulary(writer, json.loads((source / "tokenizer.json").read_text()), config["vocab_size"])
    writer.add_tensor("token_embd.weight", tensors["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", tensors["model.norm.weight"])
    if "lm_head.weight" in tensors:
        writer.add_tensor("output.weight", tensors["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        here = f"model.layers.{layer}."
        for name, there in LAYER.items():
            writer.add_tensor(f"blk.{layer}.{there}.weight", tensors[f"{here}{name}.weight"])
        for part in ("gate", "up", "down"):
            names = [f"{here}mlp.experts.{e}.{part}_proj.weight" for e in range(config["num_experts"])]
            writer.add_tensor(
                f"blk.{layer}.ffn_{part}_exps.weight", np.stack([tensors[name] for name in names])
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: Any, tokenizer: dict[str, Any], vocab_size: int) -> None:
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = {**tokenizer["model"]["vocab"], **added}
    tokens = sorted(ids, key=lambda token: ids[token])
    special = set(added.values())
    types = [3 if number in special else 1 for number in range(len(tokens))]
    unused = vocab_size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + [f"[PAD{number}]" for number in range(unused)])
    writer.add_token_types(types + [5] * unused)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)


CALLBACKS: list[Any] = []  # kept alive, for the library holds them


def llama() -> Any:
    from llama_cpp import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    CALLBACKS.append(silent)
    llama_cpp.llama_log_set(silent, None)
    return llama_cpp


def quantize(source: Path, output: Path, kind: str) -> None:
    library = llama()
    options = library.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.pure = FILE_TYPES[kind], 1, kind not in MIXED
    status = library.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(options))
    assert status == 0


def logits(path: Path, tokens: Path, output: Path) -> None:
    import llama_cpp

    ids = json.loads(tokens.read_text())
    model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_batch=512, logits_all=True, verbose=False)
    model.eval(ids)
    np.save(output, np.asarray(model.scores[: len(ids)], np.float32))


def dequantize(path: Path, output: Path) -> None:
    import gguf

    tensors = gguf.GGUFReader(str(path)).tensors
    arrays = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in tensors}
    np.savez(output, **{name: array.reshape(shapes[name]) for name, array in arrays.items()})


def tokenize(path: Path, texts: Path, output: Path) -> None:
    library = llama()
    options = library.llama_model_default_params()
    options.vocab_only = True
    model = library.llama_model_load_from_file(str(path).encode(), options)
    vocabulary = library.llama_model_get_vocab(model)
    found = []
    for text in json.loads(texts.read_text()):
        raw = text.encode()
        room = len(raw) + 16
        buffer = (library.llama_token * room)()
        count = library.llama_tokenize(vocabulary, raw, len(raw), buffer, room, True, True)
        found.append(list(buffer[:count]))
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    commands: dict[str, Any] = {
        "write": write,
        "quantize": quantize,
        "logits": logits,
        "dequantize": dequantize,
        "tokenize": tokenize,
    }
    commands[command](*(Path(argument) if "/" in argument else argument for argument in arguments))
