"""Affine and MXFP4 quantisation as MLX saves it.

Of a layer X [out, in]: X.weight U32 [out, in * bits / 32], a stream of codes along each row, lowest bits first;
X.scales and X.biases [out, in / group]: weight = scale * code + bias. In mode mxfp4 X.scales is U8, E8M0, and there
are no biases. A layer whose scales are missing is plain. config.json's `quantization` has bits, group_size and mode
for all layers, and by name for those that differ.

Routed experts lie together, [experts, out, in]; they are named one by one here, as other checkpoints have them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgert.errors import CorruptError

from ..config import Config
from ..tensor import Tensor, TensorInfo
from .bits import Bytes, unpack_bits
from .coded import CodedTensor, Grid
from .mxfp4 import GROUP, Mxfp4Tensor
from .parts import SCALES, WORDS, Parts, add_tensor, check_matrix, check_part, need_part

KEYS_WITHOUT_EFFECT = frozenset({"quant_method"})

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (16, 32, 64, 128)
EXPERTS = ".switch_mlp."
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True)
class _MlxTensor(CodedTensor):
    code_bits: int
    group_size: int

    @property
    def bits(self) -> int:
        return self.code_bits

    @property
    def group(self) -> int:
        return self.group_size

    @property
    def affine(self) -> bool:
        return True

    def codes(self, parts: Parts, first_row: int, rows: int) -> Bytes:
        return unpack_bits(parts.rows(self.parts[0], first_row, rows), self.bits, self.shape[-1])

    def grid(self, parts: Parts, first_row: int, rows: int) -> Grid:
        _, scales, biases = self.parts
        return Grid(parts.floats(scales, first_row, rows), biases=parts.floats(biases, first_row, rows))


def read(settings: Config, tensors: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """See read_scheme()."""
    apart, layers = split_experts(tensors)
    modes = _Modes(settings)
    found: dict[str, Tensor] = dict(apart)
    for name, stored in apart.items():
        if stored.dtype != "U32" or not name.endswith(".weight"):
            continue
        layer = name.removesuffix(".weight")
        mode = modes.of(layers.get(layer, layer))
        suffixes = (".weight", ".scales", ".biases") if mode.kind == "affine" else (".weight", ".scales")
        parts = tuple(need_part(apart, layer + suffix) for suffix in suffixes)
        for suffix in suffixes:
            del found[layer + suffix]
        add_tensor(found, _tensor(layer + ".weight", parts, mode))
    return found


def split_experts(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors with those of routed experts one by one, and the layer that each of those lay in.

    M.switch_mlp.gate_proj.weight [experts, ...] becomes M.experts.0.gate_proj.weight and so on.
    """
    apart: dict[str, TensorInfo] = {}
    layers = {}
    for name, tensor in tensors.items():
        module, found, rest = name.partition(EXPERTS)
        if not found:
            apart[name] = tensor
            continue
        if len(tensor.shape) < 2 or 0 in tensor.shape:
            raise CorruptError(
                f"{tensor.path}: tensor {name!r}: shape {list(tensor.shape)}; [experts, ...] is needed"
            )
        projection, _, part = rest.rpartition(".")
        called = _MIXTRAL.get(projection, projection) if module.endswith("block_sparse_moe") else projection
        size = (tensor.end - tensor.begin) // tensor.shape[0]
        for expert in range(tensor.shape[0]):
            layer = f"{module}.experts.{expert}.{called}"
            begin = tensor.begin + expert * size
            apart[f"{layer}.{part}"] = replace(
                tensor, name=f"{name}[{expert}]", shape=tensor.shape[1:], begin=begin, end=begin + size
            )
            layers[layer] = f"{module}{EXPERTS}{projection}"
    return apart, layers


@dataclass(frozen=True)
class _Mode:
    kind: str
    bits: int
    group: int


class _Modes:
    """What config.json says of each layer."""

    def __init__(self, settings: Config) -> None:
        self._settings = settings
        self._default = _mode(settings) if settings.get("bits") is not None else None
        for layer in filter(lambda key: "." in key, settings.keys()):
            settings.get(layer)  # without effect where the layer has no scales

    def of(self, layer: str) -> _Mode:
        own = self._settings.get(layer)
        if isinstance(own, dict):
            return _mode(Config(own, f"{self._settings.where}: {layer}"))
        if own is False or self._default is None:
            self._settings.fail(layer, "not quantised, but the checkpoint has its scales")
        if own not in (None, True):
            self._settings.fail(layer, f"{str(own)[:80]}; an object, true or false is allowed")
        return self._default


def _mode(settings: Config) -> _Mode:
    kind = settings.choice("mode", "affine", ("affine", "mxfp4"))
    bits = settings.integer("bits", 4, minimum=2, maximum=8)
    group = settings.integer("group_size", 64 if kind == "affine" else GROUP, minimum=1, maximum=128)
    allowed = (_BITS, _GROUPS) if kind == "affine" else ((4,), (GROUP,))
    for key, value, values in (("bits", bits, allowed[0]), ("group_size", group, allowed[1])):
        if value not in values:
            settings.fail(key, f"{value}; {', '.join(map(str, values))} is allowed in mode {kind}")
    return _Mode(kind, bits, group)


def _tensor(name: str, parts: tuple[TensorInfo, ...], mode: _Mode) -> Tensor:
    weight, scales, *biases = parts
    check_matrix(scales)
    outputs, groups = scales.shape
    inputs = groups * mode.group
    because = f"{mode.bits} bits in groups of {mode.group} with scales of shape {list(scales.shape)}"
    check_part(weight, WORDS, (outputs, inputs * mode.bits // 32), because)
    check_part(scales, SCALES if biases else ("U8",), (outputs, groups), because)
    for part in biases:
        check_part(part, (scales.dtype,), (outputs, groups), because)
    shape = (outputs, inputs)
    return (
        _MlxTensor(name, shape, parts, mode.bits, mode.group) if biases else Mxfp4Tensor(name, shape, parts)
    )
