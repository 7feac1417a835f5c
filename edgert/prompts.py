"""From a prompt to its tokens, and to the reply that answers it."""

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgert.errors import (
    ContextLengthError,
    EdgertError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)
from edgert.generation import Reply
from edgert.sampling import Sampling
from edgert.tokenizer import Tokenizer
from edgert.vocabulary import AdapterVocabulary

Prompt = str | Sequence[int]

_LONG_TOKEN = 32  # characters; few texts have so many a token
_PRIMING_TOKENS = 32  # of the prompt, so that text goes on where it ended


class Prompts:
    """What a model does with prompts, whichever engine runs it, and what it does with those of sequences whose adapters bring
    tokens: see Model.prompts()."""

    path: Path
    context: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    _tokenizer: Tokenizer | None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises NotFoundError where the bundle has none; token ids still work."""
        if self._tokenizer is None:
            raise NotFoundError(
                f"{self.path}: the bundle has no tokenizer.json: pass token ids instead of text"
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def reply(self, prompt: Sequence[int], sampling: Sampling, *, primed: bool) -> Reply:
        """The reply to `prompt`, to be filled; `primed`: its text goes on from the prompt's.

        Raises InvalidArgumentError for a prompt that leaves no room, UnsupportedError for stop strings without tokenizer.
        """
        limit = self.context - len(prompt)
        if limit <= 0:
            raise ContextLengthError(self._too_long(str(len(prompt))))
        if sampling.max_tokens is not None:
            limit = min(limit, sampling.max_tokens)
        if sampling.stop and self._tokenizer is None:
            raise UnsupportedError(f"{self.path}: stop strings need a tokenizer, and the bundle has none")
        detokenizer = self._tokenizer.stream() if self._tokenizer is not None else None
        if primed and detokenizer is not None:
            for token in prompt[-_PRIMING_TOKENS:]:
                detokenizer.push(token)
        return Reply(sampling, detokenizer, limit, frozenset() if sampling.ignore_eos else self.eos_token_ids)

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """What generate() runs for `prompt`; raises its errors."""
        if not isinstance(prompt, str):
            return self.checked(prompt)
        tokens = self.encoded(prompt)
        if tokens:
            return tokens
        bos = self.tokenizer.bos_token_id
        if bos is None:
            raise InvalidArgumentError(
                "prompt: it is empty, and the model has no beginning-of-sequence token"
            )
        return [bos]

    def encoded(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a prompt, which may be too long by little; one that is so by far is refused by its beginning, at
        bounded cost. Raises ContextLengthError."""
        enough = _LONG_TOKEN * self.context
        if len(text) > enough:
            found = len(self.tokenizer.encode(text[:enough], add_special_tokens=False))
            if found > self.context:
                raise ContextLengthError(self._too_long(f"more than {found}"))
        tokens = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return self.checked(tokens) if tokens else []

    def _too_long(self, found: str) -> str:
        return (
            f"prompt: found {found} tokens, allowed are {self.context - 1}: the context holds {self.context} with the answer "
            "(see context=, --context)"
        )

    def checked(self, tokens: Iterable[int]) -> list[int]:
        """`tokens` as a list; raises InvalidArgumentError where it is empty or holds what is no token id."""
        if not isinstance(tokens, Iterable) or isinstance(tokens, bytes | bytearray):
            raise InvalidArgumentError(f"prompt: found {type(tokens).__name__}, allowed is text or token ids")
        ids = []
        for index, token in enumerate(tokens):
            number = _whole(token)
            if number is None or not 0 <= number < self.vocab_size:
                raise InvalidArgumentError(
                    f"token ids: found {token!r:.60} at {index}, allowed are 0 to {self.vocab_size - 1}"
                )
            ids.append(number)
        if not ids:
            raise InvalidArgumentError("token ids: found none, at least one is needed")
        return ids


class AdaptedPrompts(Prompts):
    """Those of sequences with adapters that say something of text. `extended`: the tokenizer with their tokens, and the base's
    template."""

    def __init__(self, base: Prompts, said: AdapterVocabulary, tokenizer: Tokenizer | None) -> None:
        self.path = base.path
        self.context = base.context
        self.vocab_size = base.vocab_size + said.rows
        self.said = said
        self.extended = tokenizer
        self._tokenizer = None
        ends = base.eos_token_ids
        if tokenizer is not None:
            try:
                self._tokenizer = tokenizer.renamed(said.bos_token, said.eos_token, said.chat_template)
            except EdgertError as error:
                raise type(error)(f"an adapter's {error}") from None
            own = tokenizer.token_id(said.eos_token)
            ends = ends if own is None else ends | {own}
        self.eos_token_ids = frozenset(said.eos_token_ids) or ends


def _whole(value: object) -> int | None:
    """`value` as an int; None for what is no whole number, such as a row of a 2-D array."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
