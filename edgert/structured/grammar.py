"""Grammars compiled for a vocabulary, and the masks that they give. The work is llguidance's (extra `serve`)."""

import array
import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgert.allocator import return_free_memory
from edgert.errors import EdgertError, InvalidArgumentError, UnsupportedError
from edgert.structured.numbers import Digits, NumberGuard
from edgert.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from edgert.prompts import Prompts

_KEPT_GRAMMARS = 16  # a vocabulary; of about 100 KB
_KEPT_CHARACTERS = 1 << 20
_STACK_BYTES = 32 << 20  # the compiler recurses: limits.MAX_TOTAL_DEPTH levels, of up to 10 KB
# Tokens whose masks are looked up where they all fit: short texts without what ends or escapes JSON's strings. Hardly a
# token is longer, and strings of bounded length stay cheap until so much of them is left; a second slice is memory.
_SLICE = r'[^"\\\x00-\x1F\x7F]{1,16}'
_WHERE = "the reply's form"
_LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,  # about 20 ms
    "step_lexer_fuel": 200_000,  # about 15 ms a token
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # of about 1 KB
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class _NoPanic:
    """A panic of the library, which is no Exception, as an error of ours."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None and kind.__name__ == "PanicException":
            raise UnsupportedError(f"{self._where}: {_shortened(str(error))}") from None


class GrammarConstraint:
    """A Constraint: one reply that follows a grammar."""

    _no_panic = _NoPanic(_WHERE)

    def __init__(self, matcher: "LLMatcher", words: int, numbers: NumberGuard | None) -> None:
        self._matcher = matcher
        self._numbers = numbers
        mask = array.array("I", bytes(4 * words))
        self._mask = memoryview(mask).cast("B")  # filled anew by each call
        self._mask_at = mask.buffer_info()[0]

    def mask(self) -> memoryview:
        with self._no_panic:
            self._matcher.unsafe_compute_mask_ptr(self._mask_at, len(self._mask))
        if self._matcher.is_error():
            self._raise_error()
        return self._mask if self._numbers is None else self._numbers.narrowed(self._mask)

    def accept(self, token: int) -> bool:
        with self._no_panic:
            good = self._matcher.consume_token(token)
        if not good:
            self._raise_error()
        if self._numbers is not None:
            self._numbers.accept(token)
        return not self._matcher.is_stopped()

    def _raise_error(self) -> None:
        raise UnsupportedError(f"{_WHERE}: {_shortened(self._matcher.get_error())}")


class Vocabulary:
    """A model's tokens as grammars see them, and the grammars compiled for them lately. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: frozenset[int]) -> None:
        """Takes a moment and memory in proportion to the vocabulary. Raises UnsupportedError without llguidance, and for
        a model without an end-of-sequence token."""
        if not end_tokens:
            raise UnsupportedError(
                "a reply in a form needs an end-of-sequence token, and the model names none"
            )
        self._library = _llguidance()
        encoder = _Encoder(tokenizer, vocab_size, min(end_tokens))
        wrapper = self._library.TokenizerWrapper(encoder)
        self._tokens = self._library.LLTokenizer(wrapper, eos_token=sorted(end_tokens), slices=[_SLICE])
        self._digits = Digits(encoder.tokens, {*encoder.special_token_ids, *end_tokens})
        wrapper.tokens = encoder.tokens = []  # the library has them now
        return_free_memory()
        self._words = (vocab_size + 31) // 32
        self._limits = self._library.LLParserLimits(**_LIMITS)
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, lark: str, where: str, *, json: bool = False) -> GrammarConstraint:
        """A new reply's constraint to a grammar in the library's Lark dialect; of `json` it bounds the digits of numbers. Raises InvalidArgumentError naming `where` if
        it is malformed or nothing can follow it, UnsupportedError if it is too much work."""
        with self._lock:
            matcher = self._kept.get(lark)
        if matcher is None:
            with _compiling:
                matcher = self._compiled(lark, where)
        with self._lock:
            self._keep(lark, matcher)
            numbers = NumberGuard(self._digits) if json else None
            return GrammarConstraint(matcher.deep_copy(), self._words, numbers)

    def _keep(self, lark: str, matcher: "LLMatcher") -> None:
        self._kept[lark] = matcher
        self._kept.move_to_end(lark)
        while len(self._kept) > _KEPT_GRAMMARS or sum(map(len, self._kept)) > _KEPT_CHARACTERS:
            self._kept.popitem(last=False)

    def _compiled(self, lark: str, where: str) -> "LLMatcher":
        def compile_it() -> None:
            with _NoPanic(where):
                matcher = self._library.LLMatcher(
                    self._tokens,
                    self._library.LLMatcher.grammar_from_lark(lark),
                    limits=self._limits,
                    log_level=0,
                )
                compiled = not matcher.is_error()
                if compiled:
                    matcher.compute_bitmask()  # whether anything may come first
                result.append((matcher, compiled))

        result: list[tuple[LLMatcher, bool]] = []
        _with_deep_stack(compile_it)
        matcher, compiled = result[0]
        if not matcher.is_error():
            return matcher
        message = _shortened(matcher.get_error())
        kind = _kind_of(message)
        if compiled and kind is InvalidArgumentError:
            message = "no text has this form"
        raise kind(f"{where}: {message}")


class _Encoder:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token: int) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special_tokens()
        names = {number: name for name, number in special.items()}
        self.eos_token_id = end_token
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(names)
        self.tokens = [
            names.get(number, "").encode() if token is None else token
            for number, token in enumerate(tokenizer.token_bytes())
        ]
        self.tokens += [b""] * (vocab_size - len(self.tokens))  # a model's logits may be padded
        self._special = sorted(special, key=len, reverse=True)

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens of a text that a grammar forces; what reads like a special token is text all the same."""
        if isinstance(text, bytes):
            text = text.decode()
        for name in self._special:
            if name in text:
                before, after = text.split(name, 1)
                return [*self(before + name[:1]), *self(name[1:] + after)]
        return self._tokenizer.encode(text, add_special_tokens=False)


_vocabularies: "weakref.WeakKeyDictionary[Prompts, Vocabulary]" = weakref.WeakKeyDictionary()
_making = threading.Lock()
_compiling = threading.BoundedSemaphore(2)  # of what takes long there are never many at once


def vocabulary_of(texts: "Prompts") -> Vocabulary:
    """That of a loaded model, or of one with adapters, made when it is first asked for. Raises NotFoundError where it has no
    tokenizer."""
    with _making:
        found = _vocabularies.get(texts)
        if found is None:
            found = Vocabulary(texts.tokenizer, texts.vocab_size, texts.eos_token_ids)
            _vocabularies[texts] = found
        return found


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UnsupportedError("constrained decoding needs llguidance: pip install 'edgert[serve]'") from None
    return llguidance


def _with_deep_stack(work: Callable[[], None]) -> None:
    """Run `work` in a thread of its own, and raise what it raises."""

    def caught() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    errors: list[BaseException] = []
    with _stack_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=caught, name="edgert-grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]


_stack_lock = threading.Lock()


def _kind_of(message: str) -> type[EdgertError]:
    """The library has one kind of error; these are of size, or of what it does not do."""
    words = (
        "too large",
        "too big",
        "too many",
        "too deeply",
        "fuel",
        "limit",
        "Unimplemented",
        "Unknown format",
    )
    return UnsupportedError if any(word in message for word in words) else InvalidArgumentError


def _shortened(message: str) -> str:
    """The first line, without places in a grammar that is not the user's."""
    _, compiling, reason = message.partition("failed to compile JSON schema: ")
    lines = (reason if compiling else message).replace("<non-verbose/>", "").strip().splitlines()
    return json.dumps("".join(lines[:1])[:300], ensure_ascii=False)[1:-1].replace('\\"', '"')


def regex_literal(pattern: str) -> str:
    """A regular expression as a terminal of Lark."""
    return f"/{_llguidance().regex_to_lark(pattern, 'd')}/"
