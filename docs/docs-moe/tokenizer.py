"""Train the byte-level BPE tokenizer on a corpus, and encode the corpus with it.

usage: tokenizer.py corpus.jsonl DATA

Writes DATA/tokenizer.json and DATA/DOMAIN.SPLIT.npy: the documents of a domain end to end as uint16 token ids, each
after one <|endoftext|>.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT_ID, IM_START_ID, IM_END_ID = range(3)

# Contractions, words with the blank before them, single digits, punctuation, line breaks, other blanks.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a tokenizer on a corpus, and encode the corpus with it."
    )
    parser.add_argument("corpus", type=Path, help="the file that corpus.py wrote")
    parser.add_argument("data", type=Path, help="folder to write into")
    parser.add_argument("--vocab-size", type=int, default=8192, help="at most 65536 (default: %(default)s)")
    options = parser.parse_args()
    if not 256 + len(SPECIAL_TOKENS) <= options.vocab_size <= 1 << 16:
        parser.error("--vocab-size: every byte and special token needs an id, and an id has 16 bits")

    with options.corpus.open(encoding="utf8") as lines:
        documents = [json.loads(line) for line in lines]
    tokenizer = train_tokenizer([d["text"] for d in documents if d["split"] == "train"], options.vocab_size)
    options.data.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.data / "tokenizer.json"))

    encoded: defaultdict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for document in documents:
        ids = [END_OF_TEXT_ID, *tokenizer.encode(document["text"], add_special_tokens=False).ids]
        encoded[document["domain"], document["split"]].append(np.array(ids, np.uint16))
    for (domain, split), parts in sorted(encoded.items()):
        tokens = np.concatenate(parts)
        np.save(options.data / f"{domain}.{split}.npy", tokens)
        print(domain, split, f"{len(parts)} documents", f"{len(tokens)} tokens")


if __name__ == "__main__":
    main()
