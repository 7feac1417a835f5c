"""AWQ in the gemm layout, as AutoAWQ saves it.

Of a linear layer X [out, in]: X.qweight I32 [in, out / 8], X.qzeros I32 [groups, out / 8], both packed along the
rows, eight outputs a word in the order 0 2 4 6 1 3 5 7 from the lowest bits on; X.scales [groups, out].
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..config import Config
from ..tensor import Tensor, TensorInfo
from .bits import Bytes, Words
from .coded import CodedTensor, Grid
from .parts import SCALES, WORDS, Parts, add_tensor, check_matrix, check_part, need_part

KEYS_WITHOUT_EFFECT = frozenset({
    "quant_method", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config",
    "modules_to_not_convert",
})  # fmt: skip

_MAX_GROUP = 1 << 20
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class _AwqTensor(CodedTensor):
    group_size: int

    @property
    def bits(self) -> int:
        return 4

    @property
    def group(self) -> int:
        return self.group_size

    def codes(self, parts: Parts, first_row: int, rows: int) -> Bytes:
        return _outputs(parts, self.parts[0], first_row, rows)

    def grid(self, parts: Parts, first_row: int, rows: int) -> Grid:
        scales = parts.float_columns(self.parts[1], first_row, rows).T
        return Grid(np.ascontiguousarray(scales), _outputs(parts, self.parts[2], first_row, rows))


def _outputs(parts: Parts, packed: TensorInfo, first: int, count: int) -> Bytes:
    """`count` outputs from `first` on, [outputs, packed rows]."""
    begin, end = first // 8, -(-(first + count) // 8)
    words: Words = parts.columns(packed, begin, end - begin).view("<u4")
    words = np.ascontiguousarray(words.T)
    codes = np.empty((end - begin, 8, words.shape[1]), np.uint8)
    for place, output in enumerate(_ORDER):
        codes[:, output] = (words >> (4 * place)) & 15
    return codes.reshape(-1, words.shape[1])[first - 8 * begin :][:count]


def read(settings: Config, tensors: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """See read_scheme()."""
    bits = settings.integer("bits" if settings.get("bits") else "w_bit", minimum=2, maximum=8)
    if bits != 4:
        settings.fail("bits", f"{bits}; 4 is allowed")
    key = "group_size" if settings.get("group_size") else "q_group_size"
    declared = settings.integer(key, minimum=-1, maximum=_MAX_GROUP)
    for key in ("version", "format"):
        settings.choice(key, "gemm", ("gemm", "GEMM"))
    settings.flag("zero_point", True)  # zeros are stored in either case

    found: dict[str, Tensor] = dict(tensors)
    for name in tensors:
        layer = name.removesuffix("qweight")
        if layer == name:
            continue
        parts = tuple(need_part(tensors, layer + part) for part in ("qweight", "scales", "qzeros"))
        for part in parts:
            check_matrix(part)
            del found[part.name]
        qweight, scales, qzeros = parts
        inputs, outputs = qweight.shape[0], 8 * qweight.shape[1]
        group = inputs if declared == -1 else declared
        groups = -(-inputs // group)
        because = f"4 bits in groups of {group} for {outputs} outputs of {inputs} inputs"
        check_part(qweight, WORDS, (inputs, outputs // 8), because)
        check_part(scales, SCALES, (groups, outputs), because)
        check_part(qzeros, WORDS, (groups, outputs // 8), because)
        add_tensor(found, _AwqTensor(layer + "weight", (outputs, inputs), parts, group))
    return found
