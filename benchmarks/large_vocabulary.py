"""A model with a vocabulary as large as those of large models, and small in everything else.

    python benchmarks/large_vocabulary.py OUT.edgert [151936]

Weights are random, in the shape "tiny"; the tokenizer is byte-level BPE over made-up words. What a vocabulary costs in
memory and in constrained decoding shows by itself.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import safetensors_shape
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from edgert.converters.source import convert_source
from edgert.shapes import SHAPES

_END = "<|end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def large_vocabulary(size: int = 150_000) -> bytes:
    """A tokenizer.json: byte-level BPE over made-up words, as many tokens as large models have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {_END: 0, **{letter: index + 1 for index, letter in enumerate(alphabet)}}
    merges: list[tuple[str, str]] = []
    rng = random.Random(1)
    letters = 'etaoinshrdlucmfwypvbgkETAOIN0123456789_Ġ{}[]":,.-'
    words = list(letters)
    while len(vocabulary) < size:
        left, right = rng.choice(words), rng.choice(words[:400])
        if left + right not in vocabulary and len(left + right) <= 12 and "Ġ" not in right:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
            words.append(left + right)
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([_END])
    return made.to_str().encode()


def large_bundle(path: Path, size: int = 151_936) -> Path:
    """Write the bundle at `path`."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        source = Path(scratch) / "source"
        config = {**SHAPES["tiny"], "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": size}
        safetensors_shape.write(config, source, "bf16")
        (source / "tokenizer.json").write_bytes(large_vocabulary(size))
        settings = {"bos_token": _END, "eos_token": _END, "chat_template": _CHAT_TEMPLATE}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        (source / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [0]}))
        return convert_source(source, path).path


if __name__ == "__main__":
    print(large_bundle(Path(sys.argv[1]), *map(int, sys.argv[2:])))
