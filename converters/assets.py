"""The text side of a checkpoint: tokenizer, chat template and generation defaults, checked and made small."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edgert.errors import CorruptError, EdgertError
from edgert.sampling import defaults_from
from edgert.tokenizer import Tokenizer

from .checkpoint import Checkpoint
from .strict_json import parse_json, parse_json_object

MAX_TOKENIZER_BYTES = 64 << 20
MAX_TOKENIZER_VALUES = 1 << 22
_MAX_SETTINGS_BYTES = 16 << 20  # tokenizer_config.json may list thousands of added tokens
_MAX_TEMPLATE_BYTES = 256 << 10

_TOKEN_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")
_TOKENIZER_FLAGS = ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces")
_GENERATION_KEYS = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens",
    "max_length",
)  # fmt: skip
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Source(Protocol):
    """A directory of small files."""

    @property
    def path(self) -> Path: ...
    def asset(self, name: str, max_bytes: int) -> bytes | None: ...


@dataclass
class Assets:
    """Files to put into the bundle, by name."""

    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_assets(checkpoint: Checkpoint, vocab_size: int) -> Assets:
    """Read what accompanies the weights.

    Raises CorruptError for token ids outside the vocabulary, merges of tokens that do not exist, and files
    that are malformed or too large; UnsupportedError for a tokenizer or template that cannot be run. A
    checkpoint without a tokenizer.json gives a bundle that takes token ids only.
    """
    assets = Assets()
    content = checkpoint.asset("tokenizer.json", MAX_TOKENIZER_BYTES)
    if content is not None:
        check_tokenizer(content, _place(checkpoint.path, "tokenizer.json"), vocab_size)
        assets.files["tokenizer.json"] = content
    else:
        assets.notes.append("tokenizer.json: none; the bundle takes and gives token ids only")
    settings = read_settings(checkpoint, "tokenizer_config.json")
    template = chat_template(checkpoint, settings)
    if content is not None:
        kept = kept_settings(settings)
        assets.files["tokenizer_config.json"] = compact(kept)
        try:
            Tokenizer(content, kept, template)  # what cannot be run is better refused now
        except EdgertError as error:
            raise type(error)(f"{checkpoint.path}: {error}") from None
    if template is not None:
        assets.files["chat_template.jinja"] = template.encode()
    generation = _generation_config(checkpoint, vocab_size, strict=content is not None, notes=assets.notes)
    assets.files["generation_config.json"] = compact(generation)
    return assets


def kept_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What running needs of a tokenizer_config.json."""
    kept = {key: _token_text(settings.get(key)) for key in _TOKEN_KEYS}
    kept |= {key: settings.get(key) for key in _TOKENIZER_FLAGS if isinstance(settings.get(key), bool)}
    return {key: value for key, value in kept.items() if value is not None}


def check_tokenizer(content: bytes, where: str, vocab_size: int) -> None:
    """Raises CorruptError for a tokenizer.json whose ids or merges leave its vocabulary or the model's."""
    tokenizer = parse_json(content, where, max_values=MAX_TOKENIZER_VALUES)
    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    if not isinstance(model, dict):
        raise CorruptError(f"{where}: model: missing; this is not a tokenizer.json")
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # unigram: [token, score], the id is the place
        ids: dict[str, Any] = {entry[0]: number for number, entry in enumerate(vocab) if _is_scored(entry)}
        if len(vocab) != sum(map(_is_scored, vocab)):
            raise CorruptError(f"{where}: model.vocab: entries of a token and its score are needed")
        _check_id(where, "model.vocab", "the last token", len(vocab) - 1, vocab_size)
    elif isinstance(vocab, dict):
        ids = vocab
    else:
        raise CorruptError(f"{where}: model.vocab: missing")
    for token, number in ids.items():
        _check_id(where, "model.vocab", token, number, vocab_size)
    added = tokenizer.get("added_tokens") or []
    for token in added if isinstance(added, list) else [added]:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise CorruptError(
                f"{where}: added_tokens: {str(token)[:80]}; an object with content and id is needed"
            )
        _check_id(where, "added_tokens", token["content"], token.get("id"), vocab_size)
    _check_merges(where, model, ids)


def _check_id(where: str, key: str, token: str, number: object, vocab_size: int) -> None:
    if type(number) is not int or not 0 <= number < vocab_size:
        raise CorruptError(
            f"{where}: {key}: token {token[:80]!r} has id {str(number)[:40]}; "
            f"the model's vocabulary has ids from 0 to {vocab_size - 1}"
        )


def _check_merges(where: str, model: dict[str, Any], ids: dict[str, Any]) -> None:
    merges = model.get("merges") or []
    if not isinstance(merges, list):
        raise CorruptError(f"{where}: model.merges: a list is needed")
    prefix = len(str(model.get("continuing_subword_prefix") or ""))  # dropped from the second part of a merge
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise CorruptError(
                f"{where}: model.merges[{number}]: {str(merge)[:80]!r} is not a pair of tokens"
            )
        for token in (pair[0], pair[1], pair[0] + pair[1][prefix:]):
            if token not in ids:
                raise CorruptError(
                    f"{where}: model.merges[{number}]: {str(merge)[:80]!r} needs the token {token[:80]!r}, "
                    "which the vocabulary lacks"
                )


def _is_scored(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)


def read_settings(source: Source, name: str) -> dict[str, Any]:
    content, where = source.asset(name, _MAX_SETTINGS_BYTES), _place(source.path, name)
    return {} if content is None else parse_json_object(content, where, max_values=1 << 20)


def chat_template(source: Source, settings: dict[str, Any]) -> str | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json; of several, the default."""
    content = source.asset("chat_template.jinja", _MAX_TEMPLATE_BYTES)
    where = _place(source.path, "tokenizer_config.json" if content is None else "chat_template.jinja")
    template: Any
    if content is not None:
        template = _text(content, where)
    else:
        template = read_settings(source, "chat_template.json").get(
            "chat_template", settings.get("chat_template")
        )
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is None or template == "":
        return None
    if not isinstance(template, str) or len(template.encode(errors="replace")) > _MAX_TEMPLATE_BYTES:
        raise CorruptError(f"{where}: chat_template: text of at most {_MAX_TEMPLATE_BYTES} bytes is needed")
    try:
        template.encode()
    except UnicodeEncodeError as error:
        raise CorruptError(
            f"{where}: chat_template: character {error.start} is half of a surrogate pair"
        ) from None
    return template


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptError(f"{where}: byte {error.start}: not UTF-8") from None


def _place(path: Path, name: str) -> str:
    return str(path / name)


def _token_text(token: object) -> str | None:
    """A special token of tokenizer_config.json: text, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _generation_config(
    checkpoint: Checkpoint, vocab_size: int, *, strict: bool, notes: list[str]
) -> dict[str, Any]:
    """Sampling defaults and special ids; ids that generation_config.json lacks come from config.json."""
    generation = read_settings(checkpoint, "generation_config.json")
    # Nobody chose these: they may be what transformers' class of this model says by default.
    strict = strict and generation.get("_from_model_config") is not True
    result = {
        key: generation[key] for key in _GENERATION_KEYS if _is_default(key, generation.get(key), notes)
    }
    for key in _ID_KEYS:
        name = "generation_config.json" if generation.get(key) is not None else "config.json"
        value = generation.get(key, None)
        value = checkpoint.config.get(key) if value is None else value
        ids = value if isinstance(value, list) else [] if value is None else [value]
        valid = [number for number in ids if type(number) is int and 0 <= number < vocab_size]
        if valid != ids:
            problem = f"{name}: {key}: {str(value)[:80]}; ids from 0 to {vocab_size - 1} are allowed"
            if strict and key != "pad_token_id":  # padding is never used, and -1 is common
                raise CorruptError(f"{checkpoint.path}/{problem}")
            notes.append(f"{problem}; left out")
        if valid:
            result[key] = valid if key == "eos_token_id" else valid[0]
    return result


def _is_default(key: str, value: object, notes: list[str]) -> bool:
    """Whether a sampling default can be kept; the model is sound without it."""
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        return False
    try:
        defaults_from({key: value}, "generation_config.json")
    except CorruptError as error:
        notes.append(f"{error}; left out")
        return False
    return True


def compact(value: object) -> bytes:
    """The bytes of a JSON asset."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
