"""Lossy modes: knobs that give up quality for speed. What is on, that none is, and what they were measured to cost.

`edgert eval` of a model against itself measures the loss and keeps it in the cache, from where `edgert run` and
`edgert bench` state it.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgert import settings
from edgert.errors import InvalidArgumentError
from edgert.settings import Layers
from edgert.units import format_bytes

_MAX_KEPT_BYTES = 1 << 20


@dataclass(frozen=True)
class Loss:
    """What `modes` cost on a text, generated token by token within a budget: perplexity against that of the exact model,
    mean KL divergence from it (nats), and the share of tokens that both rank first."""

    modes: Mapping[str, float]
    budget_bytes: int
    text: str  # the file's name
    tokens: int
    perplexity: float
    exact_perplexity: float
    kl_mean: float
    top1_agreement: float

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity / self.exact_perplexity - 1:+.2%}, KL {self.kl_mean:.5f} nats a token, same "
            f"first token {self.top1_agreement:.2%} (measured on {self.tokens} tokens of {self.text}, budget "
            f"{format_bytes(self.budget_bytes)})"
        )


def names() -> tuple[str, ...]:
    """The knobs that give up quality unless they are 0."""
    return tuple(knob.name for knob in settings.knobs() if knob.lossy)


def asked_for(given: Mapping[str, Any]) -> dict[str, str]:
    """The modes that flags (`given`), variables and files turn on: where each comes from."""
    layers = Layers.read()
    found = {k.name: layers.find(k, given.get(k.name)) for k in settings.knobs() if k.lossy}
    return {name: value[1] for name, value in found.items() if value is not None and value[0] > 0}


def refuse(given: Mapping[str, Any]) -> None:
    """Raises InvalidArgumentError where a lossy mode is asked for, naming what asks for it."""
    for name, where in asked_for(given).items():
        raise InvalidArgumentError(
            f"{where}: exact results are asked for (exact=, --exact), and {name} changes what the model computes: "
            "leave it out or set it to 0"
        )


def describe(modes: Mapping[str, float], loss: Loss | None, model: str) -> str:
    """One line on what is on and what it costs."""
    shown = ", ".join(f"{name} {share:g}" for name, share in modes.items())
    if loss is not None:
        return f"lossy: {shown}: {loss}"
    return (
        f"lossy: {shown}: loss unknown; `edgert eval {model} --text FILE --reference {model}` with the same flags "
        "measures it"
    )


def keep(bundle_id: str, loss: Loss) -> None:
    """Keeps a measured loss in the cache, in place of one of the same modes and budget. A cache that cannot be written is
    left alone."""
    path = _path(bundle_id)
    rows = [row for row in _rows(path) if _key(row) != _key(loss)]
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps([asdict(row) for row in (*rows, loss)], indent=1))
        beside.replace(path)


def kept(bundle_id: str, modes: Mapping[str, float], budget_bytes: int) -> Loss | None:
    """The loss measured last with these modes, at the nearest budget; None where none was."""
    rows = [row for row in _rows(_path(bundle_id)) if row.modes == modes]
    return min(rows, key=lambda row: abs(row.budget_bytes - budget_bytes), default=None)


def _path(bundle_id: str) -> Path:
    return settings.cache() / "losses" / f"{bundle_id}.json"


def _key(loss: Loss) -> tuple[Any, ...]:
    return (sorted(loss.modes.items()), loss.budget_bytes, loss.text)


def _rows(path: Path) -> list[Loss]:
    with suppress(OSError, ValueError, TypeError, RecursionError), path.open("rb") as file:
        return [Loss(**row) for row in json.loads(file.read(_MAX_KEPT_BYTES))]
    return []
