"""Which weight format each tensor gets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgert import _native
from edgert.errors import InvalidArgumentError

from .decoder import Expert, Kind, Source
from .tensor import FLOAT_FORMATS

ExpertFormat = str | Sequence[str]  # one format, or one each for gate, up and down
ExpertFormats = Mapping[str, ExpertFormat] | Callable[[int, int], ExpertFormat | None]
Triple = tuple[str, str, str]
Chosen = Mapping[tuple[int, int], Triple]  # by layer and expert


@dataclass(frozen=True)
class Defaults:
    """The choices of a conversion for no device in particular; a device profile states its own."""

    dense_format: str = "int8"
    expert_format: str = "int4"
    embedding_format: str = "int8"
    output_format: str = "int8"


@dataclass(frozen=True)
class Formats:
    """The formats of one conversion, checked."""

    dense: str
    embedding: str
    output: str
    expert: Triple
    experts: ExpertFormats | None = None
    stored: frozenset[str] = frozenset()  # the kinds that keep the format that they are stored in, if any
    chosen: Chosen | None = None  # by expert_bits.py

    def of(self, kind: Kind, source: Source) -> str:
        """Router, gates, norms and biases are always f32."""
        if kind in self.stored and source.tensor.stored_format is not None:
            return source.tensor.stored_format
        return {"dense": self.dense, "embedding": self.embedding, "output": self.output, "exact": "f32"}[kind]

    def options(self) -> dict[str, Any]:
        """As the manifest's report states them."""
        return {
            "dense_format": self.dense,
            "embedding_format": self.embedding,
            "output_format": self.output,
            "expert_format": list(self.expert),
            "mixed_experts": self.experts is not None or self.chosen is not None,
            **({"stored_formats": sorted(self.stored)} if self.stored else {}),
        }

    def of_expert(self, expert: Expert) -> Triple:
        """As chosen; else the first of "layer.expert", "layer.*", "*.expert" that is listed, else as stored, else the
        default."""
        if self.chosen is not None:
            return self.chosen[expert.layer, expert.index]
        listed = self._listed(expert.layer, expert.index)
        if listed is not None or "expert" not in self.stored:
            return listed or self.expert
        gate, up, down = (
            source.tensor.stored_format or default
            for source, default in zip(expert.sources, self.expert, strict=True)
        )
        return gate, up, down

    def _listed(self, layer: int, expert: int) -> Triple | None:
        if self.experts is None:
            return None
        if callable(self.experts):
            chosen = self.experts(layer, expert)
        else:
            keys = (f"{layer}.{expert}", f"{layer}.*", f"*.{expert}")
            chosen = next((self.experts[key] for key in keys if key in self.experts), None)
        return None if chosen is None else _triple(f"expert_formats: expert {layer}.{expert}", chosen)

    def check_experts(self, num_experts: Sequence[int]) -> None:
        """Refuse keys that name no expert; `num_experts` by layer, 0 where there are none."""
        if self.experts is None or callable(self.experts):
            return
        if not isinstance(self.experts, Mapping):
            raise InvalidArgumentError(
                'expert_formats: a mapping such as {"0.3": "int8", "1.*": "int2"} is needed'
            )
        for key in self.experts:
            layer, dot, expert = str(key).partition(".")
            layers = range(len(num_experts)) if layer == "*" else _index(layer, len(num_experts))
            if not dot or not any(
                (expert == "*" and num_experts[i]) or _index(expert, num_experts[i]) for i in layers
            ):
                raise InvalidArgumentError(
                    f"expert_formats: {str(key)[:80]!r} names no expert of this model; "
                    '"layer.expert", "layer.*" and "*.expert" are allowed'
                )


def choose_formats(
    dense: str | None,
    expert: ExpertFormat | None,
    embedding: str | None,
    output: str | None,
    experts: ExpertFormats | None,
    defaults: Defaults,
    *,
    tied: bool,
    quantised: bool = False,
) -> Formats:
    """Embedding and output follow `dense` where it is given and they are not. Of a checkpoint that is `quantised` already
    every kind that is not given keeps the format that it is stored in. Raises InvalidArgumentError."""
    given = {"dense": dense, "embedding": embedding or dense, "output": output or dense, "expert": expert}
    if tied:
        given["output"] = given["embedding"]
    stored = frozenset(kind for kind, name in given.items() if name is None) if quantised else frozenset()
    if dense is not None:
        _checked("dense_format", dense)
    embedding = _checked("embedding_format", embedding or dense or defaults.embedding_format)
    if not tied:
        output = _checked("output_format", output or dense or defaults.output_format)
    elif output is not None and ("output" in stored or output != embedding):
        found = "the one that it is stored in" if "output" in stored else embedding
        raise InvalidArgumentError(
            f"output_format: {output}, but this model's output is its embedding, whose format is {found} "
            "(see embedding_format)"
        )
    return Formats(
        dense or defaults.dense_format,
        embedding,
        output or embedding,
        _triple("expert_format", expert or defaults.expert_format),
        experts,
        stored,
    )


def candidates() -> tuple[str, ...]:
    """The formats below f16 that weights can be packed in."""
    return tuple(
        row["name"] for row in _native.formats() if row["packs_floats"] and row["name"] not in FLOAT_FORMATS
    )


def _triple(what: str, value: ExpertFormat) -> Triple:
    parts = (value, value, value) if isinstance(value, str) else tuple(value)
    if len(parts) != 3:
        raise InvalidArgumentError(
            f"{what}: {len(parts)} formats; one, or one each for gate, up and down, are allowed"
        )
    gate, up, down = (_checked(what, part) for part in parts)
    return gate, up, down


def _checked(what: str, name: str) -> str:
    packs_floats = {row["name"]: row["packs_floats"] for row in _native.formats()}
    known = ", ".join(format for format, packs in packs_floats.items() if packs)
    if name not in packs_floats:
        raise InvalidArgumentError(f"{what}: {str(name)[:80]!r}; known are {known}")
    if not packs_floats[name]:
        raise InvalidArgumentError(
            f"{what}: {name!r} is only kept from checkpoints that hold it, which leaving the option out does; "
            f"allowed are {known}"
        )
    return name


def _index(text: str, count: int) -> range:
    """The one index that `text` spells, or none."""
    index = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else count
    return range(index, index + 1) if index < count else range(0)
