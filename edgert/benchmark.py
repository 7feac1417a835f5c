"""Speed of a loaded model: prefill and decode, as medians over repetitions, beside what the machine allows."""

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert import routing as routings
from edgert.bundle import Bundle
from edgert.errors import InvalidArgumentError
from edgert.eviction import Step, compare
from edgert.roof import Bandwidths, Footprint, Work, chunks, roof, sequence_bytes

if TYPE_CHECKING:
    from edgert.model import Model

PROMPT_TOKENS, DECODE_TOKENS = 128, 64
# Running text, so that routing is as in use.
_TEXT = (
    "A file system keeps the names of files in directories. When a program opens a file, the system looks the name up, "
    "checks the permissions, and returns a small number by which the program refers to the file from then on. "
)
_LOOKUPS = ("expert_hits", "expert_prefetch_hits", "expert_misses")
_LOSSES = ("experts_replaced", "experts_skipped", "experts_low_precision")
_FORESIGHT = (
    "prefetches", "prefetches_late", "expert_bytes_wasted", "predicted", "predicted_used", "preload_steps",
    "preload_steps_on",
)  # fmt: skip
_COUNTED = (*_LOOKUPS, *_LOSSES, *_FORESIGHT, "bytes_read", "stall_s")
_POLL_S = 0.05


@dataclass(frozen=True)
class _Run:
    """One prompt and its decode: per phase tokens, seconds and counters; per decode step seconds and experts."""

    prefill: dict[str, float]
    decode: dict[str, float]
    step_seconds: list[float]
    step_experts: routings.Table


def benchmark(
    model: "Model",
    *,
    prompt_tokens: int | None = None,
    decode_tokens: int | None = None,
    repetitions: int = 5,
    routing: str | None = None,
    bandwidths: Bandwidths | None = None,
    drop_caches: bool = False,
    prefetch_gain: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure `repetitions` runs after one that warms up. Returns what `edgert bench --json` prints.

    tokens_per_s is the median, spread (largest - smallest) / median; the expert counters are of all repetitions. A
    model with a tokenizer gets text and decodes its own answer; one without gets random tokens throughout. `routing`
    imposes experts ("uniform" or "trace:FILE") in place of the routers' choice. A row's `work` is what a token costs at
    least, its misses those of a store simulated over the same experts; with `bandwidths` the roof that follows from
    it stands there too. `prefetch_gain` measures as many decodes without reading ahead as with it too, by turns.
    `eviction_simulated` has the decode's hit rate and bytes a token by policy, with the optimum.

    prompt_tokens and decode_tokens are 128 and 64 by default, and at most two thirds and one third of the context.
    Raises InvalidArgumentError where they do not fit into it, and what routing.imposed() raises.
    """
    prompt_tokens, decode_tokens = lengths(model.context, prompt_tokens, decode_tokens)
    manifest = Bundle.open(model.path).manifest
    table = None
    if routing is not None:
        table = routings.imposed(routing, manifest["recipe"], prompt_tokens + decode_tokens)
    runs = []
    model.native.impose_routing(table or [])
    try:
        for index in range(repetitions + 1):
            if drop_caches:
                drop_from_page_cache(model.path.glob("*.bin"))
            runs.append(_run(model, *draw_tokens(model, prompt_tokens, decode_tokens, index)))
            while model.stats()["experts_prefetching"]:  # of a steady state, not of the way there
                time.sleep(_POLL_S)
            if progress is not None:
                progress(index + 1, repetitions + 1)
        gain = _prefetch_gain(model, prompt_tokens, decode_tokens, repetitions) if prefetch_gain else None
    finally:
        model.native.impose_routing([])
    measured = runs[1:]
    prefill = _row("prefill", [run.prefill for run in measured])
    decode = _row("decode", [run.decode for run in measured])
    decode["token_ms"] = [round(1000 * second, 4) for run in measured for second in run.step_seconds]
    decode.update(percentiles(decode["token_ms"]))
    decode["prefetch_gain"] = gain
    footprint = Footprint.of(manifest)
    # The routers' own choice for a prompt is not recorded: one drawn stands for it.
    positions = table or routings.uniform(routings.moe_layers(manifest["recipe"]), prompt_tokens)
    prompt = [positions[index % len(positions)] for index in range(prompt_tokens)]
    for row, work in zip((prefill, decode), _works(model, footprint, runs, prompt), strict=True):
        row.update(work=asdict(work), simulated_bytes_per_token=work.storage_bytes)
        if bandwidths is not None:
            limit = roof(work, bandwidths)
            row.update(roof_tokens_per_s=limit, roof_fraction=row["tokens_per_s"] / limit)
    layers = routings.moe_layers(manifest["recipe"])
    overlaps = [routings.overlap(run.step_experts) for run in runs]
    return {
        **describe_model(model, manifest),
        "routing": routing or "model",
        # of consecutive tokens' experts, and what it is where every expert is as likely as any other
        "expert_overlap": statistics.mean(overlaps) if layers else None,
        "uniform_overlap": statistics.mean(top / count for count, top in layers) if layers else None,
        "eviction_simulated": None if model.resident else _evictions(model, footprint, runs, prompt),
        "results": [prefill, decode],
    }


def lengths(context: int, prompt_tokens: int | None, decode_tokens: int | None) -> tuple[int, int]:
    """Of prompt and decode; what is not given is the default, or less where the context holds less. Raises
    InvalidArgumentError where they do not fit."""
    room = context - 1
    prompt_tokens = prompt_tokens or max(1, min(PROMPT_TOKENS, room * 2 // 3))
    if decode_tokens is None:
        decode_tokens = max(1, min(DECODE_TOKENS, room // 3))
    if prompt_tokens + decode_tokens > room:
        raise InvalidArgumentError(
            f"prompt_tokens + decode_tokens: found {prompt_tokens + decode_tokens}, allowed are {room}: "
            f"the context holds {context}"
        )
    return prompt_tokens, decode_tokens


def describe_model(model: "Model", manifest: dict[str, Any]) -> dict[str, Any]:
    """What was measured, and with what."""
    stats = model.stats()
    return {
        "model": model.name,
        "threads": stats["threads"],
        "io_backend": stats["io_backend"],
        "isa": stats["isa"],
        "eviction": model.native.eviction,
        "prefetch": model.native.prefetch,
        "lossy": model.lossy_modes,
        "cpu": _native.cpu_name(),
        "budget_bytes": stats["budget_bytes"],
        "peak_bytes": stats["peak_bytes"],
        "model_bytes": sum(file["bytes"] for file in manifest["files"]),
        "context": model.context,
        "resident": model.resident,
        "bits_per_weight": Footprint.of(manifest).bits_per_weight,
    }


def _run(model: "Model", prompt: list[int], answer: list[int | None]) -> _Run:
    """One prompt and its decode; where `answer` has no token, the one drawn goes on."""
    options = _native.SamplerOptions()
    options.temperature = 0.0
    sampler = _native.Sampler(options)
    seconds, experts = [], []
    native = model.native
    with closing(native.sequence()) as sequence:
        before = model.stats()
        start = time.perf_counter()
        (sample,) = native.step([(sequence, prompt, sampler)])
        prefill_s = time.perf_counter() - start
        between = model.stats()
        for token in answer:
            assert sample is not None  # the row has a sampler
            start = time.perf_counter()
            (sample,) = native.step([(sequence, [sample.token if token is None else token], sampler)])
            seconds.append(time.perf_counter() - start)
            experts.append(native.last_experts())
        after = model.stats()

    def phase(tokens: int, taken: float, first: dict[str, Any], last: dict[str, Any]) -> dict[str, float]:
        return {"tokens": tokens, "seconds": taken, **{name: last[name] - first[name] for name in _COUNTED}}

    return _Run(
        phase(len(prompt), prefill_s, before, between),
        phase(len(answer), sum(seconds), between, after),
        seconds,
        experts,
    )


def _row(phase: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    speeds = [run["tokens"] / run["seconds"] for run in runs]
    median = statistics.median(speeds)
    total = {name: sum(run[name] for run in runs) for name in ("tokens", *_COUNTED)}
    looked_up = sum(total[name] for name in _LOOKUPS)
    return {
        "phase": phase,
        "tokens": int(runs[0]["tokens"]),
        "repetitions": len(runs),
        "tokens_per_s": median,
        "spread": (max(speeds) - min(speeds)) / median,
        "hit_rate": total["expert_hits"] / looked_up if looked_up else 1.0,
        "bytes_read_per_token": total["bytes_read"] / total["tokens"],
        "stall_s_per_token": total["stall_s"] / total["tokens"],
        **{f"{name}_per_token": total[name] / total["tokens"] for name in _LOSSES},
        **_foresight(total),
    }


def _foresight(total: Mapping[str, float]) -> dict[str, float | None]:
    """What the predictor knew, and what reading ahead made of it; None where there was nothing to know."""

    def share(name: str, *parts: str) -> float | None:
        return sum(total[part] for part in parts) / total[name] if total[name] else None

    looked_up = sum(total[name] for name in _LOOKUPS)
    return {
        "prefetch_hit_rate": total["expert_prefetch_hits"] / looked_up if looked_up else 0.0,
        "prefetch_recall": share("predicted", "predicted_used"),
        "prefetch_precision": share("prefetches", "expert_prefetch_hits", "prefetches_late"),
        "prefetch_wasted_bytes_per_token": total["expert_bytes_wasted"] / total["tokens"],
        "prefetch_steps_on": share("preload_steps", "preload_steps_on"),
    }


def _prefetch_gain(
    model: "Model", prompt_tokens: int, decode_tokens: int, repetitions: int
) -> dict[str, float] | None:
    """Medians of decodes that always and never read ahead, by turns; None where nothing would be read ahead."""
    if model.native.prefetch == "none":
        return None
    speeds: dict[bool, list[float]] = {False: [], True: []}
    try:
        for turn in range(2 * repetitions):
            on = turn % 4 in (1, 2)  # off, on, on, off: what drifts counts for neither
            model.native.force_preload(on)
            run = _run(model, *draw_tokens(model, prompt_tokens, decode_tokens, turn // 2))
            speeds[on].append(run.decode["tokens"] / run.decode["seconds"])
    finally:
        model.native.force_preload(None)
    with_it, without = statistics.median(speeds[True]), statistics.median(speeds[False])
    return {"on_tokens_per_s": with_it, "off_tokens_per_s": without, "gain": with_it / without - 1}


def percentiles(token_ms: Sequence[float]) -> dict[str, float]:
    """Of the times of single tokens."""
    ordered = sorted(token_ms)
    p50, p99 = statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"token_ms_p50": p50, "token_ms_p99": p99, "p99_over_p50": p99 / p50}


def _works(
    model: "Model", footprint: Footprint, runs: list[_Run], prompt: routings.Table
) -> tuple[Work, Work]:
    """What a token of prefill and of decode costs, with the misses of a simulated cache that takes the same way."""
    plan = model.native.plan()
    steps, tokens = chunks(prompt, plan["chunk"]), len(runs[0].step_seconds)
    store = _native.StoreSimulation(footprint.experts, plan["slots_bytes"], model.native.eviction)
    missed = [(store.run(steps)["bytes"], store.run(run.step_experts)["bytes"]) for run in runs]
    prefill, decode = (statistics.mean(phase) for phase in zip(*missed[1:], strict=True))
    kv_bytes = sequence_bytes(plan, len(prompt) + tokens / 2)
    return footprint.prefill(len(prompt), steps, prefill), footprint.decode(kv_bytes, decode / tokens)


def _evictions(
    model: "Model", footprint: Footprint, runs: list[_Run], prompt: routings.Table
) -> dict[str, dict[str, float]]:
    """What the decodes of all runs but the first would have hit and read under each policy."""
    plan = model.native.plan()
    prefill = chunks(prompt, plan["chunk"])
    steps: list[Step] = []
    counted: list[bool] = []
    for index, run in enumerate(runs):
        steps += [*prefill, *run.step_experts]
        counted += [False] * len(prefill) + [index > 0] * len(run.step_experts)
    found = compare(footprint.experts, plan["slots_bytes"], steps, counted)
    return {
        name: {"hit_rate": counts.hit_rate, "bytes_per_token": counts.bytes / sum(counted)}
        for name, counts in found.items()
    }


def draw_tokens(
    model: "Model", prompt_tokens: int, decode_tokens: int, repetition: int
) -> tuple[list[int], list[int | None]]:
    """The prompt, and the tokens that follow it where they are not the model's own answer."""
    if not model.has_tokenizer:
        # Drawn, for the greedy answers of random weights run in circles.
        draw = random.Random(repetition)
        drawn = [draw.randrange(model.vocab_size) for _ in range(prompt_tokens + decode_tokens)]
        return drawn[:prompt_tokens], [*drawn[prompt_tokens:]]
    text = model.tokenizer.encode(_TEXT)
    return (text * (prompt_tokens // len(text) + 1))[:prompt_tokens], [None] * decode_tokens


def drop_from_page_cache(paths: Iterable[Path]) -> None:
    """Ask the system to forget the files' pages; clean ones go at once."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
