"""What to expect of a model on a machine: tokens a second at any memory budget, from sizes and speeds alone.

It is the roof of edgert.roof for the run that `edgert bench` makes, with every speed times the share of it that the engine
reaches, but for one thing: a token of a decode waits for memory and for storage one after the other, since a layer's router
names its experts only when the layer before is computed. Routing is uniform, the worst case for a store of experts: text
repeats them and runs faster.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from edgert import _native, routing
from edgert.benchmark import DECODE_TOKENS, PROMPT_TOKENS
from edgert.devices import Device, resemble
from edgert.errors import BudgetError
from edgert.footprint import ModelSizes
from edgert.machine import MachineProfile, ThreadSpeed, interpolate, measured
from edgert.roof import Bandwidths, Footprint, Step, chunks, roof, sequence_bytes

CONTEXT = PROMPT_TOKENS + DECODE_TOKENS + 1  # of the run
SLOW_TOKENS_PER_S = 5.0  # below which `run` warns


@dataclass(frozen=True)
class Efficiency:
    """The share of a machine's speeds that the engine reaches, from benchmarks/side_by_side.py (docs/benchmarks.md)."""

    memory: float = 0.80
    storage: float = 0.97
    arithmetic: float = 0.42
    arrival: float = (
        0.27  # of memory's: what was read is checked and handed over, at a layer's end with nothing to read
    )


EFFICIENCY = Efficiency()


@dataclass(frozen=True)
class Run:
    """What is planned: a prompt and the tokens after it, following another run of the same."""

    prompt_tokens: int = PROMPT_TOKENS
    decode_tokens: int = DECODE_TOKENS


BENCH = Run()  # as `edgert bench` runs by default


@dataclass(frozen=True)
class Speeds:
    """A machine as a plan sees it. `read` gives bytes a second of random reads of a size with so many in flight."""

    source: str  # for people
    measured: bool
    threads: int
    reads_in_flight: int
    memory_bytes_per_s: float
    int8_operations_per_s: float
    read: Callable[[float, float], float]

    def limits(self, extent_bytes: float, in_flight: float) -> Bandwidths:
        """With reads of this size, on average so many at a time."""
        depth = min(float(self.reads_in_flight), max(1.0, in_flight))
        storage = self.read(extent_bytes, depth)
        return Bandwidths(self.memory_bytes_per_s, storage, self.int8_operations_per_s)

    def reached(self, extent_bytes: float, in_flight: float) -> Bandwidths:
        """What the engine reaches of limits()."""
        limits = self.limits(extent_bytes, in_flight)
        return Bandwidths(
            EFFICIENCY.memory * limits.memory_bytes_per_s,
            EFFICIENCY.storage * limits.storage_bytes_per_s,
            EFFICIENCY.arithmetic * limits.int8_operations_per_s,
        )


@dataclass(frozen=True)
class Expectation:
    """At one budget. `limit` is what decoding waits for: "memory" or "storage"."""

    memory_bytes: int
    resident: bool
    slots_bytes: int
    hit_rate: float
    bytes_read_per_token: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    limit: str


# --- the machine --------------------------------------------------------------------------------------


def speeds_here(*, threads: int = 0, reads_in_flight: int = 0) -> Speeds:
    """Of this machine: measured if it has been probed, else those of the device that it resembles."""
    profile = measured()
    if profile is None:
        cores = threads or _native.usable_cores()
        return assumed_speeds(resemble(), threads=cores, reads_in_flight=reads_in_flight)
    return measured_speeds(profile, threads=threads, reads_in_flight=reads_in_flight)


def measured_speeds(profile: MachineProfile, *, threads: int = 0, reads_in_flight: int = 0) -> Speeds:
    """`threads` 0: the usable cores; `reads_in_flight` 0: what was best."""
    count = threads or _native.usable_cores()

    def at(speed: Callable[[ThreadSpeed], float]) -> float:
        return interpolate(count, [(row.threads, speed(row)) for row in profile.threads])

    return Speeds(
        source=f"this machine, measured {profile.describe_age()}",
        measured=True,
        threads=count,
        reads_in_flight=reads_in_flight or profile.storage.best_depth(),
        memory_bytes_per_s=at(lambda row: row.memory_read_mb_per_s) * 1e6,
        int8_operations_per_s=at(lambda row: row.int8_gops) * 1e9,
        read=lambda size, depth: profile.storage.read_mb_per_s(size, depth) * 1e6,
    )


# Of data sheets, where nothing has been measured.
_SUSTAINED = 0.75  # of the memory's peak
_CORES_FOR_ALL = 0.5  # share of the cores that suffices to read at that
_CLOCK_HZ = 2.2e9
_OPERATIONS_A_CYCLE = {  # int8, of a core
    "avx512": 256,
    "avxvnni": 128,
    "avx2": 64,
    "neon-i8mm": 128,
    "neon": 64,
    "portable": 16,
    "scalar": 2,
}


def assumed_speeds(device: Device, *, threads: int = 0, reads_in_flight: int = 0) -> Speeds:
    """Estimates from a device profile; `threads` 0: its cores, `reads_in_flight` 0: the knob's default."""
    count = threads or device.cpu.cores
    busy = min(count, device.cpu.cores)
    share = min(1.0, busy / (_CORES_FOR_ALL * device.cpu.cores))
    return Speeds(
        source=f"estimated from the device profile {device.name}",
        measured=False,
        threads=count,
        reads_in_flight=reads_in_flight or _reads_in_flight(),
        memory_bytes_per_s=_SUSTAINED * share * device.memory.bandwidth_mb_per_s * 1e6,
        int8_operations_per_s=busy * _CLOCK_HZ * _OPERATIONS_A_CYCLE[device.cpu.isa],
        read=lambda size, depth: device.storage.random_read_mb_per_s * 1e6,
    )


def _reads_in_flight() -> int:
    return next(int(knob["default"]) for knob in _native.knobs() if knob["name"] == "io_threads")


# --- the model on it ----------------------------------------------------------------------------------


def expect(
    model: ModelSizes, speeds: Speeds, memory_bytes: int, context: int = 0, run: Run = BENCH
) -> Expectation:
    """Raises BudgetError naming the smallest budget that works."""
    plan = model.plan(memory_bytes, threads=speeds.threads, context=context)
    return expect_of_plan(model, speeds, memory_bytes, plan, run)


def expect_of_plan(
    model: ModelSizes, speeds: Speeds, memory_bytes: int, plan: dict[str, int], run: Run = BENCH
) -> Expectation:
    """`plan` is the division of the budget, as _native.plan_memory gives it."""
    weights, slots = model.weights, plan["slots_bytes"]
    resident = slots >= plan["expert_bytes"]
    tokens = run.prompt_tokens + run.decode_tokens
    positions = _positions(tuple(routing.moe_layers(model.recipe)), 2 * tokens)
    prompt = chunks(positions[tokens:][: run.prompt_tokens], plan["chunk"])
    answer = positions[tokens:][run.prompt_tokens :]
    before = [*chunks(positions[: run.prompt_tokens], plan["chunk"]), *positions[run.prompt_tokens : tokens]]
    missed = (0, 0) if resident else _missed(weights, slots, before, prompt, answer)
    missed_per_token = missed[1] / run.decode_tokens
    kv_bytes = sequence_bytes(plan, run.prompt_tokens + run.decode_tokens / 2)

    extent, used = weights.mean_expert_bytes, sum(weights.per_token)
    miss_rate = missed_per_token / weights.routed_bytes if used else 0.0
    layers = len(weights.per_token)
    reached = speeds.reached(extent, miss_rate * used / max(1, layers))
    decode = weights.decode(kv_bytes, missed_per_token)
    prefill = weights.prefill(run.prompt_tokens, prompt, missed[0])
    in_memory = decode.memory_bytes / reached.memory_bytes_per_s
    arrival = EFFICIENCY.arrival * speeds.memory_bytes_per_s
    in_storage = decode.storage_bytes * (1 / reached.storage_bytes_per_s + 1 / arrival)
    return Expectation(
        memory_bytes=memory_bytes,
        resident=resident,
        slots_bytes=slots,
        hit_rate=1 - miss_rate,
        bytes_read_per_token=missed_per_token,
        prefill_tokens_per_s=roof(prefill, speeds.reached(extent, speeds.reads_in_flight)),
        decode_tokens_per_s=1 / (in_memory + in_storage),
        limit="storage" if in_storage > in_memory else "memory",
    )


@cache
def _positions(layers: tuple[tuple[int, int], ...], count: int) -> routing.Table:
    return routing.uniform(list(layers), count)


def _missed(
    weights: Footprint, slots: int, before: Sequence[Step], prompt: Sequence[Step], answer: Sequence[Step]
) -> tuple[int, int]:
    """Bytes that the run misses in prefill and in decode, when it follows the one `before`."""
    store = _native.StoreSimulation(weights.experts, slots)
    store.run(before)
    return store.run(prompt)["bytes"], store.run(answer)["bytes"]


# --- budgets ------------------------------------------------------------------------------------------


def budget_ladder(smallest: int, resident: int) -> list[int]:
    """The smallest budget, the powers of two above it, and the one with everything in memory."""
    powers = [1 << power for power in range(20, 62)]
    return sorted(
        {smallest, *(size for size in powers if 1.2 * smallest <= size <= resident / 1.05), resident}
    )


def expect_all(
    model: ModelSizes, speeds: Speeds, budgets: Sequence[int], context: int = 0
) -> list[Expectation | None]:
    """One a budget; None where it is too small."""

    def one(budget: int) -> Expectation | None:
        try:
            return expect(model, speeds, budget, context)
        except BudgetError:
            return None

    return [one(budget) for budget in budgets]
