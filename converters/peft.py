"""Adapters as the PEFT library saves them: adapter_config.json and adapter_model.safetensors.

Whatever its kind, an adapter is reduced to what it adds to the output of a module, y = W x + b:

    y + gain * (W x, or y itself) + B (A x) + S x

Formats: PEFT 0.18 to 0.21 (huggingface.co/docs/peft), read from what it writes.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.errors import CorruptError, NotFoundError, UnsupportedError

from . import safetensors
from .files import InputFile
from .strict_json import read_json_object
from .tensor import TensorInfo

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float32]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_RANK = 4096
_MAX_SOFT_PROMPT = 4096
_VARIANTS = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Values of init_lora_weights that change the weights of the base as training begins.
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_MAX_ALPHA = 1e9
_PREFIX = "base_model.model."
_BASE_WEIGHT = ".base_layer.weight"
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "|i1"}
_PLAIN_NAME = re.compile(r"\^?[\w.]+\$?")


@dataclass
class Delta:
    """What an adapter adds to one module; parts that it lacks are None.

    `module` as the model calls it ("model.layers.0.self_attn.q_proj"). a [rank, inputs], b [outputs, rank], as stored (see
    stored_values_of), times `scale`; sparse values at (rows, cols); `magnitude` [outputs] of DoRA; `gain` [outputs] and `input_gain` [inputs] of
    IA3, less one; `weights` in place of the module's own, all or those of `weight_rows`; `bias` in place of its own;
    `shift` is added.
    """

    module: str
    a: "NDArray[Any] | None" = None
    b: "NDArray[Any] | None" = None
    scale: float = 1.0
    rows: "NDArray[numpy.int32] | None" = None
    cols: "NDArray[numpy.int32] | None" = None
    values: "Array | None" = None
    magnitude: "Array | None" = None
    gain: "Array | None" = None
    input_gain: "Array | None" = None
    weights: "NDArray[Any] | None" = None
    weight_rows: "NDArray[numpy.int32] | None" = None
    bias: "Array | None" = None
    shift: "Array | None" = None


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
    base_model: str | None
    version: tuple[int, ...] | None
    target_parameters: tuple[str, ...] = ()
    deltas: list[Delta] = field(default_factory=list)
    fused: list[FusedDelta] = field(default_factory=list)
    soft_prompt: "Array | None" = None  # [n, hidden]: embeddings before the first token
    prefix: "Array | None" = None  # [n, layers * 2 * width]: keys and values before the first token
    base_weights: dict[str, TensorInfo] = field(
        default_factory=dict
    )  # by module; PEFT saves them of embeddings


def is_peft(path: str | os.PathLike[str]) -> bool:
    return os.path.lexists(Path(path) / CONFIG)


def read_peft(path: str | os.PathLike[str]) -> PeftAdapter:
    """Read a PEFT directory.

    Raises NotFoundError, CorruptError, and UnsupportedError by name for kinds and options that are not read; nothing in
    it is ever executed.
    """
    directory = Path(path)
    if not is_peft(directory):
        raise NotFoundError(f"{directory}: no PEFT adapter (there is no {CONFIG})")
    config = read_json_object(directory / CONFIG, max_bytes=_MAX_CONFIG_BYTES)
    if not os.path.lexists(directory / WEIGHTS):
        raise NotFoundError(
            f"{directory / WEIGHTS}: missing; adapters are read from safetensors "
            "(`model.save_pretrained(..., safe_serialization=True)`)"
        )
    return _Reader(directory, config).read()


class _Reader:
    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self.config = config
        self.where = directory / CONFIG
        self.file = directory / WEIGHTS
        kind = config.get("peft_type")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise UnsupportedError(
                f"{self.where}: peft_type: found {str(kind)[:60]!r}; read are {', '.join(sorted(_KINDS))}"
            )
        self.adapter = PeftAdapter(
            directory,
            kind,
            self._text("base_model_name_or_path"),
            _version(self._text("peft_version")),
            tuple(self._names("target_parameters")),
        )
        self.tensors = {info.name: info for info in safetensors.read_header(self.file)}
        self.left = set(self.tensors)

    def read(self) -> PeftAdapter:
        self._refuse("layer_replication", "layers that stand more than once")
        self._refuse("ensure_weight_tying", "weights that are kept equal")
        _KINDS[self.adapter.kind](self)
        self._tokens(self.config.get("trainable_token_indices"), ".token_adapter.trainable_tokens_delta")
        self._saved_modules()
        self._biases()
        self._base_weights()
        if self.left:
            name = min(self.left)
            raise UnsupportedError(
                f"{self.file}: tensor {name!r}: has no place in a {self.adapter.kind} adapter that this version reads; it is "
                "not ignored, for it may change what the model computes"
            )
        if not (self.adapter.deltas or self.adapter.fused or self._has_prompt()):
            raise CorruptError(f"{self.file}: holds no tensor of an adapter")
        return self.adapter

    # --- the kinds ----------------------------------------------------------------------------------

    def lora(self) -> None:
        """`lora_A` [rank, in], `lora_B` [out, rank], times alpha / rank; rsLoRA alpha / sqrt(rank); DoRA has a magnitude."""
        for option in _VARIANTS:
            self._refuse(option, "this variant of LoRA")
        start = self._text("init_lora_weights") or ""
        if start.lower().startswith(_CHANGE_THE_BASE):
            raise UnsupportedError(
                f"{self.where}: init_lora_weights: found {start[:40]!r}, which changes the base's weights; save the adapter with "
                "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
            )
        fused = set(self.adapter.target_parameters)
        for module in self._modules(".lora_A.weight"):
            name = _name(module)
            parts = name.removesuffix(".base_layer")
            of_experts = bool(fused) and parts.endswith(tuple(f".{_parent(target)}" for target in fused))
            if not of_experts:
                self._check_size(f"{module}.lora_A.weight")
            a, b = same_type(
                self.take(f"{module}.lora_A.weight", 2, stored=True),
                self.take(f"{module}.lora_B.weight", 2, stored=True),
            )
            if of_experts:
                self._fused(name, parts, a, b)
                continue
            self._check_rank(module, a, b)
            delta = Delta(name, a, b, self._scale(name, a.shape[0]))
            if self.config.get("lora_bias"):
                delta.shift = self.take(f"{module}.lora_B.bias", 1) * delta.scale
            if self.config.get("use_dora"):
                if delta.shift is not None:
                    raise UnsupportedError(
                        f"{self.where}: lora_bias: with use_dora it cannot be run by this version"
                    )
                delta.magnitude = self.take(f"{module}.lora_magnitude_vector", 1)
            self.adapter.deltas.append(delta)

    def _fused(self, name: str, module: str, a: "Array", b: "Array") -> None:
        """Of a tensor of all experts. Where both of a module are targets, the first one is wrapped by the second."""
        wanted = sorted(
            target.rpartition(".")[2]
            for target in self.adapter.target_parameters
            if module.endswith(f".{_parent(target)}")
        )
        order = [part for part in ("gate_up_proj", "down_proj") if part in wanted]
        if len(order) != len(wanted) or a.shape[0] != b.shape[1]:
            raise UnsupportedError(
                f"{self.where}: target_parameters: found {wanted}; read are experts' gate_up_proj and down_proj"
            )
        inner = name != module
        if inner and len(order) != 2:
            raise CorruptError(f"{self.file}: tensor {name!r}: target_parameters name no second parameter")
        parameter = order[0] if inner or len(order) == 1 else order[1]
        root = bool(self.config.get("use_rslora"))
        self.adapter.fused.append(FusedDelta(module, parameter, a, b, self._alpha(module), root))

    def shira(self) -> None:
        """`shira_weight` [n] at `shira_indices` [2, n]: rows (outputs), then columns; no scale of its own."""
        import numpy as np

        for module in self._modules(".shira_weight"):
            values = self.take(f"{module}.shira_weight", 1)
            places = self.take(f"{module}.shira_indices", 2)
            if places.shape != (2, values.shape[0]):
                raise CorruptError(
                    f"{self.file}: tensor {module}.shira_indices: shape {list(places.shape)}, needed is [2, {values.shape[0]}]"
                )
            odd = (places != np.floor(places)) | (places < 0) | (places >= 2**31)
            if odd.any():
                raise CorruptError(
                    f"{self.file}: tensor {module}.shira_indices: holds {places[odd][0]}, which is no index"
                )
            rows, cols = (np.ascontiguousarray(row, dtype=np.int32) for row in places)
            if self.config.get("fan_in_fan_out"):
                rows, cols = cols, rows
            self.adapter.deltas.append(Delta(_name(module), rows=rows, cols=cols, values=values))

    def ia3(self) -> None:
        """`ia3_l` scales a module's output, or the input of those that feedforward_modules name."""
        for module in self._modules(".ia3_l"):
            gain = self.take(f"{module}.ia3_l", 2)
            name = _name(module)
            feedforward = any(
                name == target or name.endswith(f".{target}") for target in self._names("feedforward_modules")
            )
            if gain.shape[0 if feedforward else 1] != 1:
                raise CorruptError(f"{self.file}: tensor {module}.ia3_l: shape {list(gain.shape)}")
            vector = gain.reshape(-1) - 1
            self.adapter.deltas.append(
                Delta(name, input_gain=vector) if feedforward else Delta(name, gain=vector)
            )

    def vera(self) -> None:
        """All modules share A and B, cut to size; each has its diagonals."""
        import numpy as np

        if "base_model.vera_A" not in self.tensors:
            raise UnsupportedError(
                f"{self.where}: save_projection: the projections are not saved, but made by a random generator of PyTorch; "
                "save them with it on"
            )
        shared_a, shared_b = self.take("base_model.vera_A", 2), self.take("base_model.vera_B", 2)
        for module in self._modules(".vera_lambda_b"):
            rows, rank = self.take(f"{module}.vera_lambda_b", 1), self.take(f"{module}.vera_lambda_d", 1)
            if rows.shape[0] > shared_b.shape[0] or rank.shape[0] != shared_a.shape[0]:
                raise CorruptError(
                    f"{self.file}: tensor {module}.vera_lambda_b: does not fit vera_A and vera_B"
                )
            b = rows[:, np.newaxis] * shared_b[: rows.shape[0]]
            # A is as wide as the widest module; the base says how much of it this one uses.
            self.adapter.deltas.append(Delta(_name(module), rank[:, np.newaxis] * shared_a, b))

    def adalora(self) -> None:
        """B (E A), times alpha / rank: what is left of the rank in the end counts."""
        for module in self._modules(".lora_E"):
            a, b = self.take(f"{module}.lora_A", 2), self.take(f"{module}.lora_B", 2)
            e = self.take(f"{module}.lora_E", 2)
            self._check_rank(module, a, b)
            if e.shape != (a.shape[0], 1):
                raise CorruptError(f"{self.file}: tensor {module}.lora_E: shape {list(e.shape)}")
            name = _name(module)
            scale = self._alpha(name) / (a.shape[0] + 1e-5)
            self.adapter.deltas.append(Delta(name, a * e, b, scale))

    def trainable_tokens(self) -> None:
        """Rows of the embedding, as they are after training."""
        self._tokens(self.config.get("token_indices"), ".trainable_tokens_delta")

    def ln_tuning(self) -> None:
        """Weights of norms, as they are after training."""
        for module in self._modules(".ln_tuning_layers.weight"):
            weights = self.take(f"{module}.ln_tuning_layers.weight", 1, stored=True)
            self.adapter.deltas.append(Delta(_name(module), weights=weights))

    def prompt(self) -> None:
        """Embeddings of tokens before the first; P-tuning saves what its encoder makes of them."""
        self.adapter.soft_prompt = self._prompt()

    def prefix(self) -> None:
        """Keys and values of tokens before the first, layer by layer."""
        self.adapter.prefix = self._prompt()

    def _prompt(self) -> "Array":
        name = "prompt_embeddings"
        if name in self.tensors and (self.tensors[name].shape or (0,))[0] > _MAX_SOFT_PROMPT:
            raise CorruptError(
                f"{self.file}: tensor {name!r}: shape {list(self.tensors[name].shape)}; at most {_MAX_SOFT_PROMPT} tokens are allowed"
            )
        prompt: Array = self.take(name, 2)
        return prompt

    def _has_prompt(self) -> bool:
        return self.adapter.soft_prompt is not None or self.adapter.prefix is not None

    def _tokens(self, stated: object, ending: str) -> None:
        """Trained tokens: those of a list, or of a list for each module."""
        import numpy as np

        if not stated:
            return
        for module in self._modules(ending):
            name = _name(module)
            tokens = stated
            if isinstance(stated, dict):
                tokens = next(
                    (ids for key, ids in stated.items() if name == key or name.endswith(f".{key}")), None
                )
            weights = self.take(f"{module}{ending}", 2, stored=True)
            good = isinstance(tokens, list) and all(
                type(token) is int and 0 <= token < 2**31 for token in tokens
            )
            ids: list[int] = tokens if good else []  # type: ignore[assignment]
            if len(ids) != weights.shape[0] or len(set(ids)) != len(ids):
                raise CorruptError(
                    f"{self.where}: {ending.rpartition('.')[2]} of {name} needs {weights.shape[0]} different token ids, found {tokens!r:.60}"
                )
            rows = np.array(ids, np.int32)
            order = np.argsort(rows)
            self.adapter.deltas.append(Delta(name, weights=weights[order], weight_rows=rows[order]))

    def _saved_modules(self) -> None:
        """What modules_to_save names is saved as it is after training."""
        wanted = self._names("modules_to_save")
        for name in sorted(self.left):
            stem, _, ending = name.rpartition(".")
            module = _name(stem)
            if not any(module == end or module.endswith(f".{end}") for end in wanted):
                continue
            if ending == "weight":
                weights = self.take(name, len(self.tensors[name].shape), stored=True)
                self.adapter.deltas.append(Delta(module, weights=weights))
            elif ending == "bias":
                self.adapter.deltas.append(Delta(module, bias=self.take(name, 1)))

    def _biases(self) -> None:
        """Of `bias` other than "none", as they are after training."""
        if self.config.get("bias", "none") == "none":
            return
        for name in sorted(self.left):
            if name.endswith(".bias"):
                module = _name(name.removesuffix(".bias").removesuffix(".base_layer"))
                self.adapter.deltas.append(Delta(module, bias=self.take(name, 1)))

    def _base_weights(self) -> None:
        """PEFT saves the weights below an adapter of embeddings or of the output head with it, and those of all embeddings
        where it takes them for changed. Of anything else they have no place here."""
        for name in sorted(self.left):
            module = _name(name.removesuffix(".weight").removesuffix(".base_layer"))
            below = name.endswith(_BASE_WEIGHT) and any(
                delta.module == module for delta in self.adapter.deltas
            )
            if below or (name.endswith(".weight") and module.endswith(("embed_tokens", "lm_head"))):
                self.adapter.base_weights[module] = self.tensors[name]
                self.left.discard(name)

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

    def _modules(self, ending: str) -> Iterator[str]:
        """The modules that have a tensor of this name, in order."""
        for name in sorted(self.tensors):
            if name.endswith(ending):
                yield name.removesuffix(ending)

    def _check_size(self, name: str) -> None:
        """Refuse a rank beyond reason before it is read."""
        shape = self.tensors[name].shape
        if shape and shape[0] > _MAX_RANK:
            raise CorruptError(
                f"{self.file}: tensor {name!r}: rank {shape[0]}; at most {_MAX_RANK} is allowed"
            )

    def _check_rank(self, module: str, a: "Array", b: "Array") -> None:
        if self.config.get("fan_in_fan_out"):
            raise UnsupportedError(f"{self.where}: fan_in_fan_out: found true, read is false")
        if a.shape[0] != b.shape[1]:
            raise CorruptError(
                f"{self.file}: {module}: lora_A has rank {a.shape[0]}, lora_B {b.shape[1]}; they must agree"
            )

    # --- options ------------------------------------------------------------------------------------

    def _scale(self, module: str, rank: int) -> float:
        return self._alpha(module) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _alpha(self, module: str) -> float:
        alpha = self.config.get("lora_alpha")
        patterns = self.config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CorruptError(f"{self.where}: alpha_pattern: an object is needed")
        for pattern, value in patterns.items():
            if not _PLAIN_NAME.fullmatch(pattern):
                raise UnsupportedError(
                    f"{self.where}: alpha_pattern: {pattern[:80]!r} is a regular expression; plain names are read"
                )
            name = pattern.removeprefix("^").removesuffix("$")
            if module == name or (not pattern.startswith("^") and module.endswith(f".{name}")):
                alpha = value
                break
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _MAX_ALPHA:
            raise CorruptError(f"{self.where}: lora_alpha: found {str(alpha)[:40]!r}, a number is needed")
        return float(alpha)

    def _refuse(self, option: str, what: str) -> None:
        if self.config.get(option):
            raise UnsupportedError(f"{self.where}: {option}: {what} cannot be run by this version")

    def _text(self, option: str) -> str | None:
        value = self.config.get(option)
        return value if isinstance(value, str) else None

    def _names(self, option: str) -> list[str]:
        value = self.config.get(option) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise CorruptError(f"{self.where}: {option}: a list of names is needed")
        return value


_KINDS: dict[str, Callable[[_Reader], None]] = {
    "LORA": _Reader.lora,
    "SHIRA": _Reader.shira,
    "IA3": _Reader.ia3,
    "VERA": _Reader.vera,
    "ADALORA": _Reader.adalora,
    "TRAINABLE_TOKENS": _Reader.trainable_tokens,
    "LN_TUNING": _Reader.ln_tuning,
    "PROMPT_TUNING": _Reader.prompt,
    "P_TUNING": _Reader.prompt,
    "PREFIX_TUNING": _Reader.prefix,
}


def values_of(info: TensorInfo) -> "Any":
    """A small tensor as an array: floats as f32, whole numbers as int8, int32 or int64."""
    return as_floats(stored_values_of(info))


def stored_values_of(info: TensorInfo, data: bytes | bytearray | memoryview | None = None) -> "Any":
    """A small tensor as the file has it: f32, f16, int8, int32 or int64, bf16 as uint16. `data`: the file's bytes from
    info.begin on, where they have been read."""
    import numpy as np

    dtype = _DTYPES.get(info.dtype)
    if dtype is None:
        raise UnsupportedError(
            f"{info.path}: tensor {info.name!r}: dtype {info.dtype}; read are {', '.join(_DTYPES)}"
        )
    if data is None:
        with InputFile(info.path) as file:
            data = file.read(info.begin, info.end - info.begin)
    return np.frombuffer(data, dtype).reshape(info.shape)


def as_floats(values: "NDArray[Any]") -> "Any":
    """What stored_values_of() returned, with floats as f32."""
    import numpy as np

    if values.dtype == np.uint16:  # bf16
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) if values.dtype == np.float16 else values


def same_type(a: "NDArray[Any]", b: "NDArray[Any]") -> "tuple[NDArray[Any], NDArray[Any]]":
    """Both as stored, or as f32 where they are stored otherwise than each other."""
    return (a, b) if a.dtype == b.dtype else (as_floats(a), as_floats(b))


def _version(text: str | None) -> tuple[int, ...] | None:
    """The numbers that a version begins with."""
    match = re.match(r"\d{1,6}(?:\.\d{1,6})*", text or "")
    return None if match is None else tuple(int(part) for part in match.group().split("."))


def _name(module: str) -> str:
    return module.removeprefix(_PREFIX)


def _parent(parameter: str) -> str:
    return parameter.rpartition(".")[0]
