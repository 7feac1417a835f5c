"""Speed of a loaded model: prefill and decode, as medians over repetitions."""

import os
import random
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgert.errors import InvalidArgumentError

if TYPE_CHECKING:
    from edgert.model import Model

# Running text, so that routing is as in use.
_TEXT = (
    "A file system keeps the names of files in directories. When a program opens a file, the system looks the name up, "
    "checks the permissions, and returns a small number by which the program refers to the file from then on. "
)
_COUNTED = ("expert_hits", "expert_misses", "bytes_read", "stall_s")


def benchmark(
    model: "Model",
    *,
    prompt_tokens: int | None = None,
    decode_tokens: int | None = None,
    repetitions: int = 3,
    drop_caches: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure `repetitions` runs after one that warms up. Returns what `edgert bench --json` prints.

    tokens_per_s is the median, spread (largest - smallest) / median; the expert counters are of all repetitions.
    prompt_tokens and decode_tokens are 128 and 64 by default, and at most two thirds and one third of the context.
    Raises InvalidArgumentError where they do not fit into it.
    """
    room = model.context - 1
    prompt_tokens = prompt_tokens or max(1, min(128, room * 2 // 3))
    decode_tokens = decode_tokens or max(1, min(64, room // 3))
    if prompt_tokens + decode_tokens > room:
        raise InvalidArgumentError(
            f"prompt_tokens + decode_tokens: found {prompt_tokens + decode_tokens}, allowed are {room}: "
            f"the context holds {model.context}"
        )
    prompt = _prompt(model, prompt_tokens)
    runs = []
    for index in range(repetitions + 1):
        if drop_caches:
            _drop_caches(model)
        run = _run(model, prompt, decode_tokens)
        if index:
            runs.append(run)
        if progress is not None:
            progress(index + 1, repetitions + 1)
    stats = model.stats()
    return {
        "model": model.name,
        "threads": stats["threads"],
        "isa": stats["isa"],
        "budget_bytes": stats["budget_bytes"],
        "peak_bytes": stats["peak_bytes"],
        "context": model.context,
        "resident": model.resident,
        "results": [_row(phase, [run[phase] for run in runs]) for phase in ("prefill", "decode")],
    }


def _run(model: "Model", prompt: list[int], decode_tokens: int) -> dict[str, dict[str, float]]:
    """One generation; per phase its tokens, seconds and counters."""
    start = model.stats()
    stream = model.stream(
        prompt, max_tokens=decode_tokens + 1, temperature=0, repetition_penalty=1, ignore_eos=True
    )
    next(stream)
    between = model.stats()
    for _ in stream:
        pass
    end, timed = model.stats(), stream.statistics()

    def phase(tokens: int, seconds: float, before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
        return {
            "tokens": tokens,
            "seconds": seconds,
            **{name: after[name] - before[name] for name in _COUNTED},
        }

    return {
        "prefill": phase(len(prompt), timed["prefill_s"], start, between),
        "decode": phase(decode_tokens, timed["decode_s"], between, end),
    }


def _row(phase: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    speeds = [run["tokens"] / run["seconds"] for run in runs]
    median = statistics.median(speeds)
    total = {name: sum(run[name] for run in runs) for name in ("tokens", *_COUNTED)}
    looked_up = total["expert_hits"] + total["expert_misses"]
    return {
        "phase": phase,
        "tokens": int(runs[0]["tokens"]),
        "repetitions": len(runs),
        "tokens_per_s": median,
        "spread": (max(speeds) - min(speeds)) / median,
        "hit_rate": total["expert_hits"] / looked_up if looked_up else 1.0,
        "bytes_read_per_token": total["bytes_read"] / total["tokens"],
        "stall_s_per_token": total["stall_s"] / total["tokens"],
    }


def _prompt(model: "Model", count: int) -> list[int]:
    if not model.has_tokenizer:
        draw = random.Random(0)
        return [draw.randrange(model.vocab_size) for _ in range(count)]
    tokens = model.tokenizer.encode(_TEXT)
    return (tokens * (count // len(tokens) + 1))[:count]


def _drop_caches(model: "Model") -> None:
    """Ask the system to forget the bundle's pages; clean ones go at once."""
    for path in model.path.glob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
