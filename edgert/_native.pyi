"""The C++ core. Errors are edgert.errors.EdgertError subclasses."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from typing_extensions import Buffer

__version__: str

# --- platform ---------------------------------------------------------------------------------------
def available_memory_bytes(root: str = "/") -> int:
    """That this process may still take: the smaller of MemAvailable and what its cgroups leave; 0: unknown. `root` is where
    /proc and /sys are looked up."""

def cgroup_directories(controller: str, root: str = "/") -> list[tuple[int, str]]:
    """(version, directory) of this process's cgroup and its ancestors in which "memory" or "cpu" may be bounded."""

def anonymous_resident_bytes() -> int: ...
def usable_cores(root: str = "/") -> int: ...
def cpu_name() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def runnable_isas() -> list[str]: ...
def page_size() -> int: ...
def knobs() -> list[dict[str, Any]]:
    """The knob table: name, kind (bytes | int | float | choice), default, minimum, maximum, choices, unit, live, lossy,
    help."""

# --- weight formats ---------------------------------------------------------------------------------
def formats() -> list[dict[str, Any]]:
    """The format table: name, bits, group, block, scale, zero, codebook, packs_floats, bits_per_weight."""

def block_types() -> list[dict[str, Any]]:
    """ggml's types of quantised blocks that can be carried over: name, elements, bytes, format."""

def packed_bytes(format: str, rows: int, cols: int) -> int: ...
def pack(
    format: str,
    source: Buffer,
    dtype: str,
    rows: int,
    cols: int,
    *,
    destination: Buffer,
    remainder: Buffer | None = None,
    moments: Moments | Buffer | None = None,
    threads: int = 0,
) -> tuple[float, ...]:
    """Pack a row-major matrix of dtype "f32", "f16" or "bf16" (raw bytes) into `destination`, which is writable and
    exactly packed_bytes(...) long; `remainder` int8 [rows, cols]. Slabs of a multiple of 16 rows pack apart.

    `moments` M of the inputs, or f32 as Moments takes them: codes are chosen for the least sum of e M e^T over the rows of
    errors e, with the whole matrix so that columns make up for the errors of one another.
    Returns (squared error, squared weight, largest error), and with moments that sum. Without the GIL."""

class Moments:
    """Second moments of a matrix's inputs, mean of x x^T, made ready for packing: the work that matrices share.

    `values` are f32 [cols, cols], or [cols], the diagonal. InvalidArgumentError by row and column for what is not finite,
    negative on the diagonal or not symmetric, and for what is not positive semidefinite. Without the GIL."""

    def __init__(self, values: Buffer, cols: int) -> None: ...
    cols: int
    is_full: bool

def fill_random(
    format: str, rows: int, cols: int, *, deviation: float, seed: int, destination: Buffer
) -> None:
    """Fill `destination`, packed_bytes(...) long, with random weights of mean zero and this standard deviation, the same
    for the same seed. InvalidArgumentError where cols is not a multiple of the format's group. Without the GIL."""

def repack(type: str, source: Buffer, rows: int, cols: int, *, destination: Buffer, threads: int = 0) -> None:
    """Carry ggml blocks, row-major, over into packed tiles of the type's format, no number changed. cols is a multiple
    of the type's elements. Slabs of a multiple of 16 rows pack apart. InvalidArgumentError by row and column for a
    scale that is not finite. Without the GIL."""

def dequantize(type: str, source: Buffer, rows: int, cols: int) -> bytes:
    """ggml blocks as row-major f32 bytes, equal to ggml's own values."""

def pack_codes(
    format: str,
    codes: Buffer,
    scales: Buffer,
    zeros: Buffer | None,
    rows: int,
    cols: int,
    *,
    destination: Buffer,
    threads: int = 0,
) -> None:
    """Carry over weights whose codes uint8 [rows, cols] and scales f32 [rows, groups] a checkpoint holds apart.

    `zeros` are uint8 [rows, groups] or f32 minima [rows, groups], as the format has them, else None: a weight is
    scale * (code - zero) or scale * code - minimum. For mxfp4 `scales` are its exponents, uint8 [rows, groups].
    UnsupportedError for formats with blocks; InvalidArgumentError by row and column where the format does not hold a
    scale, a minimum or a code exactly. Without the GIL."""

def unpack(format: str, packed: Buffer, rows: int, cols: int) -> bytes:
    """The matrix back as row-major f32 bytes."""

def xxh64(data: Buffer) -> str:
    """XXH64, seed 0, as 16 hexadecimal digits."""

class Xxh64:
    def __init__(self) -> None: ...
    def update(self, data: Buffer) -> None: ...
    def hexdigest(self) -> str: ...

# --- bundle -----------------------------------------------------------------------------------------
def check_recipe(recipe_json: str) -> None:
    """UnsupportedError for what this version cannot run, CorruptError for what no version could."""

def open_bundle(path: str) -> dict[str, Any]:
    """Validate manifest and sizes; return {"manifest": str, "dense_bytes", "expert_bytes", "num_experts", ...}."""

def verify_bundle(path: str, progress: Callable[[int, int], None] | None = None) -> int:
    """Read everything and check every checksum; returns bytes read. progress(done_bytes, total_bytes)."""

# --- engine -----------------------------------------------------------------------------------------
class Runtime:
    """Owns budget, threads and I/O. memory_bytes 0: auto; threads 0: usable cores."""

    def __init__(
        self,
        memory_bytes: int = 0,
        *,
        threads: int = 0,
        io_threads: int = 4,
        io_backend: str = "auto",
        direct_io: str = "auto",
        isa: str = "",
    ) -> None: ...
    budget_bytes: int
    used_bytes: int
    peak_bytes: int
    threads: int
    active_threads: int  # settable at any time, from 1 to `threads`; other models of the runtime are held too
    io_depth: int  # reads in flight; settable at any time, from 1 to io_threads
    io_backend: str  # the one that runs
    isa: str
    def reserve(self, bytes: int) -> None:
        """Count memory that is held outside this library (the tokenizer) towards the budget. Never refused; a Model
        that then finds too little left raises BudgetError naming the budget that works, this included."""
    def charge(self, bytes: int, what: str) -> Charge:
        """Count memory that is held outside this library towards the budget for as long as what is returned lives. BudgetError
        where it does not fit."""

class Charge: ...

def plan_memory(
    runtime: Runtime,
    path: str,
    *,
    context: int = 0,
    parallel: int = 1,
    chunk: int = 0,
    kv_format: str = "auto",
    eviction: str = "forecast",
    prefetch: str = "auto",
) -> dict[str, int]:
    """How the runtime's budget would be divided for a bundle: context, chunk, dense_bytes, kv_bytes, state_bytes
    (of sequence states of fixed size), observation_bytes (sums of a model that is measured), scratch_bytes,
    slots_bytes, expert_bytes (of all experts), token_bytes (of one token's, at most), minimum_bytes, resident_bytes (from
    which on every expert stays in memory). BudgetError names the smallest budget that works."""

def plan_weights(
    runtime: Runtime,
    *,
    name: str,
    recipe_json: str,
    dense_bytes: int,
    key_format: str,
    expert_bytes: list[list[int]],
    join_bytes: int = 0,
    context: int = 0,
    parallel: int = 1,
    chunk: int = 0,
    kv_format: str = "auto",
    eviction: str = "forecast",
    prefetch: str = "auto",
) -> dict[str, int]:
    """plan_memory of weights that need not exist: the size of dense.bin, the format of layers.0.attention.k, and the size
    of every expert's extent by MoE layer. `name` stands in messages."""

class SamplerOptions:
    """Plain attributes; temperature 0 is greedy. Checked by Sampler: InvalidArgumentError names the field."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_window: int
    seed: int
    logit_bias: dict[int, float]
    logprobs: int  # -1: none; n >= 0: the token's own and the n best
    def __init__(self) -> None: ...

class Sampler:
    def __init__(self, options: SamplerOptions, *, stream: int = 0) -> None: ...
    def accept(self, tokens: Seq[int]) -> None:
        """Tell the penalties of tokens that were not sampled (the prompt)."""
    def allow(self, mask: Buffer | None) -> None:
        """Draw only these tokens from now on, whatever the biases: bit t % 32 of little-endian uint32 word t // 32, of
        ceil(vocab_size / 32) words; None: all. Logprobs stay those of the unmodified distribution. InvalidArgumentError
        where it allows no token; of another length, when it is used."""
    def sample(self, logits: Buffer, position: int) -> Sample:
        """Draw the token that takes `position` from float32 logits [vocab_size], which are left as they are."""

class Sample:
    token: int
    logprob: float  # of the unmodified distribution; nan without logprobs
    top: list[tuple[int, float]]

class Adapter:
    """What an adapter adds to the products of a model's matrices; immutable, charged to the model's budget."""

    name: str
    bytes: int
    fingerprint: int  # of its contents
    added_tokens: int  # that it brings
    in_use: bool  # by a sequence
    ungated: str  # a target that has no gate; empty where all have one

class Patches:
    """What adapters at given scales make of the packed codes of a model's matrices; charged to the model's budget. See
    native/src/adapters/patch_set.h."""

    bytes: int
    covered: int  # matrices
    left: int  # matrices with sparse values that stay beside the weights
    def counts(self) -> dict[str, Any]:
        """Of what has been compiled: values, unchanged, clamped; sums of squares intended, error, apart and beside; fidelity and loss.
        See native/src/adapters/patch.h."""

def matrix_patch(
    format: str,
    packed: Buffer,
    shape: tuple[int, int],
    rows: Buffer,
    cols: Buffer,
    values: Buffer,
    remainders: Buffer | None,
) -> tuple[bytes, dict[str, Any]]:
    """The patch that sparse f32 values at int32 (rows, cols) make of a packed matrix, as an adapter file has it; and what
    became of them, see Patches.counts(). UnsupportedError for a format that takes no patches."""

def adapter_fingerprint(parts: Seq[dict[str, Any]]) -> int:
    """What Adapter.fingerprint is of these."""

def remainders(
    format: str, packed: Buffer, shape: tuple[int, int], rows: Buffer, cols: Buffer, floats: Buffer
) -> bytes:
    """int8 [n]: what the codes at (rows, cols) lack of the f32 that they were made of, in steps of 1/200 of a code, at most
    half a code. UnsupportedError for a format that takes no patches."""

class Sequence:
    length: int
    soft_tokens: int  # of its adapters' soft prompt, which stand before its own and count as they do
    def saved_length(self) -> int:
        """Tokens that a file can keep of it: whole blocks of 16, or all that ran where there is state of fixed size."""
    def saved_block(self, index: int) -> bytes: ...
    def saved_state(self) -> bytes:
        """Empty where there is none."""
    def begin_restore(self, tokens: Seq[int]) -> None:
        """Make room for what a file kept of these tokens, in an empty sequence, which shares with nobody. BudgetError;
        InvalidArgumentError past the context."""
    def restore_block(self, index: int, content: Buffer) -> None: ...
    def restore_state(self, content: Buffer) -> None: ...
    def end_restore(self, length: int) -> None:
        """All of it is there."""
    fingerprint: int  # of its adapters' contents and scales: what is computed with equal ones has equal bits; 0 for none
    def rewind(self, length: int) -> None: ...
    def close(self) -> None: ...

class Model:
    def __init__(
        self,
        runtime: Runtime,
        path: str,
        *,
        context: int = 0,
        parallel: int = 1,
        chunk: int = 0,
        kv_format: str = "auto",
        eviction: str = "forecast",
        prefetch: str = "auto",
        adapter_memory: int = 0,
        expert_memory: int = 0,
        moments: str = "none",
        lossy: Mapping[str, float] = {},
    ) -> None: ...
    context: int
    chunk: int
    kv_format: str
    eviction: str
    prefetch: str  # the predictor at work; none where every expert stays in memory
    vocab_size: int
    minimum_bytes: int  # the smallest budget that works with these options
    resident: bool  # every expert fits
    def plan(self) -> dict[str, int]:
        """See plan_memory."""
    def adapter(
        self, name: str, parts: Seq[dict[str, Any]], order: int = 0, added_tokens: int = 0
    ) -> Adapter:
        """`parts`: {"target": the bundle's name of a matrix, and of these buffers those that it has: "a" [rank, cols] and
        "b" [rows, rank] with "rank" and their "scale"; "rows", "cols" int32 and "values" f32 of sparse values, "remainders"
        int8 of them (see remainders()); "gain" f32 [rows], with "gain_spares_bias"; "shift" f32 [rows]; "weights" [n, cols]
        with "weight_rows" int32 [n]; "dtype" ("f32", "f16" or "bf16") is of "a", "b" and "weights"}. See
        native/src/adapters/adapter.h. A row's adapters add by ascending `order`; 0: after all that were made with 0 so far.
        `added_tokens`: how many it brings; "embedding" and "output" have rows for them behind their own, and weights of them all.
        InvalidArgumentError names the target that does not fit; BudgetError."""
    def target(self, name: str) -> tuple[int, int]:
        """Rows and columns of what an adapter can change by this name, of a norm its size twice. InvalidArgumentError where
        it is nothing."""
    def trim_adapters(self) -> None:
        """Give adapters' scratch back if no sequence needs it."""
    def patches(self, adapters: Seq[tuple[Adapter, float]]) -> Patches:
        """InvalidArgumentError for an adapter of another model; BudgetError."""
    def stored_adapter(self, name: str, order: int, fingerprint: int) -> Adapter:
        """One of which nothing is in memory, for stored_patches()."""
    def stored_patches(
        self,
        adapter: Adapter,
        path: str,
        places: Seq[tuple[str, int, int]],
        counts: Mapping[str, float],
        keep: bool,
    ) -> Patches:
        """Patches of it at scale 1 in the file at `path`: target, offset and bytes of each. They are read as they are used; those of
        experts stay then, or are read every time. CorruptError and StorageError, also from use_patches() and steps; BudgetError."""
    def use_patches(self, patches: Patches | None) -> None:
        """Make the weights those of these patches, of None the bundle's: dense matrices now, experts as they are used.
        Steps do so by themselves for their sequences."""
    def remove_patches(self, patches: Patches) -> None:
        """Take them off every matrix; their memory is free once nobody holds them."""
    def check_weights(self) -> int:
        """Take every patch off and compare the resident weights with the bundle's checksums; how many tensors and experts
        those were. CorruptError names what differs."""
    def sequence(
        self,
        adapters: Seq[tuple[Adapter, float]] = [],
        prompt: Seq[int] = [],
        patches: Patches | None = None,
        top_k: int = 0,
    ) -> Sequence:
        """One whose tokens are computed with these adapters, each with its scale; they stay alive as long as it does. With
        their patches weights carry what those cover. With `top_k` a token takes so many of them of each matrix, by their gates.
        It begins with those tokens of `prompt` that the KV cache remembers, in blocks of 16 and never the last one: its
        length says how many, and the rest is the caller's to run. Models with state of fixed size remember none.
        InvalidArgumentError for one of another model; BudgetError where their scratch does not fit."""
    state_fingerprint: int  # of all that a sequence's state depends on besides tokens and adapters
    kv_block_bytes: int  # of 16 tokens
    state_bytes: int  # of fixed size, of a sequence
    def forget_prefixes(self) -> None:
        """Forget the beginnings of prompts that the KV cache remembers."""
    def step(self, rows: Seq[tuple[Sequence, Seq[int], Sampler | None]]) -> list[Sample | None]:
        """One step over a batch of token spans, prefill and decode mixed; longer batches run in chunks. A row with a
        sampler gets a token drawn after its last token. KeyboardInterrupt and cancel() stop it between layers and
        between experts. After any error every sequence and sampler is as it was before the step, so that it can be run
        again. A sequence in a step that runs refuses rewind() and close() with InvalidArgumentError."""
    def logits(self, sequence: Sequence, tokens: Seq[int]) -> Any:
        """Run tokens and return float32 numpy [len(tokens), vocab]."""
    def cancel(self) -> None: ...
    def impose_routing(self, experts: Seq[Seq[Seq[int]]]) -> None:
        """For measurements: position p uses the expert ids experts[p % len(experts)], listed by MoE layer, instead of
        the routers' choice, which an empty list restores; the routers still weigh them. Memory is the caller's, not the
        budget's. InvalidArgumentError names position and MoE layer where the ids do not fit the model."""
    def lossy(self) -> dict[str, float]:
        """The lossy modes that are on, by knob."""
    def set_lossy(self, shares: Mapping[str, float]) -> None:
        """From the next step on these lossy modes, by knob, and no others. InvalidArgumentError for a knob that is none and
        outside its range."""
    # Knobs that change while steps run, from any thread; none changes a result.
    def set_memory(self, bytes: int) -> None:
        """The runtime's budget, by way of this model's expert slots. BudgetError names the smallest that works."""
    least_expert_bytes: int
    def set_expert_memory(self, bytes: int) -> None:
        """Of expert slots. What is evicted is given back to the system, but for what is leased, which follows. BudgetError
        below least_expert_bytes and past the budget."""
    def take_from_experts(self, bytes: int) -> bool:
        """Take about so much of the expert slots for adapters, once the step under way has ended; False where only the
        least are left."""
    def return_to_experts(self) -> None:
        """Give back of what was taken what is free now, unless the slots' memory was set meanwhile, or somebody else seeks
        room."""
    def seek_room(self, on: bool) -> None:
        """From True to False, what was taken is not given back, whoever asks for it. May be nested."""
    prefetch_depth: int  # settable
    token_interval_ms: float  # settable
    def step_times(self, since: int = 0) -> tuple[int, list[float]]:
        """How many decode steps have ended, and the seconds that those took that ended after the `since` first ones, at
        most the last 1024."""
    def force_preload(self, on: bool | None) -> None:
        """For measurements: read ahead of need always or never; None: where that is found to pay."""
    def last_experts(self) -> list[list[int]]:
        """The experts that the last step's last token used, by MoE layer, ascending."""
    def observed(self) -> tuple[int, dict[str, Any]]:
        """What was measured since loading with `moments` ("diagonal", "full" or "auto"; "none" measures nothing): the
        tokens, and numpy arrays by the names of docs/calibration.md. InvalidArgumentError without moments."""
    def statistics(self) -> dict[str, int | float]:
        """Cumulative: expert_hits (resident without prefetch), expert_prefetch_hits (the first use of what a prefetch
        read), expert_misses, bytes_read, expert_bytes_read, expert_bytes_prefetched (of expert_bytes_read), stall_s,
        prefill_tokens, prefill_s, decode_tokens, decode_s, evictions, experts_replaced, experts_skipped and
        experts_low_precision (uses of an expert by a token that lossy modes gave to another, left out, or had of its base
        alone), expert_base_reads and expert_refinements (misses that read a base alone, or what a base lacked); of reading
        ahead: prefetches (experts that were begun with), prefetches_late (of them, those asked for while they were read:
        misses), prefetches_wasted (evicted or given up before anybody asked for them), expert_bytes_wasted (read for
        those); of the predictor: predicted (experts foretold of the next layer, as many as a token uses) and predicted_used
        (of them, those that it used: their quotient is the recall), preload_steps and preload_steps_on (decode steps looked
        ahead in, and those of them that read ahead); now: kv_blocks_free, kv_blocks_cached (remembered) and kv_blocks_idle (of them, those that no sequence holds),
        preload_on, experts_resident, experts_total, experts_prefetching
        (those that are still to be read ahead of need), slot_bytes, slot_capacity_bytes."""
    def store(self) -> list[bytes]:
        """Per MoE layer one byte an expert: 0 absent, 1 being read, 2 resident."""

class RequestEvent:
    """A token of a request, or its end, or both."""

    request: int
    sample: Sample | None
    finish_reason: str | None  # "stop", "length", "cancelled", "error"
    cached_tokens: int  # of the prompt, found in the KV cache
    queue_s: float  # until it began to run
    def raise_error(self) -> None:
        """Raise what ended the request; nothing where that was no error."""

class Scheduler:
    """Runs requests together, on a thread of its own; see native/src/engine/scheduler.h. `queue`: how many may wait."""

    def __init__(self, model: Model, *, queue: int) -> None: ...
    def submit(
        self,
        *,
        adapters: Seq[tuple[Adapter, float]],
        prompt: Seq[int],
        sampler: Sampler,
        max_tokens: int,
        ends: Seq[int],
        paced: bool = False,
        patches: Patches | None = None,
        top_k: int = 0,
    ) -> int | None:
        """The request's number; None where too many wait. `ends` are tokens after which nothing follows; a `paced` request
        waits after each token for proceed(). InvalidArgumentError for what can never run."""
    def cancel(self, request: int) -> None: ...
    def proceed(self, request: int) -> None: ...
    def events(self) -> list[RequestEvent]:
        """Wait for events, without the GIL; empty once closed and all are returned."""
    def close(self) -> None:
        """Cancel everything and end the thread."""
    def statistics(self) -> dict[str, int]:
        """requests_running, requests_waiting; since the beginning requests_preempted, prompt_tokens, prefix_cache_hit_tokens
        (of them, those that were remembered), steps."""

# --- split experts ----------------------------------------------------------------------------------
def split_sizes(
    formats: list[str], hidden_size: int, intermediate_size: int, biased: bool
) -> tuple[int, int] | None:
    """Bytes of the base and of both parts of an expert with these formats of gate, up and down; None where one of them
    does not split."""

def split_expert(
    formats: list[str],
    hidden_size: int,
    intermediate_size: int,
    biased: bool,
    *,
    packed: Buffer,
    destination: Buffer,
) -> tuple[str, str, str]:
    """Split a packed extent into `destination`; checksums of both parts together, of the base and of the refinement.
    UnsupportedError where the parts would not make the very bytes again. Without the GIL."""

# --- simulation -------------------------------------------------------------------------------------
class StoreSimulation:
    """A store of experts without storage: the engine's policies and accounting, without prefetch. Where the experts of a
    step fit, layer by layer, its counts are the engine's. `sizes`: bytes of each expert by MoE layer; `future`: all the
    steps that will run, for the optimum in place of `eviction`. InvalidArgumentError for steps of another model."""

    def __init__(
        self,
        sizes: Seq[Seq[int]],
        capacity_bytes: int,
        eviction: str = "forecast",
        *,
        future: Seq[Seq[Seq[int]]] | None = None,
    ) -> None: ...
    def run(self, steps: Seq[Seq[Seq[int]]]) -> dict[str, int]:
        """Go on with `steps`, each the distinct experts by MoE layer: hits, misses, evictions and bytes read of them."""

# --- measuring the machine --------------------------------------------------------------------------
def memory_probe_bytes() -> int:
    """Memory that measure_memory should read: far more than the caches hold, at most a quarter of what is free."""

def measure_memory(threads: int, bytes: int) -> float:
    """Bytes a second of a streaming read by `threads` threads, the best of several passes. Without the GIL."""

def measure_arithmetic(threads: int, isa: str = "") -> float:
    """int8 operations a second (a multiply-add is two) of the best kernels' dot product. Without the GIL."""

def usable_io_backends() -> list[str]:
    """What knob io_backend may ask for on this machine."""

class ReadProbe:
    """A file whose reads are measured, through the readers that models use; it may be removed once this is made."""

    takes_direct: bool
    def __init__(self, path: str) -> None: ...
    def measure(
        self,
        *,
        span_bytes: int,
        block_bytes: int,
        depth: int,
        random: bool,
        direct: bool,
        io_backend: str,
        seconds: float,
    ) -> float:
        """Bytes a second with `depth` reads of `block_bytes` in flight inside [0, span_bytes). Without the GIL."""

# --- control ----------------------------------------------------------------------------------------
class Controller:
    """Holds one signal inside a band with one fast knob and slow ones; docs/controllers.md states the laws.

    kind: fast-slow, published, fixed, aimd, pi. A knob is {name, minimum, maximum, start, step, stage}. `drives`, `increase`,
    `decrease`, `proportional` and `integral` are the baselines'. InvalidArgumentError by field.
    """

    def __init__(
        self,
        kind: str,
        *,
        low: float,
        high: float,
        fast: dict[str, Any],
        slow: Seq[dict[str, Any]] = (),
        patience: int = 2,
        blanking: int = 1,
        dwell: int = 4,
        relief: int = 0,
        slow_gain: float = 0.0,
        hysteresis: float = 1.3,
        lead: float = 0.0,
        max_age: float = ...,
        drives: str = "fast",
        increase: float = 1.0,
        decrease: float = 0.5,
        proportional: float = 1.0,
        integral: float = 0.2,
    ) -> None: ...
    def step(
        self,
        value: float,
        t: float = 0.0,
        *,
        age: float = 0.0,
        quality: str = "exact",
        urgent: bool = False,
    ) -> dict[str, Any]:
        """The decision on one window: the sample (window, t, value, age, quality: exact | at-least | missing, urgent), the
        positions (fast, slow), action (hold | fast | slow | recentre), reason, direction (+1 opened, -1 tightened), and
        the state after it (at_open_rail, at_tight_rail, reversals, blanking, dwell, fast_step)."""

    def state(self) -> list[float]:
        """What it goes on from; restore() of it in a controller of the same kind and settings goes on alike."""

    def restore(self, numbers: Seq[float]) -> None:
        """InvalidArgumentError for numbers that state() cannot have given."""

class Plant:
    """A simulated signal that follows knobs through a curve (linear, exponential, inert, table), a delay and a lag."""

    def __init__(
        self,
        *,
        curve_kind: str = "linear",
        offset: float = 0.0,
        gain: float = 1.0,
        decade: float = 1.0,
        curve: Seq[tuple[float, float]] = (),
        fast_weight: float = 1.0,
        fast_centre: float = 0.0,
        slow_weights: Seq[float] = (),
        slow_centres: Seq[float] = (),
        delay: int = 0,
        time_constant: float = 0.0,
        initial: float = 0.0,
        burst: float = 0.0,
    ) -> None: ...
    def step(
        self, fast: float, slow: Seq[float] = [], *, scale: float = 1.0, added: float = 0.0
    ) -> float: ...
    def steady(self, fast: float, slow: Seq[float] = []) -> float: ...
