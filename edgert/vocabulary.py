"""What an adapter says of text: the tokens that it brings, its chat template, and what ends an answer."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from edgert.errors import CorruptError, InvalidArgumentError

_MAX_ID = 1 << 31
_MAX_TOKENS = 1 << 16
_MAX_TOKEN_CHARACTERS = 1024
_MAX_TEMPLATE_BYTES = 256 << 10
# How GGUF files fill a vocabulary up to the rows of its matrices.
_FILLER = re.compile(r"\[PAD(\d{1,10})\]")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """As the `tokenizers` library has it."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True


_FLAGS = [one.name for one in fields(AddedToken) if one.type in (bool, "bool")]


def added_token(value: object, where: str) -> AddedToken:
    """From an object of a tokenizer.json's `added_tokens`. Raises CorruptError."""
    number = value.get("id") if isinstance(value, Mapping) else None
    content = value.get("content") if isinstance(value, Mapping) else None
    if type(number) is not int or not 0 <= number < _MAX_ID or not isinstance(content, str) or not content:
        raise CorruptError(f"{where}: {str(value)[:80]}; a token's content and id are needed")
    if len(content) > _MAX_TOKEN_CHARACTERS:
        raise CorruptError(
            f"{where}: token {number} has {len(content)} characters, allowed are {_MAX_TOKEN_CHARACTERS}"
        )
    assert isinstance(value, Mapping)
    flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
    return AddedToken(number, content, **flags)


@dataclass(frozen=True, slots=True)
class AdapterVocabulary:
    """`rows` more than the base's have the embedding and the head; `tokens` are those that the base's tokenizer lacks, by
    ascending id. What is None or empty is as the base has it: the chat template, the tokens that begin and end a text, and the
    ids that end an answer (`eos_token` does so besides the base's, `eos_token_ids` in their place)."""

    rows: int = 0
    tokens: tuple[AddedToken, ...] = ()
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    def __bool__(self) -> bool:
        return self != _NONE

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, (), 0)}

    @classmethod
    def of(cls, value: object, where: str) -> Self:
        """What as_json() gave. Raises CorruptError."""
        if not isinstance(value, dict) or value.keys() - {one.name for one in fields(cls)}:
            raise CorruptError(
                f"{where}: found {str(value)[:80]}, allowed are {', '.join(f.name for f in fields(cls))}"
            )
        rows, tokens, ends = value.get("rows", 0), value.get("tokens", []), value.get("eos_token_ids", [])
        if type(rows) is not int or not 0 <= rows < _MAX_ID:
            raise CorruptError(f"{where}: rows: found {str(rows)[:40]}, allowed are whole numbers from 0")
        if not isinstance(tokens, list) or not isinstance(ends, list):
            raise CorruptError(f"{where}: tokens and eos_token_ids: lists are needed")
        if not all(type(one) is int for one in ends):
            raise CorruptError(f"{where}: eos_token_ids: found {str(ends)[:80]}, allowed are token ids")
        for name, most in (("chat_template", _MAX_TEMPLATE_BYTES), ("bos_token", 1024), ("eos_token", 1024)):
            text = value.get(name)
            if text is not None and (not isinstance(text, str) or len(text) > most):
                raise CorruptError(f"{where}: {name}: text of at most {most} characters is needed")
        return cls(
            rows,
            in_order([added_token(one, f"{where}: tokens") for one in tokens], where),
            value.get("chat_template"),
            value.get("bos_token"),
            value.get("eos_token"),
            tuple(ends),
        )

    def check(self, vocab_size: int, where: str) -> None:
        """Raises CorruptError for ids that have no row."""
        end = vocab_size + self.rows
        for token in self.tokens:
            if token.id >= end:
                raise CorruptError(
                    f"{where}: token {token.content[:80]!r} has id {token.id}; its vocabulary has ids from 0 to {end - 1}"
                )
        for number in self.eos_token_ids:
            if not 0 <= number < end:
                raise CorruptError(
                    f"{where}: eos_token_id: found {number}, allowed are ids from 0 to {end - 1}"
                )


_NONE = AdapterVocabulary()


def in_order(tokens: Iterable[AddedToken], where: str) -> tuple[AddedToken, ...]:
    """By ascending id. Raises CorruptError where an id or a token stands twice, and for too many."""
    ordered = tuple(sorted(tokens, key=lambda token: token.id))
    if len(ordered) > _MAX_TOKENS:
        raise CorruptError(f"{where}: {len(ordered)} added tokens, allowed are {_MAX_TOKENS}")
    for one, other in itertools.pairwise(ordered):
        if one.id == other.id:
            raise CorruptError(
                f"{where}: tokens {one.content[:80]!r} and {other.content[:80]!r} have one id, {one.id}"
            )
    if len({token.content for token in ordered}) != len(ordered):
        raise CorruptError(f"{where}: a token stands twice")
    return ordered


def together(brought: Mapping[str, AdapterVocabulary]) -> AdapterVocabulary:
    """Of adapters that run at once, by name, in the order in which they add: tokens of all, the rest of the last that has it.

    Raises InvalidArgumentError where a token or an id of one is another's of the other, and where the numbers of rows differ.
    """
    rows, of_rows = 0, ""
    by_id: dict[int, tuple[AddedToken, str]] = {}
    by_content: dict[str, tuple[AddedToken, str]] = {}
    rest: dict[str, Any] = {}
    for name, one in brought.items():
        if rows and one.rows and rows != one.rows:
            raise InvalidArgumentError(
                f"adapters {of_rows} and {name}: one has a vocabulary of {rows} more rows than the base, the other of {one.rows}: "
                "they do not run together"
            )
        if one.rows:
            rows, of_rows = one.rows, name
        for token in one.tokens:
            for known, other in (
                by_id.setdefault(token.id, (token, name)),
                by_content.setdefault(token.content, (token, name)),
            ):
                if (known.id, known.content) != (token.id, token.content):
                    raise InvalidArgumentError(
                        f"adapters {other} and {name}: {known.content[:80]!r} is token {known.id} of one, {token.content[:80]!r} "
                        f"token {token.id} of the other: they do not run together"
                    )
        told = {
            key: getattr(one, key) for key in ("chat_template", "bos_token", "eos_token", "eos_token_ids")
        }
        rest |= {key: value for key, value in told.items() if value}
    tokens = tuple(sorted((token for token, _ in by_id.values()), key=lambda token: token.id))
    return AdapterVocabulary(rows, tokens, **rest)


def ids_of(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a parsed tokenizer.json and its id."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, list):  # unigram: [token, score], the id is the place
        ids = {entry[0]: number for number, entry in enumerate(vocab)}
    else:
        ids = dict(vocab or {})
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}


def is_free(there: str | None, token: AddedToken) -> bool:
    """Whether an added token may have its number in a vocabulary that has `there` for it: nothing, the same (which is then found in
    texts before all else), or what only fills its place."""
    if there is None or there == token.content:
        return True
    match = _FILLER.fullmatch(there)
    return match is not None and int(match[1]) == token.id


def with_tokens(tokenizer_json: bytes, tokens: Iterable[AddedToken]) -> bytes:
    """A tokenizer.json that knows these tokens too. Raises InvalidArgumentError where it has others in their place."""
    tokenizer = json.loads(tokenizer_json)
    ids = ids_of(tokenizer)
    names = {number: content for content, number in ids.items()}
    vocab = tokenizer["model"]["vocab"]
    added = tokenizer.setdefault("added_tokens", [])
    for token in tokens:
        taken = names.get(token.id)
        if ids.get(token.content, token.id) != token.id or not is_free(taken, token):
            raise InvalidArgumentError(
                f"token {token.content[:80]!r} is number {token.id} of the adapter; the base has {str(taken)[:80]!r} there, and "
                f"{ids.get(token.content, 'no number')} for it"
            )
        added[:] = [one for one in added if one["id"] != token.id]
        if isinstance(vocab, dict):  # so that its number is this one, whatever stands before it
            vocab.pop(taken, None)
            vocab[token.content] = token.id
        added.append(asdict(token))
    added.sort(key=lambda one: one["id"])
    return json.dumps(tokenizer, ensure_ascii=False).encode()
