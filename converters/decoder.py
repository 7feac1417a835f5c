"""What a family says about a model: the recipe, and where each of its tensors is in the checkpoint."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edgert.errors import CorruptError, UnsupportedError

from .tensor import Tensor, TensorInfo, TransposedTensor

# The kinds choose formats separately; "exact" is always f32 (router, shared-expert gate, norms, biases).
Kind = Literal["embedding", "output", "dense", "exact"]


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of a checkpoint tensor: all of them, or `rows` from `first_row` on, each `step` after the one before. Every
    dimension but the last counts as rows."""

    tensor: Tensor
    first_row: int
    rows: int
    cols: int
    step: int = 1

    @property
    def bytes(self) -> int:
        """In the checkpoint."""
        return self.rows * self.tensor.row_bytes


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A resident tensor by its canonical name; `shape` is [rows, cols] or [n]."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    source: Source


@dataclass(frozen=True, slots=True)
class Expert:
    layer: int
    index: int
    gate: Source
    up: Source
    down: Source
    biases: tuple[Source, ...] = ()  # of gate, up and down, where it has them

    @property
    def sources(self) -> tuple[Source, Source, Source]:
        return self.gate, self.up, self.down


@dataclass
class Decoder:
    """A model ready to be packed."""

    recipe: dict[str, Any]
    dense: list[DenseTensor] = field(default_factory=list)
    experts: list[Expert] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    same: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # must hold equal weights

    @property
    def quantised(self) -> bool:
        """Whether the checkpoint holds a format that can be kept."""
        sources = [tensor.source for tensor in self.dense]
        sources += [source for expert in self.experts for source in expert.sources]
        return any(source.tensor.stored_format is not None for source in sources)


class SourceTensors:
    """Hands out the tensors of a checkpoint with the shape that the configuration demands, and in the end
    refuses those that nobody asked for: a tensor left over is an operation left out."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        where: str,
        config_name: str = "config.json",
        spelled: Callable[[str], str] = lambda name: name,
    ) -> None:
        """`config_name` states the configuration; `spelled` gives a name as the checkpoint itself has it."""
        self._tensors = tensors
        self._where = where
        self._config_name = config_name
        self._spelled = spelled
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def find(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Raises CorruptError when missing or of another shape, UnsupportedError for elements that are not
        read."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CorruptError(
                f"{self._where}: tensor {self._spelled(name)!r} is missing; {self._config_name} demands it"
            )
        if tensor.shape != shape:
            raise CorruptError(
                f"{tensor.path}: tensor {tensor.name!r}: shape {list(tensor.shape)}; "
                f"{self._config_name} demands {list(shape)}"
            )
        tensor.check()
        self._used.add(name)
        return tensor

    def whole(self, name: str, shape: tuple[int, ...]) -> Source:
        rows = shape[0] if len(shape) == 2 else 1
        return Source(self.find(name, shape), 0, rows, shape[-1])

    def shape(self, name: str) -> tuple[int, ...] | None:
        """That of the checkpoint's tensor; None where it has none."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.shape

    def within(self, prefix: str) -> "SourceTensors":
        """Those whose name begins so, without it; their finish() is the caller's to call."""
        inner = {
            name.removeprefix(prefix): tensor
            for name, tensor in self._tensors.items()
            if name.startswith(prefix)
        }
        self.leave_out(prefix)
        return SourceTensors(inner, self._where)

    def leave_out(self, prefix: str) -> int:
        """Do without the tensors of this prefix; returns how many there are."""
        names = [name for name in self._tensors if name.startswith(prefix)]
        self._used.update(names)
        return len(names)

    def is_plain(self, name: str) -> bool:
        """Whether the checkpoint has this tensor as floats."""
        return isinstance(self._tensors.get(name), TensorInfo)

    def transposed(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of this shape that the checkpoint holds with its last two dimensions exchanged."""
        *outer, outputs, inputs = shape
        return TransposedTensor(self._floats(name, (*outer, inputs, outputs)))

    def elements(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor with each element as a row of its own."""
        return replace(self._floats(name, shape), shape=(*shape, 1))

    def _floats(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        tensor = self.find(name, shape)
        if not isinstance(tensor, TensorInfo):
            raise UnsupportedError(f"{tensor.path}: tensor {name!r}: is quantised; only floats are read here")
        return tensor

    def finish(self, without_effect: Collection[str] = ()) -> None:
        """Refuse what is left over. `without_effect`: endings of names that may be."""
        for name, tensor in self._tensors.items():
            if name not in self._used and not name.endswith(tuple(without_effect)):
                raise UnsupportedError(
                    f"{tensor.path}: tensor {tensor.name!r} is not part of this model as {self._config_name} "
                    "describes it; "
                    "it is not ignored, for it may change what the model computes"
                )
