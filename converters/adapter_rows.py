"""Rows of an embedding or an output head that an adapter gives in place of the base's, and behind them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgert.errors import CorruptError

from .adapter_base import Base
from .adapter_part import Part
from .peft_reader import PeftAdapter
from .stored_values import as_floats, same_type

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float32]

VOCABULARY = ("embedding", "output")  # the matrices that have a row for each token
# What rounding may make of the same weights in bf16, of each row's length.
ROUNDED = 2.0**-7
_MAX_UNSAVED = 4096


def vocabulary_target(base: Base, module: str) -> str | None:
    """Which of VOCABULARY a module is; else None."""
    sources = base.by_source.get(f"{module}.weight")
    for target, name in zip(VOCABULARY, ("embed_tokens", "lm_head"), strict=True):
        if sources == [target] or (sources is None and module.endswith(name)):
            return target
    return None


def widest(adapter: PeftAdapter, base: Base) -> int:
    """How many rows the adapter's vocabulary has, as far as its tensors tell; the base's at least."""
    found = [int(base.recipe["vocab_size"])]
    for module, info in adapter.base_weights.items():
        if vocabulary_target(base, module) is not None and len(info.shape) == 2:
            found.append(info.shape[0])
    for delta in adapter.deltas:
        if vocabulary_target(base, delta.module) is None:
            continue
        if delta.weights is not None and delta.weight_rows is None:
            found.append(len(delta.weights))
        found += [len(one) for one in (delta.b, delta.gain, delta.shift, delta.bias) if one is not None]
        places = [one for one in (delta.weight_rows, delta.rows) if one is not None and len(one)]
        found += [int(one.max()) + 1 for one in places]
    return max(found)


def changed_rows(found: "Array", own: "Array", bits: int) -> "NDArray[numpy.int32]":
    """The rows that differ by more than rounding to so many bits makes of the same weights."""
    import numpy as np

    apart = np.linalg.norm(found - own, axis=1)
    allowed = max(ROUNDED, 2.0 ** (2 - bits)) * np.linalg.norm(own, axis=1)
    return np.flatnonzero(~(apart <= allowed)).astype(np.int32)


def put_rows(into: Part, more: Part) -> None:
    """The rows of `more`, which come on top of those that `into` has."""
    import numpy as np

    assert into.weights is not None and more.weights is not None
    if more.weight_rows is None:
        into.weights, into.weight_rows = more.weights, None
        return
    before, after = same_type(into.weights, more.weights)
    own = np.arange(len(before), dtype=np.int32) if into.weight_rows is None else into.weight_rows
    kept = ~np.isin(own, more.weight_rows)
    rows = np.concatenate([own[kept], more.weight_rows])
    order = np.argsort(rows)
    into.weights = np.concatenate([before[kept], after])[order]
    into.weight_rows = rows[order].astype(np.int32)
    into.widen()


def complete(part: Part, own: int, rows: int, weights: "Callable[[], Array]", where: str) -> None:
    """The rows from `own` to `rows` that nobody saved: what transformers' resize_token_embeddings makes of them, the mean of the
    base's `weights`.

    Raises CorruptError where they are more than any padding."""
    import numpy as np

    given = part.weight_rows
    if given is None and part.weights is not None:
        return
    unsaved = rows - own - (0 if given is None else int(((given >= own) & (given < rows)).sum()))
    if unsaved == 0:
        return
    if unsaved > _MAX_UNSAVED:
        raise CorruptError(
            f"{where}: {part.target}: {unsaved} rows behind the base's {own} are not saved; at most {_MAX_UNSAVED} are "
            "allowed"
        )
    missing = np.arange(own, rows, dtype=np.int32)
    missing = missing if given is None else missing[~np.isin(missing, given)]
    mean = weights().mean(axis=0, dtype=np.float64).astype(np.float32)
    filled = Part(part.target, weights=np.tile(mean, (len(missing), 1)), weight_rows=missing)
    if part.weights is None:
        part.weights, part.weight_rows = filled.weights, filled.weight_rows
        part.widen()
    else:
        put_rows(part, filled)


def with_rows(base: "Array", part: Part | None) -> "Array":
    """The base's matrix with the rows that a part gives."""
    import numpy as np

    if part is None or part.weights is None:
        return base
    given = as_floats(part.weights)
    if part.weight_rows is None:
        return given  # type: ignore[no-any-return]
    rows = max(len(base), int(part.weight_rows[-1]) + 1)
    out = np.concatenate([base, np.zeros((rows - len(base), base.shape[1]), np.float32)])
    out[part.weight_rows] = given
    return out
