"""The tokenizer of a bundle: text to tokens and back, and its chat template.

The `tokenizers` library does the work; this module bounds what a hostile tokenizer.json can do, accounts for the
memory that the library takes, and streams text (edgert.detokenizer). The library cannot run code from the file.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import tokenizers

from edgert.allocator import return_free_memory
from edgert.chat import ChatTemplate
from edgert.detokenizer import Detokenizer, bytes_of_tokens, plan
from edgert.errors import CorruptError, EdgertError, InvalidArgumentError, UnsupportedError
from edgert.vocabulary import AddedToken, with_tokens

if TYPE_CHECKING:
    from edgert.bundle import Bundle

_MAX_FILE_BYTES = 128 << 20
_MAX_GROWTH = 64  # how many times longer normalisation may make a text
_PROBE_CHARACTERS = "aA1 \n!é"
_MAX_WORD = 1000  # characters; a WordPiece model's work is the cube of this
_PROBE_LENGTH = 700  # a pattern of cubic cost or worse runs into the library's own limit


class Tokenizer:
    """Text to token ids and back.

    Attributes: vocab_size; bos_token_id, None without one; memory_bytes, an upper estimate of what it occupies,
    the same on every run. Safe to use from several threads.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        *,
        decodes: bool = True,
    ) -> None:
        """Read a tokenizer.json; `config` is the content of tokenizer_config.json. One that never `decodes`, such as an
        encoder's, may have a decoder that cannot be streamed.

        Raises CorruptError for a file that is not a tokenizer and UnsupportedError for one whose decoder cannot be
        streamed or whose patterns take unbounded work.
        """
        if len(tokenizer_json) > _MAX_FILE_BYTES:
            raise CorruptError(
                f"tokenizer.json: found {len(tokenizer_json)} bytes, allowed are {_MAX_FILE_BYTES}"
            )
        config = config or {}
        try:
            self._library = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except BaseException as error:  # noqa: BLE001 - a panic is no Exception
            _rethrow(error, CorruptError, "tokenizer.json: not a tokenizer")
        self._library.no_padding()
        self._library.no_truncation()
        _check_growth(_state(self._library.normalizer))
        if getattr(self._library.model, "max_input_chars_per_word", 0) > _MAX_WORD:
            raise UnsupportedError(
                f"tokenizer.json: model: max_input_chars_per_word: allowed are 0 to {_MAX_WORD}"
            )
        self._steps = plan(_state(self._library.decoder)) if decodes else None
        self._bytes_of = bytes_of_tokens(self._steps or ())
        added = self._library.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self.vocab_size: int = self._library.get_vocab_size()
        self.memory_bytes = _memory_bytes(tokenizer_json, self.vocab_size)
        self.charge: object = None  # of a budget, for as long as this lives
        self._probe()
        self._name(_content(config.get("bos_token")), _content(config.get("eos_token")), chat_template)
        return_free_memory()

    def _name(self, bos: str | None, eos: str | None, chat_template: str | None) -> None:
        self._named = bos, eos, chat_template
        self.bos_token_id = self.token_id(bos)
        self.eos_token_id = self.token_id(eos)
        self.chat_template = (
            None if chat_template is None else ChatTemplate(chat_template, bos_token=bos, eos_token=eos)
        )

    def renamed(self, bos: str | None, eos: str | None, chat_template: str | None) -> "Tokenizer":
        """The same tokens with another chat template, and other ones that begin and end a text; None: as they are. Raises the
        errors of ChatTemplate."""
        one = copy.copy(self)
        given = (bos, eos, chat_template)
        one._name(*(own if new is None else new for own, new in zip(self._named, given, strict=True)))
        return one

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`; `add_special_tokens` adds those that the tokenizer puts around a text.

        Raises InvalidArgumentError where `text` is not valid Unicode (lone surrogates).
        """
        if not isinstance(text, str):
            raise InvalidArgumentError(f"text: found {type(text).__name__}, allowed is str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(f"text: character {error.start} is a lone surrogate") from None
        try:
            encoding = self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except BaseException as error:  # noqa: BLE001 - a panic is no Exception
            _rethrow(error, UnsupportedError, "tokenizer.json: the tokenizer failed on this text")
        ids: list[int] = encoding.ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, without special tokens. Ids without a token have no text."""
        stream = self.stream()
        return "".join([*map(stream.push, tokens), stream.finish()])

    def stream(self) -> Detokenizer:
        """Start a stream of text: push(token) -> text, finish() -> text. Raises UnsupportedError where it only encodes."""
        if self._steps is None:
            raise UnsupportedError("the tokenizer of an encoder gives no text back")
        return Detokenizer(self._text_token, self._steps)

    def bytes_of(self, token: int) -> bytes:
        """Return what `token` adds in the middle of a text, which may be part of a character; a special token's name."""
        string: str | None = self._library.id_to_token(token) if 0 <= token < 1 << 32 else None
        if string is None or string in self._special or self._steps is None:
            return (string or "").encode()
        return self._bytes_of(string)

    def token_bytes(self) -> list[bytes | None]:
        """By id, what a token adds in the middle of a text; None for special tokens and ids without one. Takes a moment:
        a table of the whole vocabulary. Raises UnsupportedError where it only encodes."""
        if self._steps is None:
            raise UnsupportedError("the tokenizer of an encoder gives no text back")
        last = max(self._library.get_added_tokens_decoder(), default=-1)  # some may stand behind a gap
        strings = map(self._text_token, range(max(self.vocab_size, last + 1)))
        return [None if string is None else self._bytes_of(string) for string in strings]

    def special_tokens(self) -> dict[str, int]:
        """The special tokens, which have no text, and their ids."""
        ids = {token: self.token_id(token) for token in sorted(self._special)}
        return {token: number for token, number in ids.items() if number is not None}

    def token_id(self, token: str | None) -> int | None:
        """Return the id of a token given as it is written in the vocabulary."""
        found: int | None = None if token is None else self._library.token_to_id(token)
        return found

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt for a conversation: messages of `role` and `content`. `variables` reach the template.

        Raises UnsupportedError where the bundle has no chat template.
        """
        if self.chat_template is None:
            raise UnsupportedError("the bundle has no chat template: pass a plain prompt (edgert run --raw)")
        return self.chat_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    def _text_token(self, token: int) -> str | None:
        if not 0 <= token < 1 << 32:
            return None
        string: str | None = self._library.id_to_token(token)
        return None if string in self._special else string

    def _probe(self) -> None:
        """Meet a pathological pattern now rather than in a user's text."""
        self.encode(" ".join(character * _PROBE_LENGTH for character in _PROBE_CHARACTERS))


def tokenizer_of(bundle: "Bundle") -> Tokenizer | None:
    """Raises the errors of Tokenizer, naming the bundle."""
    content = bundle.asset("tokenizer.json")
    if content is None:
        return None
    try:
        return Tokenizer(
            content,
            bundle.json_asset("tokenizer_config.json"),
            bundle.text_asset("chat_template.jinja"),
            decodes=bundle.component is None,
        )
    except EdgertError as error:
        raise type(error)(f"{bundle.path}: {error}") from None


def extended_tokenizer(bundle: "Bundle", tokens: Sequence[AddedToken]) -> Tokenizer:
    """The bundle's with added tokens. Raises InvalidArgumentError where it has others in their place, and the errors of
    tokenizer_of()."""
    content = bundle.asset("tokenizer.json")
    assert content is not None
    made = Tokenizer(
        with_tokens(content, tokens),
        bundle.json_asset("tokenizer_config.json"),
        bundle.text_asset("chat_template.jinja"),
    )
    for token in tokens:
        if made.token_id(token.content) != token.id:
            raise UnsupportedError(
                f"{bundle.path}: added token {token.content[:80]!r} is number {token.id}, which the tokenizer cannot give it"
            )
    return made


def _state(component: Any) -> Any:
    """The JSON of a part of the library's tokenizer; None where there is none."""
    return None if component is None else json.loads(component.__getstate__())


def _check_growth(normalizer: Mapping[str, Any] | None) -> None:
    """Refuse normalisation that multiplies a text, such as ten Replace steps of "a" by "aaaaaaaaaa"."""
    growth, steps = 1, [normalizer] if normalizer else []
    while steps:
        step = steps.pop()
        steps.extend(step.get("normalizers", ()))
        if step["type"] == "Replace":
            growth *= max(1, len(step["content"]) // max(1, len(step["pattern"].get("String", ""))))
        elif step["type"] == "Prepend" and len(step["prepend"]) > _MAX_GROWTH:
            growth = _MAX_GROWTH + 1
        if growth > _MAX_GROWTH:
            raise UnsupportedError(
                f"tokenizer.json: normalizer: makes text more than {_MAX_GROWTH} times longer"
            )


def _memory_bytes(tokenizer_json: bytes, vocab_size: int) -> int:
    """Upper estimate of what the library keeps. Measured: two hash tables whose sizes are powers of two, two strings an
    entry, a table of merges; and what one prompt's encoding takes."""
    strings = tokenizer_json.count(b'"') // 2
    merges = max(0, strings - vocab_size)
    buckets = 1 << (vocab_size * 8 // 7).bit_length()
    return (1 << 19) + buckets * 72 + vocab_size * 176 + merges * 24


def _content(token: object) -> str | None:
    """The text of a token in tokenizer_config.json: a string or {"content": …}."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _rethrow(error: BaseException, kind: type[EdgertError], what: str) -> NoReturn:
    """Raise the library's exception as ours; a panic of its Rust code is a BaseException of its own."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    raise kind(f"{what}: {str(error)[:200]}") from None
