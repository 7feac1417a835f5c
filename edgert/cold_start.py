"""Time to the first token of a bundle that is not in memory at all, beside what storage and arithmetic allow."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from edgert import _native
from edgert.benchmark import describe_model, draw_tokens, drop_from_page_cache
from edgert.bundle import Bundle, locate
from edgert.loading import load
from edgert.model import Model
from edgert.roof import Bandwidths, Footprint, Step, Work, chunks, roof

PROMPT_TOKENS = 16


@dataclass(frozen=True)
class _Start:
    """Seconds of loading and until the first token, bytes read by then, and the experts that the prompt used."""

    load_s: float
    first_token_s: float
    bytes_read: int
    experts: Step


def cold_start(
    path_or_name: str | os.PathLike[str] | None,
    knobs: dict[str, Any],
    *,
    prompt_tokens: int | None = None,
    repetitions: int = 5,
    bandwidths: Callable[[Model], Bandwidths | None] = lambda model: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Load the bundle `repetitions` times with its pages dropped from the cache, each with a prompt of 16 tokens or of
    `prompt_tokens`, until its first token is drawn. Returns what `edgert bench --cold --json` prints.

    needed_bytes are those of the dense file and of the experts that the prompt is routed to; with `bandwidths` (of a
    loaded model's threads and extents) ideal_s is the time to read them and then to compute, at full speed both. Raises
    what edgert.load() raises, and InvalidArgumentError for a prompt that the context does not hold.
    """
    tokens = prompt_tokens or PROMPT_TOKENS
    bundle = Bundle.open(locate(path_or_name))
    footprint = Footprint.of(bundle.manifest)
    starts = []
    for index in range(repetitions):
        drop_from_page_cache(bundle.path.glob("*.bin"))
        begin = time.perf_counter()
        with load(bundle.path, **knobs) as model:
            starts.append(_start(model, tokens, index, begin))
            limits, about = bandwidths(model), describe_model(model, bundle.manifest)
        if progress is not None:
            progress(index + 1, repetitions)
    row = _row(tokens, starts, bundle.sizes["dense_bytes"], footprint)
    row["work"] = asdict(_compute(tokens, starts, footprint))
    if limits is not None:
        row.update(ideal(row, limits))
    return {**about, "results": [row]}


def _start(model: Model, tokens: int, repetition: int, begin: float) -> _Start:
    loaded = time.perf_counter()
    prompt, _ = draw_tokens(model, tokens, 1, repetition)
    _first_token(model, prompt)
    end = time.perf_counter()
    read = model.stats()["bytes_read"]
    return _Start(loaded - begin, end - begin, read, _experts(model, prompt))


def _first_token(model: Model, prompt: list[int]) -> None:
    options = _native.SamplerOptions()
    options.temperature = 0.0
    with closing(model.native.sequence()) as sequence:
        model.native.step([(sequence, prompt, _native.Sampler(options))])


def _experts(model: Model, prompt: list[int]) -> Step:
    """Those that the prompt uses, by layer: a token's experts are the same when it is a step of its own."""
    used = []
    with closing(model.native.sequence()) as sequence:
        for token in prompt:
            model.native.step([(sequence, [token], None)])
            used.append(model.native.last_experts())
    return chunks(used, len(used))[0]


def _row(tokens: int, starts: list[_Start], dense_bytes: int, footprint: Footprint) -> dict[str, Any]:
    seconds = [start.first_token_s for start in starts]
    median = statistics.median(seconds)
    experts = [
        sum(sizes[id] for sizes, ids in zip(footprint.experts, start.experts, strict=True) for id in ids)
        for start in starts
    ]
    return {
        "phase": "cold start",
        "tokens": tokens,
        "repetitions": len(starts),
        "first_token_s": median,
        "spread": (max(seconds) - min(seconds)) / median,
        "load_s": statistics.median(start.load_s for start in starts),
        "bytes_read": statistics.mean(start.bytes_read for start in starts),
        "needed_bytes": dense_bytes + statistics.mean(experts),
    }


def _compute(tokens: int, starts: list[_Start], footprint: Footprint) -> Work:
    """Of one token of the prompt, when nothing has to be read."""
    works = [footprint.prefill(tokens, [start.experts], 0) for start in starts]
    return Work(statistics.mean(work.memory_bytes for work in works), 0, works[0].operations)


def ideal(row: Mapping[str, Any], limits: Bandwidths) -> dict[str, float]:
    """The start of a machine that reads what is needed at full speed and then computes."""
    compute_s = row["tokens"] / roof(Work(**row["work"]), limits)
    ideal_s = row["needed_bytes"] / limits.storage_bytes_per_s + compute_s
    return {"compute_s": compute_s, "ideal_s": ideal_s, "times_ideal": row["first_token_s"] / ideal_s}
