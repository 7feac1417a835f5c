"""Where the experts of a layer are in a checkpoint: one by one, all in a tensor, and gate and up apart or as one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..decoder import Expert, Source, SourceTensors
from ..tensor import Tensor

# How a tensor of all experts' gate and up has them: "rows": [experts, gate rows then up rows, hidden], with down
# [experts, hidden, width]; "columns": both with the last two dimensions exchanged; "interleaved": as columns, gate and up
# by turns, but by rows where the tensors are quantised.
Fused = Literal["rows", "columns", "interleaved"]


# What such tensors of gate and up, and of down, are called.
_FUSED_NAMES = (
    ("experts.gate_up_proj", "experts.down_proj"),
    ("input_linear.weight", "output_linear.weight"),
)


@dataclass(frozen=True)
class ExpertLayout:
    module: str
    names: tuple[str, str, str]  # of gate, up and down, where each expert has its own
    fused: Fused
    biased: bool


def experts_of(
    tensors: SourceTensors, layout: ExpertLayout, layer: int, ffn: dict[str, Any], hidden: int
) -> Iterator[Expert]:
    """The experts of `layer`, whose recipe is `ffn`."""
    count, width = ffn["num_experts"], ffn["moe_intermediate_size"]
    for names in _FUSED_NAMES:
        gate_up, down = (layout.module + name for name in names)
        if gate_up in tensors:
            finder = _Fused(tensors, layout, gate_up, down, (count, width, hidden))
            return (finder.expert(layer, index) for index in range(count))
    if layout.module + "experts.gate_proj" in tensors:
        return _stacked(tensors, layout, layer, count, width, hidden)
    return _separate(tensors, layout, layer, count, width, hidden)


def _separate(
    tensors: SourceTensors, layout: ExpertLayout, layer: int, count: int, width: int, hidden: int
) -> Iterator[Expert]:
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    for index in range(count):
        gate, up, down = (
            tensors.whole(f"{layout.module}experts.{index}.{part}.weight", shape)
            for part, shape in zip(layout.names, shapes, strict=True)
        )
        biases: tuple[Source, ...] = ()
        if layout.biased:
            biases = tuple(
                Source(tensors.elements(f"{layout.module}experts.{index}.{part}.bias", (rows,)), 0, rows, 1)
                for part, (rows, _) in zip(layout.names, shapes, strict=True)
            )
        yield Expert(layer, index, gate, up, down, biases)


def _stacked(
    tensors: SourceTensors, layout: ExpertLayout, layer: int, count: int, width: int, hidden: int
) -> Iterator[Expert]:
    """Three tensors, each of all experts, and as many of biases."""
    matrices, biases = [], []
    for part, rows, cols in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
        matrices.append(
            (tensors.find(f"{layout.module}experts.{part}_proj", (count, rows, cols)), rows, cols)
        )
        if layout.biased:
            biases.append(
                (tensors.elements(f"{layout.module}experts.{part}_proj_bias", (count, rows)), rows, 1)
            )
    for index in range(count):
        gate, up, down = (Source(all_, rows * index, rows, cols) for all_, rows, cols in matrices)
        own = tuple(Source(all_, rows * index, rows, cols) for all_, rows, cols in biases)
        yield Expert(layer, index, gate, up, down, own)


class _Fused:
    """All experts in one tensor of gate and up, and one of down."""

    def __init__(
        self,
        tensors: SourceTensors,
        layout: ExpertLayout,
        gate_up: str,
        down: str,
        sizes: tuple[int, int, int],
    ) -> None:
        count, self.width, self.hidden = sizes
        # Where up follows gate, and how far the next row of the same is.
        self.up, self.step = (1, 2) if layout.fused == "interleaved" else (self.width, 1)
        exchanged = layout.fused != "rows" and tensors.is_plain(gate_up)
        find = tensors.transposed if exchanged else tensors.find
        self.gate_up = find(gate_up, (count, 2 * self.width, self.hidden))
        self.down = find(down, (count, self.hidden, self.width))
        self.biases: tuple[Tensor, Tensor] | None = None
        if layout.biased:
            self.biases = (
                tensors.elements(gate_up + "_bias", (count, 2 * self.width)),
                tensors.elements(down + "_bias", (count, self.hidden)),
            )

    def expert(self, layer: int, index: int) -> Expert:
        biases: tuple[Source, ...] = ()
        if self.biases is not None:
            gate_up, down = self.biases
            biases = (*self.halves(gate_up, index, 1), Source(down, self.hidden * index, self.hidden, 1))
        gate, up = self.halves(self.gate_up, index, self.hidden)
        return Expert(
            layer, index, gate, up, Source(self.down, self.hidden * index, self.hidden, self.width), biases
        )

    def halves(self, gate_up: Tensor, index: int, cols: int) -> tuple[Source, Source]:
        first = 2 * self.width * index
        return (
            Source(gate_up, first, self.width, cols, self.step),
            Source(gate_up, first + self.up, self.width, cols, self.step),
        )
