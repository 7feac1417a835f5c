"""Runs a text through a model and measures what it does: see edgert.calibration for what comes of it."""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from edgert import lossy
from edgert.bundle import Bundle
from edgert.calibration import Calibration
from edgert.calibration_file import measured_model
from edgert.errors import InvalidArgumentError
from edgert.evaluate import encode_text
from edgert.loading import knob_values, load_with

if TYPE_CHECKING:
    from edgert.model import Model

MOMENTS = ("auto", "full", "diagonal")


def calibrate(
    model: str | os.PathLike[str] | None,
    text: str | Sequence[int],
    *,
    tokens: int | None = None,
    moments: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    **knobs: Any,
) -> Calibration:
    """Run `text` (or token ids; the first `tokens` of them) through a model and return what was measured.

    `model` is what edgert.load() takes, `knobs` likewise; the text runs in windows of `context` tokens that do not
    overlap. `moments`: "full" records whole matrices of second moments, "diagonal" their diagonals only, "auto" whole
    ones as far as their sums fit 1 GiB. The sums are part of the budget. progress(done, total) counts tokens.

    Raises InvalidArgumentError for a text of fewer than two tokens, other `moments`, a lossy mode that is on, and where
    the model gives values that are not finite; UnsupportedError where another engine runs the model; and what edgert.load() raises.
    """
    if moments not in MOMENTS:
        raise InvalidArgumentError(f"moments: found {moments!r:.60}, allowed are {', '.join(MOMENTS)}")
    if tokens is not None and tokens < 2:
        raise InvalidArgumentError(f"tokens: found {tokens}, at least 2 are needed")
    if not text:
        raise InvalidArgumentError("text: it is empty; at least 2 tokens are needed")
    lossy.refuse(knobs)  # what is measured is the model itself
    with load_with(knob_values(knobs), model, "edgert", moments=moments) as loaded:
        ids = encode_text(loaded, text, tokens) if isinstance(text, str) else text[:tokens]
        return measure(loaded, ids, progress)


def measure(
    model: "Model", tokens: Sequence[int], progress: Callable[[int, int], None] | None = None
) -> Calibration:
    """calibrate() with a model that was loaded to be measured, and has not run yet."""
    if len(tokens) < 2:
        raise InvalidArgumentError(f"text: found {len(tokens)} tokens, at least 2 are needed")
    native = model.native
    for first in range(0, len(tokens), model.context):
        end = min(first + model.context, len(tokens))
        with closing(native.sequence()) as sequence:
            for begin in range(first, end, native.chunk):
                part = list(tokens[begin : min(begin + native.chunk, end)])
                native.step([(sequence, part, None)])
                if progress is not None:
                    progress(begin + len(part), len(tokens))
    count, tensors = native.observed()
    bundle = Bundle.open(model.path)
    checksums = {tensor["name"]: tensor["checksum"] for tensor in bundle.manifest["tensors"]}
    return Calibration(
        measured_model(bundle.recipe, checksums), count, min(model.context, count), tensors
    ).checked()
