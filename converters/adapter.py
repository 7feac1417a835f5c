"""From an adapter as PEFT has it to the matrices of one bundle."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert.errors import CorruptError, InvalidArgumentError, UnsupportedError

from .adapter_base import Base
from .adapter_part import Part
from .adapter_rows import (
    ROUNDED,
    VOCABULARY,
    changed_rows,
    complete,
    put_rows,
    vocabulary_target,
    widest,
    with_rows,
)
from .adapter_shapes import check_parts
from .adapter_targets import LAYER, Targets
from .fused_experts import expert_parts
from .peft_reader import Delta, PeftAdapter
from .stored_values import as_floats, values_of
from .tensor import TensorInfo

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float32]


# Norms that adapters can change; and those whose weights the checkpoint has less one.
_NORM = re.compile(r"final_norm|layers[.]\d+[.](?:attention|ffn)_norm")
_ZERO_CENTRED = ("qwen3_next", "qwen3_5")
# Whose queries and keys a GGUF file has in another order of rows.
_REORDERED = (
    "llama",
    "mistral",
    "mixtral",
    "granite",
    "granitemoe",
    "granitemoeshared",
    "ministral3",
    "mistral3",
)


def _padded(array: "NDArray[Any] | None", rows: int) -> Any:
    """With zeros behind it, so that there are so many rows."""
    import numpy as np

    if array is None or len(array) >= rows:
        return array
    return np.pad(array, [(0, rows - len(array)), *[(0, 0)] * (array.ndim - 1)])


def halves_by_turns(rows: int, dim: int) -> "NDArray[numpy.int64]":
    """Which of a checkpoint's rows stands at each place, where a head's halves go by turns."""
    import numpy as np

    return np.arange(rows).reshape(-1, 2, dim // 2).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class Compiled:
    """Parts, one a matrix, and how many rows the vocabulary has behind the base's."""

    parts: list[Part]
    added_rows: int


def compile_adapter(
    adapter: PeftAdapter, path: Path, manifest: dict[str, Any], vocab_size: int = 0
) -> Compiled:
    """What `adapter` is for the bundle at `path`. `vocab_size`: the tokens that its tokenizer has, at least.

    Raises InvalidArgumentError where modules or shapes are not the base's, and UnsupportedError for modules whose weights
    the bundle has in another form.
    """
    compiler = _Compiler(adapter, Base(path, manifest), vocab_size)
    for module, info in adapter.base_weights.items():
        compiler.add_base(module, info)
    for parameter, vector in adapter.base_vectors.items():
        compiler.check_vector(parameter, vector)
    for delta in adapter.deltas:
        compiler.add(delta)
    compiler.put_input_gains()
    compiler.add_prompt()
    for fused in adapter.fused:
        for part in expert_parts(adapter, compiler.base, compiler.targets, fused):
            compiler.put(part, fused.module)
    compiler.complete()
    check_parts(compiler.parts, manifest, adapter.path, compiler.added_rows)
    return Compiled(compiler.parts, compiler.added_rows)


class _Compiler:
    def __init__(self, adapter: PeftAdapter, base: Base, vocab_size: int) -> None:
        self.adapter = adapter
        self.base = base
        self.targets = Targets(adapter.path, base)
        self.parts: list[Part] = []
        self.seen: dict[str, Part] = {}
        self.input_gains: dict[str, Array] = {}  # of down, by the target of up
        self.rows = int(base.recipe["vocab_size"])
        self.added_rows = max(widest(adapter, base), vocab_size) - self.rows

    def add(self, delta: Delta) -> None:
        if delta.weights is not None:
            self.add_weights(delta, delta.weights)
            return
        if delta.bias is not None:
            self.add_bias(delta.module, delta.bias)
            return
        target = self.targets.of(delta.module)
        if delta.input_gain is not None:
            self.add_input_gain(delta, target)
            return
        part = Part(
            target, delta.a, delta.b, delta.scale, delta.rows, delta.cols, delta.values, gain=delta.gain
        )
        part.shift, part.gate = delta.shift, delta.gate
        self.fit(part, delta)
        if delta.magnitude is not None:
            self.apply_magnitude(part, delta)
        self.reorder(part)
        self.put(part, delta.module)

    def put(self, part: Part, module: str) -> None:
        other = self.seen.get(part.target)
        if other is not None:
            part = self.joined(other, part, module)
            self.parts = [one for one in self.parts if one.target != part.target]
        self.seen[part.target] = part
        self.parts.append(part)

    def joined(self, one: Part, other: Part, module: str) -> Part:
        """A trained bias, or rows that came along, beside the rest."""
        if one.weights is not None and other.is_weights and other.weight_rows is not None:
            put_rows(one, other)  # trained tokens, of weights that came along
            return one
        for part, more in ((one, other), (other, one)):
            if part.shift is None and more.is_shift:
                part.shift = more.shift
                return part
            if part.weights is None and more.is_weights:
                part.weights, part.weight_rows = more.weights, more.weight_rows
                part.widen()
                return part
        raise CorruptError(f"{self.adapter.path}: {module}: stands twice")

    def own_rows(self, target: str) -> "Array":
        """Of the embedding or the head, as the base has them."""
        return self.base.weights(target if target in self.base.by_name else "embedding")

    def complete(self) -> None:
        """A token that is brought has a row of each."""
        if self.added_rows == 0:
            return
        for target in VOCABULARY:
            part = self.seen.get(target) or Part(target)
            weights = partial(self.own_rows, target)
            complete(part, self.rows, self.rows + self.added_rows, weights, str(self.adapter.path))
            if target not in self.seen:
                self.put(part, target)

    def add_base(self, module: str, info: TensorInfo) -> None:
        """Weights that came along: the base's own, but for some rows, those of added tokens."""
        import numpy as np

        target = vocabulary_target(self.base, module) or self.targets.of(module)
        name = target if target in self.base.by_name else "embedding"  # a head that is tied
        tensor = self.base.by_name[name]
        rows, columns = tensor["shape"]
        if target in VOCABULARY:
            rows += self.added_rows
        if len(info.shape) != 2 or info.shape[1] != columns or info.shape[0] > rows:
            raise InvalidArgumentError(
                f"{info.path}: tensor {info.name!r}: shape {list(info.shape)}, the base's matrix is {tensor['shape']}"
            )
        own = self.base.weights(name)[: info.shape[0]]
        found = values_of(info)
        if not np.isfinite(found).all():
            raise CorruptError(f"{info.path}: tensor {info.name!r}: holds a number that is not finite")
        bits = next(row["bits"] for row in _native.formats() if row["name"] == tensor["format"])
        changed = changed_rows(found[: len(own)], own, bits)
        if 2 * len(changed) > len(own):
            error = float(np.linalg.norm(found[: len(own)] - own)) / max(float(np.linalg.norm(own)), 1e-30)
            raise InvalidArgumentError(
                f"{info.path}: tensor {info.name!r}: the weights are not the base's ({error:.1%} apart): the adapter is of another "
                "model, or was saved with weights that were trained, which modules_to_save must name"
            )
        changed = np.concatenate([changed, np.arange(len(own), len(found), dtype=np.int32)])
        if not len(changed):
            return
        self.put(Part(target, weights=found[changed], weight_rows=changed), module)
        tied = (
            "output" not in self.base.by_name and target in VOCABULARY and len(self.adapter.base_weights) == 1
        )
        other = "output" if target == "embedding" else "embedding"
        if tied and not self.gives_weights(other):  # one tensor is both
            self.put(Part(other, weights=found[changed], weight_rows=changed), module)

    def gives_weights(self, target: str) -> bool:
        return any(
            delta.weights is not None and vocabulary_target(self.base, delta.module) == target
            for delta in self.adapter.deltas
        )

    def fit(self, part: Part, delta: Delta) -> None:
        """What depends on the size of the base's matrix."""
        import numpy as np

        if part.target == "output":  # the base has room for more tokens
            rows = self.rows + self.added_rows
            part.b, part.gain, part.shift = (_padded(one, rows) for one in (part.b, part.gain, part.shift))
        if delta.a_of is None and delta.flat is None:
            return
        tensor = self.base.by_name.get(part.target)
        if tensor is None:
            raise UnsupportedError(
                f"{self.adapter.path}: {delta.module}: only dense matrices take a {self.adapter.kind} adapter"
            )
        rows, columns = tensor["shape"]
        if delta.a_of is not None:
            part.a = delta.a_of(columns)
        if delta.repeats_b and part.b is not None and rows % len(part.b) == 0:
            part.b = np.tile(part.b, (rows // len(part.b), 1))
        if delta.flat is not None:
            found = np.divmod(delta.flat, columns)
            part.rows, part.cols = (numbers.astype(np.int32) for numbers in found)

    # --- the kinds ----------------------------------------------------------------------------------

    def add_weights(self, delta: Delta, weights: "NDArray[Any]") -> None:
        """A module trained whole, or rows of one."""
        import numpy as np

        norm = self.targets.norm(delta.module) if weights.ndim == 1 else None
        if norm is not None:
            self.add_norm(delta.module, norm, as_floats(weights))
            return
        target = vocabulary_target(self.base, delta.module) or self.targets.of(delta.module)
        tied = "output" not in self.base.by_name
        tensor = self.base.by_name.get("embedding" if target == "output" and tied else target)
        rows, columns = (None, None) if tensor is None else tensor["shape"]
        vocabulary = target in VOCABULARY
        if vocabulary and rows is not None:
            rows += self.added_rows
        if weights.ndim != 2 or columns not in (None, weights.shape[1]):
            raise InvalidArgumentError(
                f"{self.adapter.path}: {delta.module}: the weights are {list(weights.shape)}, the base's are {[rows, columns]}"
            )
        which = delta.weight_rows
        if vocabulary and which is None and rows is not None and len(weights) < rows:
            which = np.arange(len(weights), dtype=np.int32)  # the base has room for more tokens
        found = weights.shape[0] if which is None else int(which[-1]) + 1
        if rows is not None and (found > rows or (which is None and found != rows)):
            raise InvalidArgumentError(
                f"{self.adapter.path}: {delta.module}: has weights of {found} rows, the base {rows}"
            )
        part = Part(target, weights=weights, weight_rows=which)
        self.reorder(part)
        self.put(part, delta.module)
        if (
            target == "embedding"
            and delta.weight_rows is not None
            and tied
            and not self.gives_weights("output")
        ):
            self.put(Part("output", weights=weights, weight_rows=delta.weight_rows), delta.module)

    def add_norm(self, module: str, target: str, weights: "Array") -> None:
        if _NORM.fullmatch(target) is None:
            raise UnsupportedError(
                f"{self.adapter.path}: {module}: changed weights of {target} are not run by this version; read are those of norms "
                "before attention and feed-forward, and of the last one"
            )
        if self.base.architecture.startswith(_ZERO_CENTRED):
            weights = weights + 1
        own = self.base.vector(target)
        if own.shape != weights.shape:
            raise InvalidArgumentError(
                f"{self.adapter.path}: {module}: the weights are {list(weights.shape)}, the base's are {list(own.shape)}"
            )
        self.put(Part(target, shift=weights - own), module)

    def check_vector(self, parameter: str, found: "Array") -> None:
        """What came along, and is not run where it is not the base's own."""
        import numpy as np

        names = self.base.by_source.get(parameter) or []
        match = LAYER.fullmatch(parameter)
        if not names and match is not None and parameter.endswith(".e_score_correction_bias"):
            names = [f"layers.{int(match[1])}.router.bias"]  # of a base that was a GGUF file
        if len(names) != 1 or names[0] not in self.base.by_name:
            self.targets.unknown(parameter)
        own = self.base.vector(names[0])
        if own.shape != found.shape or not np.allclose(found, own, rtol=ROUNDED, atol=1e-6):
            raise UnsupportedError(
                f"{self.adapter.path}: {parameter}: is not the base's own, and changed ones are not run by this version"
            )

    def add_bias(self, module: str, bias: "Array") -> None:
        import numpy as np

        if self.base.by_source.get(f"{module}.weight", [""])[0].endswith("_norm"):
            self.check_vector(f"{module}.bias", bias)
            return
        target = self.targets.of(module)
        name = f"{target}_bias"
        if self.base.architecture == "gpt_oss" and target.endswith(".router"):
            name = f"{target}.bias"  # of other routers, this is for the choice alone
        if name not in self.base.by_name:
            self.targets.unknown(f"{module}.bias")
        own = self.as_checkpoint(target, self.base.vector(name))
        if target == "output":
            own = _padded(own, self.rows + self.added_rows)
            bias = np.concatenate([bias, own[len(bias) :]])  # the base has room for more tokens
        if own.shape != bias.shape:
            raise InvalidArgumentError(
                f"{self.adapter.path}: {module}.bias: is {list(bias.shape)}, the base's is {list(own.shape)}"
            )
        part = Part(target, shift=bias - own)
        self.reorder(part)
        self.put(part, module)

    def add_prompt(self) -> None:
        """Tokens past the vocabulary, by their embeddings or by their keys and values."""
        import numpy as np

        embeddings, prefix = self.adapter.soft_prompt, self.adapter.prefix
        if embeddings is None and prefix is None:
            return
        given = embeddings if prefix is None else prefix
        assert given is not None
        hidden, layers = self.base.recipe["hidden_size"], len(self.base.recipe["layers"])
        rows = np.arange(len(given), dtype=np.int32) + self.rows + self.added_rows
        if prefix is not None:
            width = [self.base.key_width(layer) for layer in range(layers)]
            alike = {
                (width[layer], self.base.block(layer)["mixer"].get("head_dim")) for layer in range(layers)
            }
            if len(alike) > 1 or not width[0]:
                raise UnsupportedError(
                    f"{self.adapter.path}: {self.adapter.kind} is run by models that attend in every layer, all alike, which "
                    f"{self.base.path.name} does not"
                )
            if prefix.shape[1] != 2 * layers * width[0]:
                raise InvalidArgumentError(
                    f"{self.adapter.path}: prompt_embeddings are {list(prefix.shape)}; the base's keys and values of {layers} layers "
                    f"are {2 * sum(width)}"
                )
            by_layer = prefix.reshape(len(prefix), layers, 2, width[0])
            for layer in range(layers):
                for side, name in enumerate(("given_keys", "given_values")):
                    part = Part(f"layers.{layer}.attention.{name}", weights=by_layer[:, layer, side])
                    part.weight_rows = rows
                    self.reorder_keys(part, layer, name)
                    self.put(part, name)
            embeddings = np.zeros((len(prefix), hidden), np.float32)
        assert embeddings is not None
        if self.base.architecture.startswith(
            "granite"
        ):  # the others multiply in their embedding, without these
            embeddings = embeddings * np.float32(self.base.recipe["embedding"]["scale"])
        if embeddings.shape[1] != hidden:
            raise InvalidArgumentError(
                f"{self.adapter.path}: prompt_embeddings are {list(embeddings.shape)}; the base's hidden size is {hidden}"
            )
        self.put(Part("embedding", weights=embeddings, weight_rows=rows), "prompt_embeddings")

    def reorder_keys(self, part: Part, layer: int, name: str) -> None:
        if name == "given_keys" and self.base.from_gguf and self.base.architecture in _REORDERED:
            assert part.weights is not None
            dim = self.base.block(layer)["mixer"]["head_dim"]
            part.weights = part.weights[:, halves_by_turns(part.weights.shape[1], dim)]

    def apply_magnitude(self, part: Part, delta: Delta) -> None:
        """DoRA: m * (W + BA) / |W + BA|, row by row, of the weights as the bundle has them."""
        import numpy as np

        factors = part.factors()
        assert factors is not None and delta.magnitude is not None
        a, b = factors
        tied = part.target == "output" and "output" not in self.base.by_name
        name = "embedding" if tied else part.target
        if name not in self.base.by_name:
            raise UnsupportedError(
                f"{self.adapter.path}: {delta.module}: DoRA of experts is not run by this version"
            )
        weights = self.as_checkpoint(part.target, self.base.weights(name))
        weights = with_rows(weights, self.seen.get(part.target))
        if weights.shape != (b.shape[0], a.shape[1]) or delta.magnitude.shape != weights.shape[:1]:
            raise InvalidArgumentError(
                f"{self.adapter.path}: {delta.module}: A and B make {[b.shape[0], a.shape[1]]}, the base's matrix "
                f"is {list(weights.shape)}"
            )
        norm = np.linalg.norm(
            weights.astype(np.float64) + b.astype(np.float64) @ a.astype(np.float64), axis=1
        )
        factor = (delta.magnitude / np.maximum(norm, np.finfo(np.float32).tiny)).astype(np.float32)
        part.a, part.b, part.scale = a, b * factor[:, np.newaxis], 1.0
        part.gain = factor - 1
        part.gain_spares_bias = True

    def add_input_gain(self, delta: Delta, target: str) -> None:
        """The input of down is activation(gate) * up, so what scales it may as well scale up."""
        if not target.endswith(".down"):
            raise UnsupportedError(
                f"{self.adapter.path}: {delta.module}: feedforward_modules: read are those behind an activation (down_proj)"
            )
        match = LAYER.fullmatch(target)
        assert match is not None
        ffn = self.base.block(int(match[1]))["ffn"]
        if ffn["activation"] == "clamped_swiglu":
            raise UnsupportedError(
                f"{self.adapter.path}: {delta.module}: its activation takes no scale before it"
            )
        up = target.removesuffix("down") + "up"
        if up in self.input_gains or delta.input_gain is None:
            raise CorruptError(f"{self.adapter.path}: {delta.module}: stands twice")
        self.input_gains[up] = delta.input_gain

    def put_input_gains(self) -> None:
        """Beside what else changes up, which may have a gain of its own."""
        for target, gain in self.input_gains.items():
            part = self.seen.get(target)
            if part is None:
                self.put(Part(target, gain=gain), target)
            elif part.gain is None:
                part.gain = gain
            elif part.gain.shape == gain.shape:
                part.gain = (1 + part.gain) * (1 + gain) - 1
            else:
                raise InvalidArgumentError(
                    f"{self.adapter.path}: {target}: gains of {part.gain.size} outputs, and of {gain.size} inputs of down"
                )

    def row_order(self, target: str) -> "NDArray[numpy.int64] | None":
        """Which of the checkpoint's rows stands at each place, where a GGUF file of some architectures has a head's halves of
        queries and keys by turns."""
        match = re.fullmatch(r"layers[.](\d+)[.]attention[.]([qk])", target)
        if match is None or not self.base.from_gguf or self.base.architecture not in _REORDERED:
            return None
        dim = self.base.block(int(match[1]))["mixer"]["head_dim"]
        return halves_by_turns(self.base.by_name[target]["shape"][0], dim)

    def as_checkpoint(self, target: str, own: "Array") -> "Array":
        """The base's rows in the order in which the adapter has its own."""
        import numpy as np

        order = self.row_order(target)
        return own if order is None else own[np.argsort(order)]

    def reorder(self, part: Part) -> None:
        """Into the order of the base's rows."""
        import numpy as np

        order = self.row_order(part.target)
        if order is None:
            return
        rows = len(order)
        lengths = {len(array) for array in (part.b, part.gain, part.shift, part.weights) if array is not None}
        if lengths - {rows} or (part.rows is not None and part.rows.max() >= rows):
            return  # refused by what comes next
        if part.b is not None:
            part.b = part.b[order]
        if part.gain is not None:
            part.gain = part.gain[order]
        if part.shift is not None:
            part.shift = part.shift[order]
        if part.weights is not None:
            part.weights = part.weights[order]
        if part.rows is not None:
            part.rows = np.argsort(order).astype(np.int32)[part.rows]
