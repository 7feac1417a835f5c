"""Lines in many scripts, with emoji, code, odd spaces, digits, controls and combining marks; and vocabularies for them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from ggufs import field

WORDS = [
    "the", "module", "reads", "file", "returns", "number", "of", "bytes", "written", "I'm",
    "you're", "WE'LL", "don't", "naïve", "Größe", "café", "größe", "hello_world", "camelCase",
    "HTTPServer", "x1", "y22", "z333", "0", "1", "12", "123", "1234", "12345", "3.14159",
    "1,000,000", "0xFF", "здравствуй", "мир", "Привет", "你好", "世界", "こんにちは", "カタカナ", "안녕하세요",
    "مرحبا", "العالم", "שלום", "हिन्दी", "नमस्ते", "ไทย", "ภาษา", "ქართული", "Ελληνικά", "ὕδωρ",
    "\u1f5f\u1f7d", "\u1fd3", "\u2126", "\u212a", "İstanbul", "\u01c5", "ﬁ", "\U00010400\U00010401",
    "½", "Ⅻ", "²", "٣٤٥", "१२३", "e\u0301", "a\u030a\u0301", "👩\u200d👩\u200d👧", "🇩🇪", "👍🏽", "🎉",
    "→", "≤", "±", "$100", "€5", "#tag", "@user", "!==", "=>", "::", "/*", "*/", "//", "<b>",
    "</s>", "<s>", "<|im_end|>", "{}", "[]", "()", "...", "---", "___", "~~", "`code`", "^", "|",
    "\\n",
]  # fmt: skip
SPACES = [" "] * 12 + ["  ", "   ", "\t", "\n", "\n\n", " \n", "\r\n", "\t\t", "\u00a0", "\u3000", "\u2003", "", "    ",
                       "        ", "\n    ", "\u200b", "\x0b", "\x0c", "\u0085", "\u2028"]  # fmt: skip
RANGES = [(32, 126), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x4E00, 0x9FFF), (0x300, 0x36F)]


def lines(count: int, seed: int = 0) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(_word(rng) + rng.choice(SPACES) for _ in range(rng.randint(1, 14)))


def _word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.85:
        return rng.choice(WORDS)
    if kind < 0.93:
        return "".join(chr(rng.randint(*rng.choice(RANGES))) for _ in range(rng.randint(1, 6)))
    if kind < 0.95:
        return "".join(chr(rng.randint(1, 31)) for _ in range(2))
    return rng.choice("abc=- \u2581.é") * rng.randint(1, 17)


def byte_level_fields(pre: str, size: int = 1500) -> list[bytes]:
    """The vocabulary of a byte-level BPE tokenizer, trained on such lines."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(3000, seed=1), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return byte_level(pre, [*tokens, "user def"], merges)


def byte_level(pre: str, tokens: list[str], merges: list[str]) -> list[bytes]:
    """The first three tokens are control tokens, the last one is defined by the user."""
    types = [3] * 3 + [1] * (len(tokens) - 4) + [4]
    return _fields("gpt2", tokens, types, pre=pre, merges=merges, bos_token_id=0, eos_token_id=2)


def sentencepiece_fields(space: bool = True) -> list[bytes]:
    """A vocabulary of pieces, a score by its rank each, and a token for each byte."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, show_progress=False, limit_alphabet=200
    )
    tokenizer.train_from_iterator(lines(2000, seed=1), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    scores = [0.0 if i < 259 else -float(ranks.get(token, 10000 + i)) for i, token in enumerate(tokens)]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259) + [4]
    others: dict[str, Any] = {} if space else {"add_space_prefix": False}
    return _fields(
        "llama",
        [*tokens, "<user>"],
        types,
        scores=[*scores, -5000.0],
        bos_token_id=1,
        eos_token_id=2,
        **others,
    )


def gemma4_fields() -> list[bytes]:
    """Pieces of characters under merges, a token for each byte, and tokens that are runs of line ends."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, show_progress=False, limit_alphabet=200
    )
    tokenizer.train_from_iterator((line for line in lines(2000, seed=1)), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    types = [3, 3, 3, 2] + [6] * 256 + [1] * (len(tokens) - 260) + [4]
    return _fields("gemma4", [*tokens, "<user>"], types, merges=merges, bos_token_id=2, eos_token_id=1,
                   unknown_token_id=3, add_bos_token=False)  # fmt: skip


def _fields(model: str, tokens: list[str], types: list[int], **others: Any) -> list[bytes]:
    values = {"model": model, "tokens": tokens, **others}
    fields = [field(f"tokenizer.ggml.{key}", item) for key, item in values.items()]
    return [*fields, field("tokenizer.ggml.token_type", types, "int32")]
