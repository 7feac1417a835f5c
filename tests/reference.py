"""transformers as the reference, in f32 with eager attention, and how logits are compared with it.

A position is compared by max|difference| / max|reference| over the vocabulary. Where the choice itself hangs on
less than NEAR_TIE (between the last expert routed to and the first one not, or between the two best tokens),
either answer is right: such positions are named in the test's warnings and properties and not compared, and a
test whose reference has more than a few of them fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 1e-4
NEAR_TIE = 1e-5
MOST_NEAR_TIES = 3


@dataclass
class Reference:
    """transformers on one checkpoint."""

    model: Any

    @classmethod
    def load(cls, path: Path) -> Reference:
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        model, info = loaded
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        return cls(model.eval())

    def forward(self, tokens: list[int], cache: Any = None) -> tuple[np.ndarray, np.ndarray, Any]:
        """Logits [n, vocab], the smallest routing margin of each position [n], and the cache."""
        import torch

        is_moe = getattr(self.model.config, "num_experts_per_tok", None) is not None
        routing = {"output_router_logits": True} if is_moe else {}
        with torch.no_grad():
            output = self.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, **routing)
        rows = output.logits.shape[1]  # more than tokens where a soft prompt stands before them
        margins = np.full(rows, np.inf, np.float32)
        for router_logits in getattr(output, "router_logits", None) or ():
            ordered = router_logits.softmax(-1).sort(-1, descending=True).values.numpy()
            k = self.model.config.num_experts_per_tok
            if k < ordered.shape[1]:
                margins = np.minimum(margins, ordered[-rows:, k - 1] - ordered[-rows:, k])
        return output.logits[0].numpy(), margins, output.past_key_values

    def step_by_step(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        rows, margins, cache = [], [], None
        for token in tokens:
            logits, margin, cache = self.forward([token], cache)
            rows.append(logits[0])
            margins.append(margin[0])
        return np.stack(rows), np.array(margins)


def near_ties(logits: np.ndarray, routing_margins: np.ndarray) -> np.ndarray:
    """Positions whose routing or greedy token is a near tie."""
    best = np.sort(logits, axis=-1)
    return np.flatnonzero(np.minimum(routing_margins, best[:, -1] - best[:, -2]) < NEAR_TIE)


def compared(name: str, count: int, ties: np.ndarray, record: Callable[[str, object], None]) -> list[int]:
    """The positions to compare; names the others."""
    if len(ties):
        record(f"near ties, {name}", ties.tolist())
        warnings.warn(f"{name}: near ties at positions {ties.tolist()} are not compared", stacklevel=2)
    assert len(ties) <= MOST_NEAR_TIES, f"{name}: near ties at {ties.tolist()}; choose another seed"
    return [i for i in range(count) if i not in set(ties.tolist())]


def assert_close(
    actual: np.ndarray, reference: np.ndarray, positions: list[int], tolerance: float = TOLERANCE
) -> None:
    assert actual.shape == reference.shape
    error = np.abs(actual - reference).max(-1) / np.abs(reference).max(-1)
    wrong = [(i, float(error[i])) for i in positions if not error[i] <= tolerance]
    assert not wrong, (
        f"{len(wrong)} of {len(positions)} positions differ, first (position, error): {wrong[:5]}"
    )
