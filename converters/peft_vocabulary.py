"""The text side of a PEFT directory: what its tokenizer's files say that the base's do not."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert.chat import ChatTemplate
from edgert.errors import CorruptError, EdgertError, InvalidArgumentError
from edgert.vocabulary import AdapterVocabulary, AddedToken, added_token, ids_of, in_order, is_free

from .assets import MAX_TOKENIZER_BYTES, MAX_TOKENIZER_VALUES, chat_template, kept_settings, read_settings
from .checkpoint import resolve
from .files import read_small_file
from .strict_json import parse_json_object

if TYPE_CHECKING:
    from edgert.bundle import Bundle


_MOST_COMPARED = 256
_compared_before: dict[tuple[str, str], tuple[AddedToken, ...]] = {}


@dataclass(frozen=True)
class _Directory:
    path: Path

    def asset(self, name: str, max_bytes: int) -> bytes | None:
        if not os.path.lexists(self.path / name):
            return None
        return bytes(read_small_file(resolve(self.path, name), max_bytes))


def read_vocabulary(path: Path, base: "Bundle") -> AdapterVocabulary:
    """What the adapter at `path` says of text that its base does not. Its `rows` are for its weights to say.

    Raises CorruptError for files that are malformed or too large, InvalidArgumentError where tokens of the base have other ids,
    UnsupportedError for a template that cannot be run.
    """
    content = base.asset("tokenizer.json")
    if content is None:
        return AdapterVocabulary()
    directory = _Directory(path)
    settings = read_settings(directory, "tokenizer_config.json")
    of_base = base.json_asset("tokenizer_config.json")
    own = kept_settings(settings)
    template = chat_template(directory, settings)
    if template is not None:
        if template == base.text_asset("chat_template.jinja"):
            template = None
        else:
            try:
                ChatTemplate(template)
            except EdgertError as error:
                raise type(error)(f"{path}: {error}") from None
    named = {
        key: own.get(key) if own.get(key) != of_base.get(key) else None for key in ("bos_token", "eos_token")
    }
    ends = _ends(directory)
    if set(ends) == set(_listed(base.json_asset("generation_config.json").get("eos_token_id"))):
        ends = ()
    return AdapterVocabulary(
        tokens=_new_tokens(directory, settings, content),
        chat_template=template,
        bos_token=named["bos_token"],
        eos_token=named["eos_token"],
        eos_token_ids=ends,
    )


def _ends(directory: _Directory) -> tuple[int, ...]:
    """The ids that end an answer, where somebody has said so."""
    generation = read_settings(directory, "generation_config.json")
    if generation.get("_from_model_config") is True:
        return ()
    ids = _listed(generation.get("eos_token_id"))
    if not all(type(one) is int and 0 <= one < 1 << 31 for one in ids):
        raise CorruptError(
            f"{directory.path / 'generation_config.json'}: eos_token_id: found {str(ids)[:80]}, allowed are token ids"
        )
    return tuple(ids)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _new_tokens(directory: _Directory, settings: Mapping[str, Any], of_base: bytes) -> tuple[AddedToken, ...]:
    content = directory.asset("tokenizer.json", MAX_TOKENIZER_BYTES)
    if content is not None:
        return () if content == of_base else _known(content, of_base, str(directory.path / "tokenizer.json"))
    stated = settings.get("added_tokens_decoder")
    where = str(directory.path / "tokenizer_config.json")
    if isinstance(stated, dict):
        entries = [
            {**value, "id": int(number)}
            for number, value in stated.items()
            if isinstance(value, dict) and number.isascii() and number.isdecimal() and len(number) < 11
        ]
        if len(entries) != len(stated):
            raise CorruptError(f"{where}: added_tokens_decoder: tokens by their ids are needed")
    else:
        where = str(directory.path / "added_tokens.json")
        special, base = _special(directory), ids_of(_parsed(of_base, "tokenizer.json"))
        entries = [
            {"content": content, "id": number, "special": content in special, "normalized": False}
            for content, number in read_settings(directory, "added_tokens.json").items()
            if base.get(content) != number  # it does not say what else they are
        ]
    added = in_order((added_token(entry, where) for entry in entries), where)
    return _lacking(added, _parsed(of_base, "tokenizer.json"), where) if added else ()


def _special(directory: _Directory) -> set[str]:
    """The tokens of a special_tokens_map.json: texts, objects with their content, and lists of them."""
    values = read_settings(directory, "special_tokens_map.json").values()
    listed = [one for value in values for one in _listed(value)]
    texts = [one.get("content") if isinstance(one, dict) else one for one in listed]
    return {text for text in texts if isinstance(text, str)}


def _known(content: bytes, of_base: bytes, where: str) -> tuple[AddedToken, ...]:
    """Adapters that were trained together have one tokenizer, which is compared once."""
    key = _native.xxh64(content), _native.xxh64(of_base)
    found = _compared_before.get(key)
    if found is None:
        if len(_compared_before) >= _MOST_COMPARED:
            _compared_before.clear()
        found = _compared_before[key] = _compared(content, of_base, where)
    return found


def _compared(content: bytes, of_base: bytes, where: str) -> tuple[AddedToken, ...]:
    """Those of a tokenizer.json that another lacks."""
    tokenizer, of = _parsed(content, where), _parsed(of_base, "tokenizer.json")
    base = ids_of(of)
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        good = all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocab)
    else:
        good = isinstance(vocab, dict) and all(type(number) is int for number in vocab.values())
    if not good:
        raise CorruptError(f"{where}: model.vocab: tokens and their ids are needed")
    listed = tokenizer.get("added_tokens") or []
    if not isinstance(listed, list):
        raise CorruptError(f"{where}: added_tokens: a list is needed")
    added = in_order((added_token(one, f"{where}: added_tokens") for one in listed), where)
    ids = ids_of(tokenizer)
    contents = {token.content for token in added}
    for token, number in ids.items():
        if token not in contents and base.get(token) != number:
            there = f"number {base[token]}" if token in base else "not there"
            raise InvalidArgumentError(
                f"{where}: token {token[:80]!r} has the id {number}, in the base's tokenizer it is {there}: an adapter adds tokens to "
                "those of its base, whose ids stay"
            )
    return _lacking(added, of, where)


def _lacking(added: Iterable[AddedToken], of_base: Mapping[str, Any], where: str) -> tuple[AddedToken, ...]:
    """Those that are no added tokens of the base, or not as special there."""
    base = ids_of(of_base)
    names = {number: token for token, number in base.items()}
    known = {(one["id"], one["content"], one.get("special")) for one in of_base.get("added_tokens") or ()}
    new = []
    for token in added:
        if (token.id, token.content, token.special) in known:
            continue
        taken = names.get(token.id)
        if base.get(token.content, token.id) != token.id or not is_free(taken, token):
            raise InvalidArgumentError(
                f"{where}: token {token.content[:80]!r} has the id {token.id}; in the base's tokenizer that is {str(taken)[:80]!r}, and "
                f"the token is number {base.get(token.content)}: an adapter adds tokens to those of its base, whose ids stay"
            )
        new.append(token)
    return tuple(new)


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    return parse_json_object(content, where, max_values=MAX_TOKENIZER_VALUES)
