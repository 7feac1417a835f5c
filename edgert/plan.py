"""What to expect of a model on a machine: tokens a second at any memory budget, from sizes and speeds alone.

    decode   a token reads every dense weight, its experts and its KV cache from memory, and the missing experts from
             storage while it computes: the slower of the two counts
    prefill  a chunk multiplies every weight by its tokens, and reads every expert that it uses once; likewise

Which experts are missing follows from least-recently-used eviction and uniform routing, the worst case: text repeats
experts. What of the machine's speeds is reached stands in EFFICIENCY and nowhere else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgert import _native
from edgert.devices import Device
from edgert.errors import BudgetError
from edgert.footprint import Experts, Footprint
from edgert.machine import MachineProfile, interpolate

PROMPT_TOKENS = 512  # of the expected prefill; decode follows it
SLOW_TOKENS_PER_S = 5.0  # below which `run` warns


@dataclass(frozen=True)
class Efficiency:
    """The share of a machine's speed that the engine reaches; calibrated with `edgert bench`."""

    memory: float = 0.90
    storage: float = 0.90
    arithmetic: float = 0.45


EFFICIENCY = Efficiency()


@dataclass(frozen=True)
class Speeds:
    """A machine as the plan sees it. `read` gives bytes a second of reads of a size with so many in flight."""

    source: str  # for people
    estimate: bool  # not measured
    threads: int
    reads_in_flight: int
    memory_bytes_per_s: float
    int8_ops_per_s: float
    read: Callable[[float, float], float]


@dataclass(frozen=True)
class Expectation:
    """At one budget. `limit` is what decoding waits for: "memory" or "storage"."""

    memory_bytes: int
    resident: bool
    slots_bytes: int
    chunk: int
    hit_rate: float
    bytes_read_per_token: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    limit: str


# --- the machine --------------------------------------------------------------------------------------


def measured_speeds(profile: MachineProfile, threads: int = 0, reads_in_flight: int = 0) -> Speeds:
    """`threads` 0: as many as the machine has; `reads_in_flight` 0: the knob's default."""
    count = min(threads or profile.machine.cores, profile.threads[-1].threads)

    def at(speed: Callable[[object], float]) -> float:
        return interpolate(count, [(row.threads, speed(row)) for row in profile.threads])

    return Speeds(
        source=f"this machine, measured {profile.describe_age()}",
        estimate=False,
        threads=count,
        reads_in_flight=reads_in_flight or default_reads_in_flight(),
        memory_bytes_per_s=at(lambda row: row.memory_read_mb_per_s) * 1e6,
        int8_ops_per_s=at(lambda row: row.int8_gops) * 1e9,
        read=lambda size, depth: profile.storage.read_mb_per_s(size, depth) * 1e6,
    )


_SUSTAINED = 0.75  # of a data sheet's memory bandwidth
_CLOCK_HZ = 2.2e9
_OPS_A_CYCLE = {"avx512": 256, "avx2": 64, "neon": 64, "portable": 16, "scalar": 2}  # int8, a core


def assumed_speeds(device: Device, threads: int = 0, reads_in_flight: int = 0) -> Speeds:
    """From a profile's data sheet figures, where nothing has been measured."""
    count = min(threads or device.cpu.cores, device.cpu.cores)
    return Speeds(
        source=f"estimates of the device profile {device.name}",
        estimate=True,
        threads=count,
        reads_in_flight=reads_in_flight or default_reads_in_flight(),
        memory_bytes_per_s=_SUSTAINED * device.memory.bandwidth_mb_per_s * 1e6 * min(1.0, 2 * count / device.cpu.cores),
        int8_ops_per_s=count * _CLOCK_HZ * _OPS_A_CYCLE[device.cpu.isa],
        read=lambda size, depth: device.storage.random_read_mb_per_s * 1e6,
    )


def default_reads_in_flight() -> int:
    return next(int(knob["default"]) for knob in _native.knobs() if knob["name"] == "io_threads")


# --- the model on it ----------------------------------------------------------------------------------


def expect(model: Footprint, speeds: Speeds, memory_bytes: int, context: int = 0) -> Expectation:
    """Raises BudgetError naming the smallest budget that works."""
    plan = model.plan(memory_bytes, threads=speeds.threads, context=context)
    return expect_of_plan(model, speeds, memory_bytes, plan)


def expect_of_plan(
    model: Footprint, speeds: Speeds, memory_bytes: int, plan: dict[str, int]
) -> Expectation:
    """`plan` is the division of the budget, as _native.plan_memory gives it."""
    slots = plan["slots_bytes"]
    resident = slots >= plan["expert_bytes"]
    hits = [1.0] * len(model.layers) if resident else lru_hit_rates(model.layers, slots)
    missed = [layer.token_bytes * (1 - hit) for layer, hit in zip(model.layers, hits, strict=True)]
    position = min(PROMPT_TOKENS, plan["context"])
    moved = (
        model.dense_token_bytes
        + sum(layer.token_bytes for layer in model.layers)
        + plan["kv_bytes"] / plan["context"] * position
    )
    compute_s = moved / (EFFICIENCY.memory * speeds.memory_bytes_per_s)
    waiting_s = sum(
        _read_seconds(speeds, layer, bytes_, layer.used * (1 - hit))
        for layer, bytes_, hit in zip(model.layers, missed, hits, strict=True)
    )
    used = sum(layer.used for layer in model.layers)
    return Expectation(
        memory_bytes=memory_bytes,
        resident=resident,
        slots_bytes=slots,
        chunk=plan["chunk"],
        hit_rate=sum(layer.used * hit for layer, hit in zip(model.layers, hits, strict=True)) / used if used else 1.0,
        bytes_read_per_token=sum(missed),
        prefill_tokens_per_s=position / _prefill_seconds(model, speeds, position, plan),
        decode_tokens_per_s=1 / max(compute_s, waiting_s),
        limit="memory" if compute_s >= waiting_s else "storage",
    )


def lru_hit_rates(layers: Sequence[Experts], slots_bytes: float) -> list[float]:
    """By layer, with uniform routing.

    An expert that was used g tokens ago is still there if what g tokens use fits. What they use hardly varies, being the
    sum over many experts, so there is a longest g; an expert was used that recently with probability 1 - (1 - use)^g.
    """

    def used_bytes(tokens: int) -> float:
        return sum(layer.bytes * _touched(layer, tokens) for layer in layers)

    if not layers or used_bytes(1) > slots_bytes:
        return [0.0] * len(layers)
    low, high = 1, 2
    while used_bytes(high) <= slots_bytes and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if used_bytes(middle) <= slots_bytes else (low, middle)
    return [_touched(layer, low) for layer in layers]


def _touched(layer: Experts, tokens: float) -> float:
    """The share of a layer's experts that so many tokens use."""
    return 1.0 - (1.0 - layer.use) ** tokens


def _prefill_seconds(model: Footprint, speeds: Speeds, tokens: int, plan: dict[str, int]) -> float:
    chunks = math.ceil(tokens / plan["chunk"])
    size = tokens / chunks
    weights = model.dense_token_weights + sum(layer.used * layer.weights for layer in model.layers)
    arithmetic_s = 2 * size * weights / (EFFICIENCY.arithmetic * speeds.int8_ops_per_s)
    touched = [layer.bytes * _touched(layer, size) for layer in model.layers]
    memory_s = (model.dense_token_bytes + sum(touched)) / (EFFICIENCY.memory * speeds.memory_bytes_per_s)
    kept = _kept(plan["slots_bytes"] / max(1, sum(touched)))
    waiting_s = sum(
        _read_seconds(speeds, layer, bytes_ * (1 - kept), speeds.reads_in_flight)
        for layer, bytes_ in zip(model.layers, touched, strict=True)
    )
    return chunks * max(arithmetic_s, memory_s, waiting_s)


def _kept(share: float) -> float:
    """The hits of a pass over the layers after a like one, with slots for `share` of what a pass uses: the slots of the
    layers to come are taken by those before them, and so few are left."""
    return 1.0 if share >= 1 else share + (1 - share) * math.log1p(-share)


def _read_seconds(speeds: Speeds, layer: Experts, missed_bytes: float, missing: float) -> float:
    depth = min(speeds.reads_in_flight, max(1.0, missing))
    return missed_bytes / (EFFICIENCY.storage * speeds.read(layer.bytes / layer.count, depth))


# --- budgets ------------------------------------------------------------------------------------------


def smallest_budget(model: Footprint, speeds: Speeds, context: int = 0) -> int:
    return model.plan(1 << 60, threads=speeds.threads, context=context)["minimum_bytes"]


def resident_budget(model: Footprint, speeds: Speeds, context: int = 0) -> int:
    """From which on every expert stays in memory."""
    plan = model.plan(1 << 60, threads=speeds.threads, context=context)
    return sum(plan[part] for part in ("dense_bytes", "kv_bytes", "scratch_bytes", "expert_bytes")) + model.reserved_bytes


def budget_ladder(smallest: int, resident: int) -> list[int]:
    """The smallest budget, every power of two above, and the one with everything in memory."""
    doublings = [1 << power for power in range(20, 62) if 1.2 * smallest <= 1 << power <= resident / 1.05]
    return sorted({smallest, *doublings, resident})


def expect_all(
    model: Footprint, speeds: Speeds, budgets: Sequence[int], context: int = 0
) -> list[Expectation | None]:
    """One a budget; None where it is too small."""

    def one(budget: int) -> Expectation | None:
        try:
            return expect(model, speeds, budget, context)
        except BudgetError:
            return None

    return [one(budget) for budget in budgets]
