"""What the daemon and its models tell of themselves: the object of /stats and the text of /metrics."""

import os
import time
from collections.abc import Iterator
from typing import Any

from edgert import __version__
from edgert.errors import EdgertError
from edgert.server.metrics import labelled, shown
from edgert.server.models import Opened
from edgert.server.state import ServerState

# Numbers of Model.stats() and Engine.stats() that are states; the others only grow.
_STATES = frozenset(
    (
        "budget_bytes",
        "used_bytes",
        "peak_bytes",
        "threads",
        "context",
        "resident",
        "minimum_bytes",
        "experts_resident",
        "experts_total",
        "experts_prefetching",
        "preload_on",
        "slot_bytes",
        "slot_capacity_bytes",
        "kv_blocks_free",
        "kv_blocks_idle",
        "kv_blocks_cached",
        "adapters",
        "adapters_resident",
        "adapter_bytes",
        "requests_running",
        "requests_waiting",
    )
)


Samples = list[tuple[Any, float]]  # labels as pairs, and the value


def stats(state: ServerState) -> dict[str, Any]:
    """For programs and the dashboard."""
    metrics = state.metrics
    return {
        "version": __version__,
        "uptime_s": time.monotonic() - state.started,
        "state": _state(state),
        "budget_bytes": state.models.budget_bytes,
        "rss_bytes": rss_bytes(),
        "requests_active": state.active,
        "requests_total": int(metrics.requests.total()),
        "prompt_tokens": int(metrics.prompt_tokens.total()),
        "cached_tokens": int(metrics.cached_tokens.total()),
        "generated_tokens": int(metrics.generated_tokens.total()),
        "latency_s": {
            name: {"p50": histogram.quantile(0.5), "p99": histogram.quantile(0.99)}
            for name, histogram in (
                ("first_token", metrics.first_token_seconds),
                ("inter_token", metrics.inter_token_seconds),
                ("request", metrics.request_seconds),
            )
        },
        "models": [
            {
                "name": name,
                "state": entry.state,
                "users": entry.users,
                "pinned": entry.served.pinned,
                "error": None if entry.error is None else str(entry.error)[:500],
                **({} if entry.opened is None else _opened(entry.opened)),
            }
            for name, entry in state.models.entries.items()
        ],
    }


def _state(state: ServerState) -> str:
    if state.draining:
        return "stopping"
    if state.failure is not None:
        return "failed"
    return "ready" if state.loaded else "loading"


def _opened(opened: Opened) -> dict[str, Any]:
    model = opened.model
    found: dict[str, Any] = {"backend": model.backend, "budget_bytes": opened.budget_bytes}
    try:
        found["statistics"] = model.stats()
        found["knobs"] = knobs(opened)
        found["lossy_modes"] = model.lossy_modes
        found.update(_control(opened))
        found["adapters"] = [
            {"name": info.name, "kind": info.kind, "bytes": info.bytes, "scale": info.scale}
            for info in (model.adapters() if opened.adapters else [])
        ]
        if model.backend == "edgert":
            found["store"] = [layer.hex() for layer in model.native.store()]
            found["last_experts"] = model.native.last_experts()
    except EdgertError:
        pass  # it is being closed
    if opened.engine is not None:
        found["engine"] = opened.engine.stats()
    return found


def knobs(opened: Opened) -> dict[str, Any]:
    """The values that knobs have now, by name."""
    if opened.model.backend != "edgert":
        return {}
    native = opened.model.native
    fixed = {
        name: getattr(native, name) for name in ("context", "chunk", "kv_format", "eviction", "prefetch")
    }
    return {**fixed, **opened.model.knobs()}


def _control(opened: Opened) -> dict[str, Any]:
    """What the control loop senses and decided last."""
    if opened.control is None:
        return {}
    state = opened.control.state()
    state.pop("store", None)  # the model's own says the same
    return {"control": {"signals": {}, "decisions": {}, "knobs": {}, **state}}


def text(state: ServerState) -> str:
    """For Prometheus."""
    return state.metrics.text() + "\n".join(_series(state)) + "\n"


def _series(state: ServerState) -> Iterator[str]:
    yield from _one("edgert_uptime_seconds", "gauge", [((), time.monotonic() - state.started)])
    yield from _one("edgert_ready", "gauge", [((), state.ready)])
    yield from _one("edgert_requests_active", "gauge", [((), state.active)])
    yield from _one("edgert_process_resident_bytes", "gauge", [((), rss_bytes())])
    yield from _one("edgert_server_budget_bytes", "gauge", [((), state.models.budget_bytes)])
    yield from _one(
        "edgert_model_loaded",
        "gauge",
        [((("model", name),), entry.opened is not None) for name, entry in state.models.entries.items()],
    )
    by_name: dict[str, list[tuple[str, float]]] = {}
    values: Samples = []
    scales: Samples = []
    signals: Samples = []
    decisions: Samples = []
    for name, opened in state.models.opened():
        found = _opened(opened)
        numbers = {**found.get("statistics", {}), **found.get("engine", {})}
        numbers.pop("prompt_tokens", None)  # the server's own metrics have it
        for key, value in numbers.items():
            if isinstance(value, int | float):
                by_name.setdefault(key, []).append((name, value))
        for knob, value in found.get("knobs", {}).items():
            label = (("model", name), ("knob", knob))
            values.append(
                (label, value) if isinstance(value, int | float) else ((*label, ("value", value)), 1)
            )
        scales += [
            ((("model", name), ("adapter", row["name"])), row["scale"]) for row in found.get("adapters", [])
        ]
        control = found.get("control", {})
        signals += [
            ((("model", name), ("signal", signal)), value)
            for signal, value in control.get("signals", {}).items()
            if isinstance(value, int | float) and signal != "t"
        ]
        decisions += [
            ((("model", name), ("law", law), ("action", str(decision["action"]))), 1)
            for law, decision in control.get("decisions", {}).items()
            if isinstance(decision, dict) and "action" in decision
        ]
    for key, rows in sorted(by_name.items()):
        name = f"edgert_{key[:-2]}_seconds" if key.endswith("_s") else f"edgert_{key}"
        samples = [((("model", model),), value) for model, value in rows]
        if key in _STATES:
            yield from _one(name, "gauge", samples)
        else:
            yield from _one(f"{name}_total", "counter", samples)
    yield from _one("edgert_knob", "gauge", values)
    yield from _one("edgert_adapter_scale", "gauge", scales)
    yield from _one("edgert_control_signal", "gauge", signals)
    yield from _one("edgert_control_action", "gauge", decisions)


def _one(name: str, kind: str, samples: Samples) -> Iterator[str]:
    if samples:
        yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        yield f"{name}{labelled(labels)} {shown(value)}"


def rss_bytes() -> int:
    """Memory of the process that is in memory; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
