"""A PEFT directory, opened: its configuration and tensors, and what has been read of them so far."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.errors import CorruptError, UnsupportedError

from . import safetensors
from .checkpoint import resolve
from .patterns import Pattern
from .stored_values import as_floats, stored_values_of
from .tensor import TensorInfo

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float32]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_RANK = 4096
_MAX_ALPHA = 1e9
_MAX_MATCHES = 100_000  # of regular expressions with names, in one adapter
_MAX_EXPRESSIONS = 1000
_WORDS = re.compile(r"[\w.]+")  # an expression that is a name, whose dots stand for dots
_PREFIX = "base_model.model."


@dataclass
class Delta:
    """What an adapter adds to one module; parts that it lacks are None.

    `module` as the model calls it ("model.layers.0.self_attn.q_proj"). a [rank, inputs], b [outputs, rank], as stored (see
    stored_values_of), times `scale`; `a_of` makes a where it depends on the number of inputs, and b is repeated to all
    outputs where `repeats_b`; sparse values at (rows, cols), or at `flat`, row by row; `magnitude` [outputs] of DoRA; `gain` [outputs] and `input_gain` [inputs] of
    IA3, less one; `weights` in place of the module's own, all or those of `weight_rows`; `bias` in place of its own;
    `shift` is added; `gate` [inputs] says how well an input suits it.
    """

    module: str
    a: "NDArray[Any] | None" = None
    b: "NDArray[Any] | None" = None
    a_of: "Callable[[int], NDArray[Any]] | None" = None
    repeats_b: bool = False
    scale: float = 1.0
    rows: "NDArray[numpy.int32] | None" = None
    cols: "NDArray[numpy.int32] | None" = None
    flat: "NDArray[numpy.int64] | None" = None
    values: "Array | None" = None
    magnitude: "Array | None" = None
    gain: "Array | None" = None
    input_gain: "Array | None" = None
    weights: "NDArray[Any] | None" = None
    weight_rows: "NDArray[numpy.int32] | None" = None
    bias: "Array | None" = None
    shift: "Array | None" = None
    gate: "Array | None" = None


@dataclass(frozen=True)
class FusedDelta:
    """LoRA of a tensor of all experts [experts, d1, d2]: `a` [experts * rank, d2 or d1], `b` [d1 or d2, rank * experts] with
    the expert running fastest. Of expert e it adds scale(rank) * b[e] a[e], or that transposed."""

    module: str
    parameter: str  # gate_up_proj or down_proj
    a: "NDArray[Any]"
    b: "NDArray[Any]"
    alpha: float
    root: bool  # rsLoRA

    def scale(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.root else rank)


@dataclass
class PeftAdapter:
    """An adapter as read. `kind` is PEFT's peft_type; `version` the PEFT that wrote it, as far as it says."""

    path: Path
    kind: str
    base_model: str | None  # as it names the one that it was trained on
    version: tuple[int, ...] | None
    target_parameters: tuple[str, ...] = ()
    deltas: list[Delta] = field(default_factory=list)
    fused: list[FusedDelta] = field(default_factory=list)
    soft_prompt: "Array | None" = None  # [n, hidden]: embeddings before the first token
    prefix: "Array | None" = None  # [n, layers * 2 * width]: keys and values before the first token
    base_weights: dict[str, TensorInfo] = field(default_factory=dict)  # by module: what came along
    unknown: list[str] = field(default_factory=list)  # options of its configuration
    base_vectors: "dict[str, Array]" = field(default_factory=dict)  # by parameter: the same

    @property
    def is_empty(self) -> bool:
        return not (self.deltas or self.fused or self.soft_prompt is not None or self.prefix is not None)


class Reader:
    """Tensors are taken one by one; what is `left` in the end has no place in the adapter."""

    def __init__(self, directory: Path, config: dict[str, Any], kind: str) -> None:
        self.config = config
        self.where = directory / CONFIG
        self.file = directory / WEIGHTS
        self.adapter = PeftAdapter(
            directory,
            kind,
            self.text("base_model_name_or_path"),
            _version(self.text("peft_version")),
            tuple(self.names("target_parameters")),
        )
        self.tensors = {info.name: info for info in safetensors.read_header(resolve(directory, WEIGHTS))}
        self.left = set(self.tensors)
        self._patterns: dict[str, Pattern] = {}
        self._order: dict[str, int] | None = None  # of alpha_pattern, and those of it that are no names
        self._expressions: list[str] = []
        self._matches = 0

    def add(self, delta: Delta) -> None:
        self.adapter.deltas.append(delta)

    # --- tensors ------------------------------------------------------------------------------------

    def take(self, name: str, dimensions: int, *, stored: bool = False) -> "Any":
        """A tensor; see values_of(), or stored_values_of() where `stored`. Raises CorruptError."""
        import numpy as np

        info = self.tensors.get(name)
        if info is None:
            raise CorruptError(f"{self.file}: tensor {name!r} is missing")
        self.left.discard(name)
        if len(info.shape) != dimensions or 0 in info.shape:
            raise CorruptError(
                f"{self.file}: tensor {name!r}: shape {list(info.shape)}; {dimensions} dimensions, none of them 0, are needed"
            )
        values = stored_values_of(info)
        widened = as_floats(values)
        if not np.isfinite(widened).all():
            raise CorruptError(f"{self.file}: tensor {name!r}: holds a number that is not finite")
        return values if stored else widened

    def modules(self, ending: str) -> Iterator[str]:
        """The modules that have a tensor of this name, in order."""
        for name in sorted(self.tensors):
            if name.endswith(ending):
                yield name.removesuffix(ending)

    def check_size(self, name: str) -> None:
        """Refuse a rank beyond reason before it is read."""
        shape = self.tensors[name].shape
        if shape and shape[0] > MAX_RANK:
            raise CorruptError(
                f"{self.file}: tensor {name!r}: rank {shape[0]}; at most {MAX_RANK} is allowed"
            )

    def check_rank(self, module: str, a: "Array", b: "Array") -> None:
        if self.config.get("fan_in_fan_out"):
            raise UnsupportedError(f"{self.where}: fan_in_fan_out: found true, read is false")
        if a.shape[0] != b.shape[1]:
            raise CorruptError(
                f"{self.file}: {module}: lora_A has rank {a.shape[0]}, lora_B {b.shape[1]}; they must agree"
            )

    # --- options ------------------------------------------------------------------------------------

    def scale(self, key: str, rank: int, option: str = "lora_alpha") -> float:
        """alpha / rank of a module or parameter; rsLoRA: alpha / sqrt(rank)."""
        return self.alpha(key, option) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def alpha(self, key: str | None, option: str = "lora_alpha") -> float:
        """Of a module or parameter; of None, what the patterns leave aside."""
        alpha = self.config.get(option)
        patterns = self.config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CorruptError(f"{self.where}: alpha_pattern: an object is needed")
        if key is not None and patterns:
            alpha = self._of_pattern(key, patterns, alpha)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _MAX_ALPHA:
            raise CorruptError(f"{self.where}: {option}: found {str(alpha)[:40]!r}, a number is needed")
        return float(alpha)

    def _of_pattern(self, key: str, patterns: dict[str, Any], default: Any) -> Any:
        """Of the first that matches. Adapters may have one for every module: those that are names are looked up."""
        if self._order is None:
            self._order = {pattern: place for place, pattern in enumerate(patterns)}
            self._expressions = [pattern for pattern in patterns if not _WORDS.fullmatch(pattern)]
        named = min(
            (end for end in ends(key) if end in self._order), key=self._order.__getitem__, default=None
        )
        for pattern in self._expressions:
            if named is not None and self._order[named] < self._order[pattern]:
                break
            self._matches += 1
            if self._matches > _MAX_MATCHES or len(self._expressions) > _MAX_EXPRESSIONS:
                raise UnsupportedError(
                    f"{self.where}: alpha_pattern: {len(self._expressions)} regular expressions for this many modules; at most "
                    f"{_MAX_EXPRESSIONS} are read, and {_MAX_MATCHES} comparisons made"
                )
            if self.pattern(pattern, "alpha_pattern").matches_end(key):
                return patterns[pattern]
        return default if named is None else patterns[named]

    def pattern(self, text: str, option: str) -> Pattern:
        if text not in self._patterns:
            self._patterns[text] = Pattern(text, f"{self.where}: {option}")
        return self._patterns[text]

    def refuse(self, option: str, what: str) -> None:
        if self.config.get(option):
            raise UnsupportedError(f"{self.where}: {option}: not run by this version: {what}")

    def text(self, option: str) -> str | None:
        value = self.config.get(option)
        return value if isinstance(value, str) else None

    def names(self, option: str) -> list[str]:
        value = self.config.get(option) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise CorruptError(f"{self.where}: {option}: a list of names is needed")
        return value


def ends(name: str) -> Iterator[str]:
    """A dotted name, and its last components, the longest first."""
    while name:
        yield name
        name = name.partition(".")[2]


def name_of(module: str) -> str:
    return module.removeprefix(_PREFIX)


def _version(text: str | None) -> tuple[int, ...] | None:
    """The numbers that a version begins with."""
    match = re.match(r"\d{1,6}(?:\.\d{1,6})*", text or "")
    return None if match is None else tuple(int(part) for part in match.group().split("."))
