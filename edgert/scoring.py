"""How likely a model finds a text: a log-probability for every token, with the likeliest in its place."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgert.errors import CancelledError

if TYPE_CHECKING:
    from edgert.adapters import AdapterChoice
    from edgert.model import Model

Scored = tuple[float, list[tuple[int, float]]]


def score(
    model: "Model",
    tokens: Sequence[int],
    top: int = 0,
    *,
    adapter: "AdapterChoice" = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Scored | None]:
    """One (logprob, [(token, logprob), …]) a token given those before it, in nats, with the `top` likeliest, best first; None
    of the first token. `stopped` is asked now and then. Needs numpy.

    Raises CancelledError once `stopped`, InvalidArgumentError for ids outside the vocabulary or more than the context holds.
    """
    import numpy

    from edgert.evaluate import log_softmax

    scored: list[Scored | None] = [None]
    for logits in model.logits_by_parts(tokens[:-1], adapter=adapter) if len(tokens) > 1 else ():
        if stopped():
            raise CancelledError("scoring a prompt was stopped")
        logprobs = log_softmax(logits)
        for row in logprobs:
            token = tokens[len(scored)]
            best = numpy.argpartition(-row, min(top, len(row)) - 1)[:top] if top else ()
            ranked = sorted(
                ((int(one), float(row[one])) for one in best), key=lambda pair: (-pair[1], pair[0])
            )
            scored.append((float(row[token]), ranked))
    return scored
