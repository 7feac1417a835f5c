"""Vocabularies of GGUF files: the token ids are llama.cpp's.

The committed values were given by llama.cpp (tests/llama_cpp_side.py tokenize); with EDGERT_LLAMA_PYTHON it is asked again, on
10,000 lines.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gguf_texts import byte_level, byte_level_fields, gemma4_fields, lines, sentencepiece_fields
from ggufs import field, gguf, metadata

from edgert import _native
from edgert.converters.gguf import GgufFile
from edgert.converters.gguf_tokenizer import assets
from edgert.tokenizer import Tokenizer

PYTHON = os.environ.get("EDGERT_LLAMA_PYTHON")
GOLDEN = Path(__file__).parent / "golden/gguf_tokens.json"
PRES = [
    "default", "gpt-2", "olmo", "llama-bpe", "dbrx", "glm4", "qwen2", "qwen35", "deepseek-llm", "deepseek-coder",
    "deepseek-v3", "kimi-k2", "starcoder", "refact", "gpt-4o", "llama4", "tekken", "bailingmoe", "lfm2", "smollm",
]  # fmt: skip
MODEL = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
         "attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip


def write(path: Path, vocabulary: list[bytes]) -> Path:
    path.write_bytes(gguf(metadata("llama", MODEL) + vocabulary))
    return path


def tokenizer(path: Path) -> Tokenizer:
    made = assets(GgufFile(path))
    return Tokenizer(made["tokenizer.json"], json.loads(made["tokenizer_config.json"]))


def fields_for(name: str) -> list[bytes]:
    if name.startswith("sentencepiece"):
        return sentencepiece_fields(space=name == "sentencepiece")
    return gemma4_fields() if name == "gemma4" else byte_level_fields(name)


@pytest.mark.skipif(PYTHON is None, reason="EDGERT_LLAMA_PYTHON names no interpreter")
@pytest.mark.parametrize("name", ["sentencepiece", "sentencepiece, no prefix", "gemma4", *PRES])
def test_ten_thousand_lines(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", fields_for(name))
    texts = list(lines(10_000))
    expected = llama_cpp_ids(path, texts)
    ours = tokenizer(path)
    wrong = [(text, ids) for text, ids in zip(texts, expected, strict=True) if ours.encode(text) != ids]
    assert not wrong, f"{len(wrong)} lines differ, first: {wrong[0][0]!r}"


def llama_cpp_ids(path: Path, texts: list[str]) -> list[list[int]]:
    (path.parent / "texts.json").write_text(json.dumps(texts))
    side = Path(__file__).with_name("llama_cpp_side.py")
    command = [
        str(PYTHON),
        str(side),
        "tokenize",
        str(path),
        str(path.parent / "texts.json"),
        str(path.parent / "ids.json"),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    ids: list[list[int]] = json.loads((path.parent / "ids.json").read_text())
    return ids


# --- without llama.cpp ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """A small vocabulary, texts, and what llama.cpp made of them: for each pre-tokeniser the checksum of all ids."""
    loaded: dict[str, Any] = json.loads(GOLDEN.read_text())
    return loaded


@pytest.mark.parametrize("pre", PRES)
def test_committed_ids(pre: str, golden: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", byte_level(pre, golden["tokens"], golden["merges"]))
    ours = tokenizer(path)
    ids = [ours.encode(text) for text in golden["texts"]]
    assert ids[0] == golden["first"][pre]
    assert checksum(ids) == golden["checksums"][pre]


def checksum(ids: list[list[int]]) -> str:
    return _native.xxh64(json.dumps(ids, separators=(",", ":")).encode())


def sentencepiece(**changes: Any) -> list[bytes]:
    pieces = ["\u2581", "a", "b", "ab", "\u2581ab", "aa", "\u2581\u2581", "<user>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    values: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -4.0, -5.0],
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    types = [2, 3, 3] + [6] * 256 + [1] * 7 + [4]
    fields = [field(f"tokenizer.ggml.{key}", item) for key, item in values.items()]
    return [*fields, field("tokenizer.ggml.token_type", types, "int32")]


def test_sentencepiece_by_hand(tmp_path: Path) -> None:
    """Best scores first, bytes for what is unknown, a space in front and after special tokens."""
    ours = tokenizer(write(tmp_path / "model.gguf", sentencepiece()))
    space, a, b, ab, space_ab, aa, spaces, user = range(259, 267)
    assert ours.encode("ab") == [1, space_ab]
    assert ours.encode("b") == [1, space, b]
    assert ours.encode("aab") == [1, space, a, ab]
    assert ours.encode("aaa") == [1, space, aa, a]
    assert ours.encode("é") == [1, space, 3 + 0xC3, 3 + 0xA9]
    assert ours.encode("  ab") == [1, spaces, space_ab]
    assert ours.encode("b<user>ab</s>") == [1, space, b, user, space_ab, 2]
    assert ours.encode("") == [1]
    assert ours.decode(ours.encode("ab é b")) == "ab é b"
    plain = tokenizer(
        write(tmp_path / "plain.gguf", sentencepiece(add_space_prefix=False, add_bos_token=False))
    )
    assert plain.encode("ab") == [ab]
    assert plain.decode(plain.encode(" ab")) == " ab"


def test_gemma4_by_hand(tmp_path: Path) -> None:
    """Pieces under merges, lines apart, bytes for what is unknown, and the first token whatever the file says."""
    pieces = ["\u2581", "a", "b", "ab", "\u2581ab", "\n", "\n\n"]
    vocabulary = [
        field("tokenizer.ggml.model", "gemma4"),
        field(
            "tokenizer.ggml.tokens", ["<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
        ),
        field("tokenizer.ggml.token_type", [3, 3] + [6] * 256 + [1] * 7, "int32"),
        field("tokenizer.ggml.merges", ["a b", "\u2581 ab", "\n \n"]),
        field("tokenizer.ggml.bos_token_id", 1),
        field("tokenizer.ggml.eos_token_id", 0),
        field("tokenizer.ggml.add_bos_token", False),
    ]
    ours = tokenizer(write(tmp_path / "model.gguf", vocabulary))
    space, a, _b, ab, space_ab, line, lines_ = range(258, 265)
    assert ours.encode("ab ab") == [1, ab, space_ab]
    assert ours.encode(" a\n\nab\n") == [1, space, a, lines_, ab, line]
    assert ours.encode("é") == [1, 2 + 0xC3, 2 + 0xA9]
    assert ours.decode(ours.encode(" ab é\n")) == " ab é\n"


def test_an_end_of_text_may_be_a_piece_like_any_other(tmp_path: Path) -> None:
    def ending(*tokens: str) -> list[int]:
        vocabulary = [
            field("tokenizer.ggml.model", "gpt2"),
            field("tokenizer.ggml.pre", "gpt-2"),
            field("tokenizer.ggml.tokens", ["a", "</s>", *tokens]),
            field("tokenizer.ggml.merges", ["a a"]),
            field("tokenizer.ggml.eos_token_id", 0),
        ]
        made = assets(GgufFile(write(tmp_path / "model.gguf", vocabulary)))
        return json.loads(made["generation_config.json"])["eos_token_id"]  # type: ignore[no-any-return]

    assert ending() == [0, 1]
    assert ending("<|tool_response>") == [0, 2]


def test_special_tokens_template_and_defaults(tmp_path: Path) -> None:
    tokens = ["a", "b", "<s>", "<|im_end|>", "<|eot|>", "<tool>", "ab"]
    vocabulary = [
        field("tokenizer.ggml.model", "gpt2"),
        field("tokenizer.ggml.pre", "qwen2"),
        field("tokenizer.ggml.tokens", tokens),
        field("tokenizer.ggml.token_type", [1, 1, 3, 1, 3, 4, 1], "int32"),
        field("tokenizer.ggml.merges", ["a b"]),
        field("tokenizer.ggml.bos_token_id", 2),
        field("tokenizer.ggml.eos_token_id", 2),
        field("tokenizer.ggml.eot_token_id", 4),
        field("tokenizer.ggml.add_bos_token", True),
        field("tokenizer.chat_template", "{{ bos_token }}{{ messages[0]['content'] }}"),
        field("general.sampling.temp", 0.5),
        field("general.sampling.top_k", 20),
    ]
    made = assets(GgufFile(write(tmp_path / "model.gguf", vocabulary)))
    generation = json.loads(made["generation_config.json"])
    # <|im_end|> ends a text whatever its type says.
    assert generation == {"temperature": 0.5, "top_k": 20.0, "bos_token_id": 2, "eos_token_id": [2, 3, 4]}
    ours = Tokenizer(
        made["tokenizer.json"],
        json.loads(made["tokenizer_config.json"]),
        made["chat_template.jinja"].decode(),
    )
    assert ours.encode("ab<tool>b<|im_end|>") == [2, 6, 5, 1, 3]
    assert ours.encode("ab", add_special_tokens=False) == [6]
    assert ours.decode([2, 6, 5, 3]) == "ab<tool>"
    assert ours.apply_chat_template([{"role": "user", "content": "ab"}]) == "<s>ab"


def test_a_large_vocabulary_loads(tmp_path: Path) -> None:
    """A quarter of a million tokens, as the largest models have."""
    tokens = [f"t{number}" for number in range(256_000)]
    path = write(
        tmp_path / "model.gguf",
        [
            field("tokenizer.ggml.model", "gpt2"),
            field("tokenizer.ggml.pre", "gpt-2"),
            field("tokenizer.ggml.tokens", tokens),
            field("tokenizer.ggml.merges", ["t 0"]),
        ],
    )
    content = json.loads(assets(GgufFile(path))["tokenizer.json"])
    assert content["model"]["vocab"]["t255999"] == 255_999
