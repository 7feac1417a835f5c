"""The vocabulary of a GGUF file as the files that a bundle carries: tokenizer.json and its companions.

Token ids are those that llama.cpp gives. It splits text by the pre-tokeniser that tokenizer.ggml.pre names, so its patterns
are stated here; SentencePiece's scores become an order of merges.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgert.errors import CorruptError, UnsupportedError

from .gguf import GgufFile

_PREFIX = "tokenizer.ggml."
_MAX_TEXT_BYTES = 256
_MAX_TEMPLATE_BYTES = 256 << 10
_MAX_PIECE = 512  # characters of a SentencePiece token that is split into all pairs
_MARK = "\u2581"  # stands for a space
_PIECES: list[dict[str, Any]] = [  # to text
    {"type": "Replace", "pattern": {"String": _MARK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]

# Token types.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

# --- pre-tokenisers -------------------------------------------------------------------------------------

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
)  # fmt: skip
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
# A word is what has no lower-case ASCII letter and then what has no upper-case one; letters of other scripts are both.
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_WORD = r"[^\r\n\p{L}\p{N}]?"


def _cased(contractions: str, digits: str) -> str:
    return (
        f"{_WORD}{_UPPER}*{_LOWER}+{contractions}|{_WORD}{_UPPER}+{_LOWER}*{contractions}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
    )


_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)
# Letters of scripts that have cases, as DeepSeek's own tokenizer lists them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-"
    "\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-"
    "\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-"
    "\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183"
    "\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
    "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
# Spaces of these ranges do not count among them for llama.cpp.
_EAST = r"(?:(?!\s)[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff])+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[" + _CASED_LETTERS + "]+",
    r"\s?["
    "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001-\u3002"
    "]+",
    r"\s+$",
    _EAST,
    r"\p{N}+",
)
_KIMI_K2 = (
    r"\p{Han}+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+" + _CONTRACTIONS + "?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
)
_STARCODER = (r"\p{N}", _GPT2)


@dataclass(frozen=True)
class _Splitting:
    """Patterns that split a text one after the other; what lies between the matches is a word too. `whole_words`: a word of
    the vocabulary is one token whatever the merges say; `add_bos`: unless the file says otherwise."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_LLAMA3_SPLITTING = _Splitting((_LLAMA3,), whole_words=True, add_bos=True)
_SPLITTINGS: dict[str, _Splitting] = {
    "default": _Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _Splitting((_GPT2,)),
    "olmo": _Splitting((_GPT2,)),
    "mpt": _Splitting((_GPT2,)),
    "phi-2": _Splitting((_GPT2,)),
    "dbrx": _Splitting((_LLAMA3,)),
    "smaug-bpe": _Splitting((_LLAMA3,)),
    "llama-bpe": _LLAMA3_SPLITTING,
    "llama3": _LLAMA3_SPLITTING,
    "llama-v3": _LLAMA3_SPLITTING,
    "lfm2": _LLAMA3_SPLITTING,
    "pixtral": _LLAMA3_SPLITTING,
    "falcon3": _LLAMA3_SPLITTING,
    "glm4": _Splitting((_LLAMA3,)),
    "chatglm-bpe": _Splitting((_LLAMA3,)),
    "qwen2": _Splitting((_QWEN2,)),
    "deepseek-r1-qwen": _Splitting((_QWEN2,)),
    "stablelm2": _Splitting((_QWEN2,)),
    "megrez": _Splitting((_QWEN2,)),
    "hunyuan": _Splitting((_QWEN2,)),
    "qwen35": _Splitting((_QWEN35,)),
    "deepseek-v3": _Splitting(_DEEPSEEK3),
    "hunyuan-dense": _Splitting(_DEEPSEEK3),
    "kimi-k2": _Splitting((_KIMI_K2,)),
    "deepseek-llm": _Splitting(_DEEPSEEK_LLM),
    "deepseek-coder": _Splitting(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST, r"\p{N}")
    ),
    "starcoder": _Splitting(_STARCODER),
    "refact": _Splitting(_STARCODER),
    "command-r": _Splitting(_STARCODER),
    "smollm": _Splitting(_STARCODER),
    "codeshell": _Splitting(_STARCODER),
    "exaone": _Splitting(_STARCODER),
    "gpt-4o": _Splitting((_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"),)),
    "llama4": _Splitting((_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"),)),
    "tekken": _Splitting((_cased("", r"\p{N}"),), whole_words=True, add_bos=True),
    "bailingmoe": _Splitting(
        (
            r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
}  # fmt: skip

# Tokens that end a text whatever their ids; llama.cpp takes them for control tokens.
_ENDING = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
        "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "</s>", "<eos>", "<turn|>",
        "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|flush|>", "<|calls|>", "[e~[",
    }
)  # fmt: skip
_PLAIN_END = frozenset(
    {"<|tool_response>", "<|plamo:eos|>"}
)  # in vocabularies where </s> is a piece like any other
_ENDING_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_HARMONY = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})  # part of the text
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def assets(file: GgufFile) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json, as far as the file has them.

    Raises UnsupportedError for a kind of vocabulary or a pre-tokeniser that is not known, CorruptError for a vocabulary
    that contradicts itself.
    """
    template = file.text("tokenizer.chat_template", _MAX_TEMPLATE_BYTES)
    made = {} if template is None else {"chat_template.jinja": template.encode()}
    generation = {there: file.number(f"general.sampling.{here}") for here, there in _SAMPLING.items()}
    made["generation_config.json"] = _json(
        {key: value for key, value in generation.items() if value is not None}
    )
    if file.text(_PREFIX + "model", _MAX_TEXT_BYTES) in (None, "none", "no_vocab"):
        return made
    vocabulary = _Vocabulary(file)
    ids = {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.ending()}
    made["generation_config.json"] = _json(
        {
            **json.loads(made["generation_config.json"]),
            **{key: value for key, value in ids.items() if value is not None},
        }
    )
    made["tokenizer.json"] = _json(vocabulary.tokenizer())
    made["tokenizer_config.json"] = _json(vocabulary.config())
    return made


class _Vocabulary:
    """The vocabulary of one file."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.model = file.text(_PREFIX + "model", _MAX_TEXT_BYTES) or ""
        if self.model not in ("gpt2", "llama", "gemma4"):
            raise UnsupportedError(
                f"{file.path}: {file.where(_PREFIX + 'model')}: {self.model!r}; gpt2 (byte-level BPE), llama "
                "(SentencePiece) and gemma4 (its pieces under merges) are supported"
            )
        tokens = file.texts(_PREFIX + "tokens")
        if not tokens:
            raise CorruptError(f"{file.path}: {file.where(_PREFIX + 'tokens')}: missing or empty")
        self.tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(tokens):
            twice = next(token for number, token in enumerate(self.tokens) if self.ids[token] != number)
            raise CorruptError(f"{file.path}: {file.where(_PREFIX + 'tokens')}: {twice[:80]!r} appears twice")
        self.types = self._types()
        bos, eos, unknown = {"gpt2": (11, 11, None), "llama": (1, 2, 0)}.get(self.model, (None, None, None))
        self.bos = self._special("bos_token_id", bos)
        self.eos = self._special("eos_token_id", eos)
        self.unknown = self._special("unknown_token_id", unknown)
        self.splitting = self._splitting() if self.model == "gpt2" else None

    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        kinds = {"gpt2": self._byte_level, "llama": self._sentencepiece, "gemma4": self._merged_pieces}
        made = kinds[self.model]()
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            "post_processor": self._post_processor(),
            **made,
        }

    def config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        padding = self._special("padding_token_id", None)
        ids = {"bos_token": self.bos, "eos_token": self.eos, "unk_token": self.unknown, "pad_token": padding}
        config: dict[str, Any] = {
            key: self.tokens[number] for key, number in ids.items() if number is not None
        }
        return config | {"add_bos_token": self._adds("bos"), "add_eos_token": self._adds("eos")}

    def ending(self) -> list[int]:
        """The ids of all tokens that end a text."""
        ids = {self._special(key, None) for key in _ENDING_KEYS} | {self.eos}
        ids |= {self.ids[token] for token in self._ending_texts()}
        if {
            "<|return|>",
            "<|call|>",
        } <= self.ids.keys():  # of a harmony vocabulary, where this ends a message
            ids.discard(self.ids.get("<|end|>"))
        return sorted(number for number in ids if number is not None)

    # --- the two kinds ------------------------------------------------------------------------------

    def _byte_level(self) -> dict[str, Any]:
        assert self.splitting is not None
        splits: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.splitting.patterns
        ]
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        return {
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
            "decoder": byte_level,
            "model": _bpe(self.ids, self._pairs()) | {"ignore_merges": self.splitting.whole_words},
        }

    def _merged_pieces(self) -> dict[str, Any]:
        """A line is one word, and so is a run of line ends."""
        lines = {
            "type": "Split",
            "pattern": {"Regex": r"[^\n]+|\n+"},
            "behavior": "Isolated",
            "invert": False,
        }
        return {
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _MARK},
            "pre_tokenizer": lines,
            "decoder": {"type": "Sequence", "decoders": _PIECES},
            "model": _bpe(self.ids, self._pairs()) | self._fallback(),
        }

    def _pairs(self) -> list[tuple[str, str]]:
        merges = self.file.texts(_PREFIX + "merges")
        if merges is None:
            raise CorruptError(f"{self.file.path}: {_PREFIX}merges: missing")
        return [self._pair(number, merge) for number, merge in enumerate(merges)]

    def _fallback(self) -> dict[str, Any]:
        """What becomes of characters that no piece has."""
        has_bytes = all(f"<0x{byte:02X}>" in self.ids for byte in range(256))
        unknown = None if self.unknown is None else self.tokens[self.unknown]
        return {"unk_token": unknown, "fuse_unk": True, "byte_fallback": has_bytes}

    def _pair(self, number: int, merge: str) -> tuple[str, str]:
        middle = merge.find(" ", 1)
        if middle < 0:
            raise CorruptError(
                f"{self.file.path}: {self.file.where(_PREFIX + 'merges')}: [{number}]: {merge[:80]!r} is no pair of tokens"
            )
        return merge[:middle], merge[middle + 1 :]

    def _sentencepiece(self) -> dict[str, Any]:
        scores = self.file.numbers(_PREFIX + "scores")
        if scores is None or len(scores) != len(self.tokens):
            found = "none" if scores is None else len(scores)
            raise CorruptError(
                f"{self.file.path}: {self.file.where(_PREFIX + 'scores')}: {found} for {len(self.tokens)} tokens"
            )
        prefix = self.file.flag(_PREFIX + "add_space_prefix") is not False
        steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _MARK}]
        decoders = list(_PIECES)
        if prefix:
            steps.insert(0, {"type": "Prepend", "prepend": _MARK})
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": _bpe(self.ids, _merges(self.tokens, self.ids, scores)) | self._fallback(),
        }

    # --- what both have -----------------------------------------------------------------------------

    def _types(self) -> Sequence[int]:
        types = self.file.numbers(_PREFIX + "token_type")
        if types is None:
            types = (_NORMAL,) * len(self.tokens)
        if len(types) != len(self.tokens):
            raise CorruptError(
                f"{self.file.path}: {self.file.where(_PREFIX + 'token_type')}: {len(types)} for {len(self.tokens)} tokens"
            )
        harmony = {"<|return|>", "<|call|>"} <= self.ids.keys()
        changed = list(types)
        if _PLAIN_END & self.ids.keys() and "</s>" in self.ids:
            changed[self.ids["</s>"]] = _NORMAL
        for token in self._ending_texts():
            changed[self.ids[token]] = _USER_DEFINED if harmony and token == "<|end|>" else _CONTROL
        for token in _HARMONY & self.ids.keys():
            changed[self.ids[token]] = _USER_DEFINED
        return changed

    def _ending_texts(self) -> frozenset[str]:
        plain = {"</s>"} if _PLAIN_END & self.ids.keys() else set()
        return _ENDING & self.ids.keys() - plain

    def _special(self, key: str, default: int | None) -> int | None:
        value = self.file.integer(_PREFIX + key)
        if value is None or not 0 <= value < len(self.tokens):
            value = default
        return value if value is not None and value < len(self.tokens) else None

    def _splitting(self) -> _Splitting:
        name = self.file.text(_PREFIX + "pre", _MAX_TEXT_BYTES) or "default"
        splitting = _SPLITTINGS.get(name)
        if splitting is None:
            raise UnsupportedError(
                f"{self.file.path}: {self.file.where(_PREFIX + 'pre')}: the pre-tokeniser {name!r} is not known; "
                f"known are {', '.join(_SPLITTINGS)}"
            )
        return splitting

    def _adds(self, token: str) -> bool:
        if self.model == "gemma4" and token == "bos":
            return True  # whatever the file says
        stated = self.file.flag(f"{_PREFIX}add_{token}_token")
        if stated is not None:
            return stated
        return token == "bos" and (self.splitting is None or self.splitting.add_bos)

    def _post_processor(self) -> dict[str, Any] | None:
        before = self.bos if self._adds("bos") else None
        after = self.eos if self._adds("eos") else None
        if before is None and after is None:
            return None

        def special(number: int | None) -> list[dict[str, Any]]:
            return [] if number is None else [{"SpecialToken": {"id": self.tokens[number], "type_id": 0}}]

        def sequence(name: str) -> dict[str, Any]:
            return {"Sequence": {"id": name, "type_id": 0}}

        used = {self.tokens[number]: number for number in (before, after) if number is not None}
        single = [*special(before), sequence("A"), *special(after)]
        return {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, *special(before), sequence("B"), *special(after)],
            "special_tokens": {
                token: {"id": token, "ids": [number], "tokens": [token]} for token, number in used.items()
            },
        }

    def _added_tokens(self) -> list[dict[str, Any]]:
        """Tokens that are found in the text before it is split."""
        name = (self.file.text("general.name", _MAX_TEXT_BYTES * 16) or "").lower()
        strips = "phi-3" in name or "phi3" in name
        return [
            {
                "id": number,
                "content": self.tokens[number],
                "single_word": False,
                "lstrip": False,
                "rstrip": strips and self.tokens[number] not in ("<unk>", "<s>", "<|endoftext|>"),
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for number, kind in enumerate(self.types)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]


def _bpe(ids: Mapping[str, int], merges: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": ids,
        "merges": merges,
    }


def _merges(tokens: Sequence[str], ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose union scores best: the unions in order of their scores."""
    order = sorted(range(len(tokens)), key=lambda number: -scores[number])
    merges = []
    for number in order:
        token = tokens[number]
        if len(token) > _MAX_PIECE:
            continue  # the pairs of one that long would take a work that its square measures
        for middle in range(1, len(token)):
            left, right = token[:middle], token[middle:]
            if left in ids and right in ids:
                merges.append((left, right))
    return merges


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
