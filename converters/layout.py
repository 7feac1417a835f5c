"""Where every packed byte of a bundle goes; complete before the first one is written."""

from dataclasses import dataclass, field

from edgert import _native
from edgert.errors import InvalidArgumentError, UnsupportedError

from .decoder import Decoder, Expert, Source
from .formats import Formats
from .moments import InputMoments, Measured, MomentsOf
from .pack import Part, split_shape
from .tensor import FLOAT_FORMATS

MAX_EXPERT_FILE_BYTES = 16 << 30
MIN_ALIGNMENT, MAX_ALIGNMENT, DEFAULT_ALIGNMENT = 4096, 1 << 20, 16384
_TENSOR_ALIGNMENT = 64
_CODEBOOKS = frozenset(row["name"] for row in _native.formats() if row["codebook"] != "none")


@dataclass(frozen=True, slots=True)
class Split:
    """Of an expert whose base is stored before what makes it whole: sizes in bytes, the second of both."""

    base_bytes: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Extent:
    """A dense tensor, or one expert's gate, up and down and then their biases, at `offset` of a file."""

    parts: tuple[Part, ...]
    file: int
    offset: int
    shape: tuple[int, ...] = ()  # of a dense tensor
    expert: tuple[int, int] | None = None  # layer and index
    split: Split | None = None  # of an expert that is stored as base and refinement

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts) if self.split is None else self.split.bytes


@dataclass
class BundleFile:
    name: str
    bytes: int


@dataclass
class Layout:
    alignment: int
    files: list[BundleFile] = field(default_factory=list)
    dense: list[Extent] = field(default_factory=list)
    experts: list[Extent] = field(default_factory=list)
    remainder_file: int | None = None

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def plan_layout(
    decoder: Decoder,
    formats: Formats,
    *,
    alignment: int,
    remainders: bool,
    calibration: Measured | None = None,
    split_experts: bool = False,
) -> Layout:
    """With a `calibration` of the model the errors of matrices are weighed by what it measured of their inputs.
    `split_experts`: those whose formats can be split are. Raises InvalidArgumentError for an alignment that is not a
    power of two from 4096 to 1048576, and where no expert can be split."""
    if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise InvalidArgumentError(
            f"alignment: {alignment}; a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT} is allowed"
        )
    moments = None if calibration is None else MomentsOf(calibration, decoder.recipe)
    layout = _Planner(alignment, remainders, moments, split_experts).plan(decoder, formats)
    if split_experts and not any(extent.split for extent in layout.experts):
        raise InvalidArgumentError(
            "split_experts: no expert has formats that split; those are int8, int4 and int4_32"
        )
    return layout


class _Planner:
    def __init__(
        self, alignment: int, remainders: bool, moments: MomentsOf | None, split_experts: bool
    ) -> None:
        self._layout = Layout(alignment)
        self._moments = moments
        self._split_experts = split_experts
        self._remainders = BundleFile("remainders.bin", alignment) if remainders else None

    def plan(self, decoder: Decoder, formats: Formats) -> Layout:
        layout = self._layout
        file = self._new_file("dense.bin")
        for tensor in decoder.dense:
            part = self._part(
                tensor.name,
                tensor.source,
                formats.of(tensor.kind, tensor.source),
                is_vector=len(tensor.shape) == 1,
                moments=None if self._moments is None else self._moments.dense(tensor.name),
            )
            extent = Extent((part,), 0, _up(file.bytes, _TENSOR_ALIGNMENT), tensor.shape)
            file.bytes = extent.offset + extent.bytes
            layout.dense.append(extent)
        for expert in decoder.experts:
            self._place_expert(expert.layer, expert.index, self._expert_parts(expert, formats))
        for file in layout.files:
            file.bytes = _up(file.bytes, layout.alignment)
        if self._remainders is not None:
            self._remainders.bytes = _up(self._remainders.bytes, layout.alignment)
            layout.remainder_file = len(layout.files)
            layout.files.append(self._remainders)
        return layout

    def _expert_parts(self, expert: Expert, formats: Formats) -> tuple[Part, ...]:
        prefix = f"layers.{expert.layer}.experts.{expert.index}."
        names = formats.of_expert(expert)
        unknown = None, None, None
        moments = unknown if self._moments is None else self._moments.expert(expert.layer, expert.index)
        projections = ("gate", "up", "down")
        matrices = [
            self._part(prefix + projection, source, name, moments=inputs)
            for projection, source, name, inputs in zip(
                projections, expert.sources, names, moments, strict=True
            )
        ]
        biases = zip(("gate_bias", "up_bias", "down_bias"), expert.biases, strict=False)
        return *matrices, *(
            self._part(prefix + name, source, "f32", is_vector=True) for name, source in biases
        )

    def _place_expert(self, layer: int, index: int, parts: tuple[Part, ...]) -> None:
        layout = self._layout
        split = _split(parts) if self._split_experts else None
        size = sum(part.bytes for part in parts) if split is None else split.bytes
        if layout.alignment + size > MAX_EXPERT_FILE_BYTES:
            raise UnsupportedError(
                f"{parts[0].name}: an expert of {size} bytes; at most {MAX_EXPERT_FILE_BYTES} is supported"
            )
        offset = _up(layout.files[-1].bytes, layout.alignment)
        if len(layout.files) == 1 or offset + size > MAX_EXPERT_FILE_BYTES:
            offset = self._new_file(f"experts-{len(layout.files) - 1:05}.bin").bytes
        layout.files[-1].bytes = offset + size
        layout.experts.append(
            Extent(parts, len(layout.files) - 1, offset, expert=(layer, index), split=split)
        )

    def _new_file(self, name: str) -> BundleFile:
        self._layout.files.append(BundleFile(name, self._layout.alignment))  # the header
        return self._layout.files[-1]

    def _part(
        self,
        name: str,
        source: Source,
        format_name: str,
        *,
        is_vector: bool = False,
        moments: InputMoments | None = None,
    ) -> Part:
        offset = None
        exact = format_name in FLOAT_FORMATS or format_name == source.tensor.stored_format
        if self._remainders is not None and not exact:
            if format_name in _CODEBOOKS:
                raise InvalidArgumentError(
                    f"remainders: {name} is {format_name}, whose values are not evenly spaced; int8, int4, int3 or int2 "
                    "have remainders"
                )
            offset = _up(self._remainders.bytes, _TENSOR_ALIGNMENT)
            self._remainders.bytes = offset + source.rows * source.cols
        return Part(name, source, format_name, is_vector, offset, moments)


def _split(parts: tuple[Part, ...]) -> Split | None:
    """None where the formats of an expert's parts do not split."""
    sizes = _native.split_sizes(*split_shape(parts))
    return None if sizes is None else Split(*sizes)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
