"""Affine and MXFP4 quantisation as MLX saves it.

Of a layer X [out, in]: X.weight U32 [out, in * bits / 32], a stream of codes along each row, lowest bits first;
X.scales and X.biases [out, in / group]: weight = scale * code + bias. In mode mxfp4 X.scales is U8, E8M0, and there
are no biases. A layer whose scales are missing is plain. config.json's `quantization` has bits, group_size and mode
for all layers, and by name for those that differ.

Routed experts lie together, [experts, out, in], as switch_mlp.gate_proj.weight and so on; gpt-oss says experts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgert.errors import CorruptError

from ..config import Config
from ..tensor import Tensor, TensorInfo
from .bits import Bytes, unpack_bits
from .coded import CodedTensor, Grid
from .mxfp4 import GROUP, Mxfp4Tensor
from .parts import SCALES, WORDS, Parts, check_part, need_part

KEYS_WITHOUT_EFFECT = frozenset({"quant_method"})

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (16, 32, 64, 128)
_EXPERTS = re.compile(r"(.+)[.](?:switch_mlp|experts)[.](gate_proj|up_proj|down_proj)[.](weight|bias)")


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
    modes = _Modes(settings)
    left = dict(tensors)
    found: dict[str, Tensor] = {}
    for name, stored in tensors.items():
        layer = name.removesuffix(".weight")
        if stored.dtype != "U32" or layer == name:
            continue
        mode = modes.of(layer)
        suffixes = (".weight", ".scales", ".biases") if mode.kind == "affine" else (".weight", ".scales")
        parts = tuple(need_part(tensors, layer + suffix) for suffix in suffixes)
        for suffix in suffixes:
            del left[layer + suffix]
        found[_usual(name)] = _tensor(name, parts, mode)
    return {_usual(name): tensor for name, tensor in left.items()} | found


def _usual(name: str) -> str:
    """What other checkpoints call it: routed experts in one tensor have no ending there."""
    match = _EXPERTS.fullmatch(name)
    return (
        name if match is None else f"{match[1]}.experts.{match[2]}" + ("_bias" if match[3] == "bias" else "")
    )


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
        for layer in filter(lambda key: "." in key or key == "lm_head", settings.keys()):
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
    if len(scales.shape) not in (2, 3) or 0 in scales.shape:
        raise CorruptError(
            f"{scales.path}: tensor {scales.name!r}: shape {list(scales.shape)}; [.., outputs, groups] is needed"
        )
    *outputs, groups = scales.shape
    inputs = groups * mode.group
    because = f"{mode.bits} bits in groups of {mode.group} with scales of shape {list(scales.shape)}"
    check_part(weight, WORDS, (*outputs, inputs * mode.bits // 32), because)
    check_part(scales, SCALES if biases else ("U8",), scales.shape, because)
    for part in biases:
        check_part(part, (scales.dtype,), scales.shape, because)
    shape = (*outputs, inputs)
    return (
        _MlxTensor(name, shape, parts, mode.bits, mode.group) if biases else Mxfp4Tensor(name, shape, parts)
    )
