"""Small random checkpoints in the Hugging Face layout.

Weights come from numpy, scaled so that routing is decided by real margins and greedy tokens vary (the usual
standard deviation of 0.02 leaves both near ties). Numpy and tokenizers are all that they need; variants.py has those
that transformers writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]

BOS, IM_START, IM_END = 0, 1, 2
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "The module reads the file and returns the number of bytes that were written to the other end.",
    "A function that returns a list of the names in the current directory, in no particular order.",
    "If the argument is not given, the value of the environment variable is used in its place.",
    "Return true when the path exists and is a regular file; raise an error in every other case.",
    "An expert that is not in memory is read from storage before the token goes on to the next layer.",
]


# --- files --------------------------------------------------------------------------------------------


def encode(array: np.ndarray, dtype: str) -> bytes:
    """The elements of an f32 array as little-endian F32, F16 or BF16 (nearest even)."""
    if dtype == "F32":
        return array.astype("<f4").tobytes()
    if dtype == "F16":
        return array.astype("<f2").tobytes()
    bits = np.ascontiguousarray(array, "<f4").view("<u4")
    nearest: np.ndarray = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return nearest.astype("<u2").tobytes()


def write_safetensors(path: Path, tensors: Tensors, dtype: str = "F32") -> None:
    """One safetensors file, written by hand so that the tests do not depend on the library they check."""
    header: dict[str, Any] = {}
    data = []
    offset = 0
    for name, array in tensors.items():
        data.append(encode(array, dtype))
        end = offset + len(data[-1])
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def write_weights(directory: Path, tensors: Tensors, *, dtype: str = "F32", shards: int = 1) -> None:
    """model.safetensors, or `shards` files and their index."""
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, dtype)
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        write_safetensors(directory / file, part, dtype)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens: every byte where there is room, else ASCII."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIAL_TOKENS):
        alphabet = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    assert tokenizer.get_vocab_size() <= vocab_size
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[IM_END],
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(
        json.dumps({"bos_token_id": BOS, "eos_token_id": [IM_END]})
    )


# --- weights ------------------------------------------------------------------------------------------


def _scale(name: str, shape: tuple[int, ...]) -> float:
    if name.endswith("embed_tokens.weight"):
        return 0.3
    if name.endswith("bias"):
        return 0.3
    fan_in = 1 / math.sqrt(shape[-1])
    if name.endswith("lm_head.weight"):
        return 3 * fan_in
    if name.endswith(("gate.weight", "shared_expert_gate.weight")):
        return 2.5 * fan_in  # routers: logits with a standard deviation of about 2.5
    return 1.2 * fan_in


def random_weights(shapes: Shapes, seed: int, *, zero_centred: bool = False) -> Tensors:
    """f32 weights by name: norms around one (or zero, where a model adds it), the rest normal. Independent of the order of `shapes`."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in sorted(shapes):
        values = rng.standard_normal(shapes[name], np.float32)
        if "norm" in name:
            centre = 0 if zero_centred and "linear_attn" not in name else 1
            tensors[name] = (centre + 0.2 * np.clip(values, -2, 2)).astype(np.float32)
        else:
            tensors[name] = values * np.float32(_scale(name, shapes[name]))
    return tensors


# --- a model without torch ----------------------------------------------------------------------------

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 320,
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "intermediate_size": 56,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": BOS,
    "eos_token_id": IM_END,
    "torch_dtype": "float32",
}


def qwen3_moe_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a qwen3_moe checkpoint whose every layer is an MoE, with per-expert names."""
    hidden, head, inter = config["hidden_size"], config["head_dim"], config["moe_intermediate_size"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (q, hidden),
            layer + "self_attn.k_proj.weight": (kv, hidden),
            layer + "self_attn.v_proj.weight": (kv, hidden),
            layer + "self_attn.o_proj.weight": (hidden, q),
            layer + "self_attn.q_norm.weight": (head,),
            layer + "self_attn.k_norm.weight": (head,),
            layer + "mlp.gate.weight": (config["num_experts"], hidden),
        }
        for e in range(config["num_experts"]):
            expert = f"{layer}mlp.experts.{e}."
            shapes[expert + "gate_proj.weight"] = (inter, hidden)
            shapes[expert + "up_proj.weight"] = (inter, hidden)
            shapes[expert + "down_proj.weight"] = (hidden, inter)
    return shapes


def tiny_checkpoint(
    directory: Path, *, seed: int = 0, dtype: str = "F32", shards: int = 1, **overrides: Any
) -> Path:
    """A qwen3_moe checkpoint of a few hundred KiB at `directory`; `overrides` replace keys of TINY_CONFIG."""
    directory.mkdir(parents=True, exist_ok=True)
    config = TINY_CONFIG | overrides
    write_weights(directory, random_weights(qwen3_moe_shapes(config), seed), dtype=dtype, shards=shards)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(directory, config["vocab_size"])
    return directory


def prompt_tokens(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Token ids without the special ones."""
    return [int(t) for t in np.random.default_rng(seed).integers(len(SPECIAL_TOKENS), vocab_size, length)]
