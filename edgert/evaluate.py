"""Perplexity of a model on a text, and its distance from a reference model.

The text is covered by windows of `context` tokens that begin every `stride` tokens. A token is scored once: in the first
window that holds it, given all tokens before it in this window; the text's very first token has nothing before it and is
not scored. A stride of the whole context is fastest; a smaller one gives every token more to go by.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgert.errors import InvalidArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgert.model import Model
    from edgert.tokenizer import Tokenizer

_PART_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class Evaluation:
    """`tokens` were scored. With a reference: kl_mean (nats, reference to model), top1_agreement (share of tokens) and its own
    perplexity."""

    perplexity: float
    tokens: int
    context: int
    stride: int
    kl_mean: float | None = None
    top1_agreement: float | None = None
    reference_perplexity: float | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """Sums over scored tokens: negative log-likelihoods, divergences in nats, and how often both rank the same token first."""

    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def __add__(self, other: "Scored") -> "Scored":
        return Scored(
            self.tokens + other.tokens,
            self.loss + other.loss,
            self.reference_loss + other.reference_loss,
            self.divergence + other.divergence,
            self.agreed + other.agreed,
        )


class About(Protocol):
    """What is to be known of a model."""

    @property
    def name(self) -> str: ...
    @property
    def context(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def evaluate(
    model: "Model",
    tokens: Sequence[int],
    *,
    reference: "Model | None" = None,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score `tokens`; `context` defaults to the model's, `stride` to half of it. progress(scored, total).

    Raises InvalidArgumentError for fewer than two tokens, a window or stride out of range, and a reference of another
    vocabulary or a shorter context.
    """

    def scores(windows: Iterable[tuple[list[int], int]]) -> Iterator[Scored]:
        for window, first in windows:
            yield from score(model, window, first, reference)

    return evaluate_windows(
        model, tokens, scores, reference=reference, context=context, stride=stride, progress=progress
    )


def evaluate_windows(
    model: About,
    tokens: Sequence[int],
    scores: Callable[[Iterable[tuple[list[int], int]]], Iterable[Scored]],
    *,
    reference: About | None,
    context: int | None,
    stride: int | None,
    progress: Callable[[int, int], None] | None,
) -> Evaluation:
    """evaluate() of models that may be elsewhere: `scores` gives what score() does, window after window."""
    context = context or model.context
    stride = stride or max(1, context // 2)
    _check(model, tokens, reference, context, stride)
    sums = Scored()
    for scored in scores(_windows(tokens, context, stride)):
        sums += scored
        if progress is not None:
            progress(sums.tokens, len(tokens) - 1)
    compared = reference is not None
    return Evaluation(
        perplexity=float(np.exp(sums.loss / sums.tokens)),
        tokens=sums.tokens,
        context=context,
        stride=stride,
        kl_mean=max(0.0, sums.divergence / sums.tokens) if compared else None,
        top1_agreement=sums.agreed / sums.tokens if compared else None,
        reference_perplexity=float(np.exp(sums.reference_loss / sums.tokens)) if compared else None,
    )


def score(
    model: "Model", window: list[int], first: int, reference: "Model | None" = None
) -> Iterator[Scored]:
    """Score the tokens of `window` from the index `first` on, some at a time. Raises InvalidArgumentError where adapters of one
    bring tokens that the reference lacks."""
    if reference is not None and reference.prompts().vocab_size != model.prompts().vocab_size:
        raise InvalidArgumentError("reference: its vocabulary is not that of the model with its adapters")
    others = None if reference is None else _logits(reference, window, first)
    for targets, logits in _logits(model, window, first):
        yield _scored(targets, logits, None if others is None else next(others)[1])


def encode_text(model: "Model", text: str, limit: int | None = None) -> Sequence[int]:
    """The first `limit` tokens of `text`, as the model's tokenizer has them, with the adapters that are on."""
    return encode(model.prompts().tokenizer, text, limit)


def encode(tokenizer: "Tokenizer", text: str, limit: int | None = None) -> Sequence[int]:
    """The same; a long text is encoded in parts that end with a line, which bounds the memory."""
    tokens: array[int] = array("i")
    begin = 0
    while begin < len(text) and (limit is None or len(tokens) < limit):
        end = begin + 2 * _PART_CHARACTERS
        if end < len(text):
            end = text.find("\n", begin + _PART_CHARACTERS, end) + 1 or end
        tokens.extend(tokenizer.encode(text[begin:end], add_special_tokens=begin == 0))
        begin = end
    return tokens[:limit]


def _check(model: About, tokens: Sequence[int], reference: About | None, context: int, stride: int) -> None:
    if len(tokens) < 2:
        raise InvalidArgumentError(f"text: found {len(tokens)} tokens, at least 2 are needed")
    if not 2 <= context <= model.context:
        raise InvalidArgumentError(f"context: found {context}, allowed are 2 to {model.context}")
    if not 1 <= stride < context:
        raise InvalidArgumentError(f"stride: found {stride}, allowed are 1 to {context - 1}")
    if reference is not None and reference.vocab_size != model.vocab_size:
        raise InvalidArgumentError(
            f"reference: its vocabulary has {reference.vocab_size} tokens, that of {model.name} {model.vocab_size}"
        )
    if reference is not None and reference.context < context:
        raise InvalidArgumentError(
            f"reference: its context holds {reference.context} tokens, {context} are needed"
        )


def _windows(tokens: Sequence[int], context: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Yield a window and the index in it of the first token to score."""
    scored = 1
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        yield list(tokens[begin:end]), scored - begin
        scored = end
        if end == len(tokens):
            return


def _logits(
    model: "Model", window: list[int], first: int
) -> Iterator[tuple[list[int], "NDArray[np.float32]"]]:
    """Yield some tokens of window[first:] and the logits that predict them, float32 [n, vocab_size]."""
    for logits in model.logits_by_parts(window[:-1], first=first - 1):
        yield window[first : first + len(logits)], logits
        first += len(logits)


def _scored(targets: list[int], logits: "NDArray[Any]", reference: "NDArray[Any] | None") -> Scored:
    logprobs = log_softmax(logits)
    places = np.arange(len(targets)), targets
    loss = -float(logprobs[places].sum())
    if reference is None:
        return Scored(len(targets), loss)
    expected = log_softmax(reference)
    return Scored(
        len(targets),
        loss,
        -float(expected[places].sum()),
        float((np.exp(expected) * (expected - logprobs)).sum()),
        int((logits.argmax(axis=1) == reference.argmax(axis=1)).sum()),
    )


def log_softmax(logits: "NDArray[Any]") -> "NDArray[np.float64]":
    """Of each row, in double precision."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
