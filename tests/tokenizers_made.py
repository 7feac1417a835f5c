"""Small tokenizers made on the fly, as tokenizer.json bytes."""

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def main():\n    return os.path.join(a, b)\n",
    "Größe, naïve, 你好世界, здравствуй, 👩‍👩‍👧 🇩🇪 and more naïve größe 你好",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> bytes:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("plain words é", normalized=False)]
    )
    return json_of(tokenizer)


def sentencepiece(decoder: str = "llama") -> bytes:
    """BPE over words marked by U+2581 with one token a byte, as Llama 2, Mixtral and Gemma have it."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", *SPECIAL, *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT[:2], trainer)
    made = json.loads(json_of(tokenizer))
    made["added_tokens"] = [row for row in made["added_tokens"] if row["content"] not in byte_tokens]
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if decoder == "llama":
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    made["decoder"] = {"type": "Sequence", "decoders": steps}
    return json.dumps(made).encode()


def metaspace(prepend_scheme: str) -> bytes:
    """Unigram-like words with a Metaspace decoder, as T5 has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    )
    return json_of(tokenizer)


def words() -> bytes:
    """Whole words and no decoder: tokens are joined by spaces."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, "a", "b", "hello", "world"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    return json_of(tokenizer)


def with_pattern(pattern: str) -> bytes:
    """A tokenizer that splits at a regular expression."""
    tokenizer = Tokenizer.from_buffer(byte_level())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    return json_of(tokenizer)


def json_of(tokenizer: Tokenizer) -> bytes:
    text: str = tokenizer.to_str()
    return text.encode()
