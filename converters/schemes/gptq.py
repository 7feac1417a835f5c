"""GPTQ, as AutoGPTQ and GPTQModel save it.

Of a linear layer X [out, in]: X.qweight I32 [in * bits / 32, out], codes packed down the columns; X.scales
[groups, out]; X.qzeros I32 [groups, out * bits / 32], packed along the rows; X.g_idx I32 [in], the group of each
input, which need not ascend where desc_act was on. Version 1 stores zeros less one.

The bits of each layer follow from its shapes, so layers that config.json's `dynamic` treats apart are read as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.errors import CorruptError, UnsupportedError

from ..config import Config
from ..tensor import Tensor, TensorInfo
from .bits import Bytes, unpack_bits
from .coded import CodedTensor, Grid, column_order
from .parts import SCALES, WORDS, Parts, add_tensor, check_matrix, check_part, need_part

KEYS_WITHOUT_EFFECT = frozenset({
    "quant_method", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "model_name_or_path",
    "model_file_base_name", "meta", "dataset", "tokenizer", "batch_size", "pad_token_id", "disable_exllama",
    "use_exllama", "exllama_config", "max_input_length", "use_cuda_fp16", "model_seqlen", "block_name_to_quantize",
    "module_name_preceding_first_block", "modules_in_block_to_quantize", "cache_block_outputs", "backend", "dynamic",
    "lm_head", "mse", "act_group_aware", "offload_to_disk", "offload_to_disk_path", "desc_act", "quantizer",
    "iters", "nsamples", "seqlen", "enable_quanted_input", "autoround_version", "modules_to_not_convert",
    "v2", "v2_alpha", "mock_quantization", "hyb_act", "lr", "minmax_lr", "enable_minmax_tuning", "data_type",
    "low_gpu_mem_usage", "gradient_accumulate_steps", "not_use_best_mse", "train_bs", "amp", "to_quant_block_names",
    "provider", "packing_format", "scale_dtype",
})  # fmt: skip
"""`desc_act` is seen from g_idx; what is quantised, and to how many bits, from the tensors."""

_BITS = (2, 3, 4, 8)
_MAX_GROUP = 1 << 20


@dataclass(frozen=True)
class _GptqTensor(CodedTensor):
    code_bits: int
    group_size: int
    zero_offset: int  # what is to be added to a stored zero

    @property
    def bits(self) -> int:
        return self.code_bits

    @property
    def group(self) -> int:
        return self.group_size

    def codes(self, parts: Parts, first_row: int, rows: int) -> Bytes:
        words = parts.columns(self.parts[0], first_row, rows).view("<u4")
        return unpack_bits(np.ascontiguousarray(words.T).view(np.uint8), self.bits, self.shape[-1])

    def grid(self, parts: Parts, first_row: int, rows: int) -> Grid:
        _, scales, qzeros = self.parts[:3]
        values = parts.float_columns(scales, first_row, rows).T
        stored = unpack_bits(parts.rows(qzeros, 0, qzeros.shape[0]), self.bits, self.shape[0])
        zeros = stored[:, first_row : first_row + rows].T
        if self.zero_offset and (zeros == (1 << self.bits) - 1).any():
            row, group = np.argwhere(zeros == (1 << self.bits) - 1)[0]
            raise UnsupportedError(
                f"{qzeros.path}: tensor {qzeros.name!r}: group {group}, output {first_row + row}: "
                f"{(1 << self.bits) - 1} stands for a zero of -1 + 1 or of {1 << self.bits}, and readers of this "
                'version of the format disagree; save the model with checkpoint_format "gptq_v2"'
            )
        return Grid(np.ascontiguousarray(values), np.ascontiguousarray(zeros) + np.uint8(self.zero_offset))

    def order(self, parts: Parts) -> npt.NDArray[np.int64] | None:
        if len(self.parts) < 4:
            return None
        return column_order(parts, self.parts[3], self.parts[1].shape[0], self.group)


def read(settings: Config, tensors: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """See read_scheme()."""
    bits = settings.integer("bits", minimum=2, maximum=8)
    group = settings.integer("group_size", minimum=-1, maximum=_MAX_GROUP)
    if bits not in _BITS:
        settings.fail("bits", f"{bits}; {', '.join(map(str, _BITS))} are allowed")
    if group == 0:
        settings.fail("group_size", "0; -1 (one group a column) or a positive number is allowed")
    settings.flag("sym", True)  # zeros are stored in either case
    settings.choice("pack_dtype", "int32", ("int32",))
    settings.choice("method", "gptq", ("gptq",))
    if settings.flag("is_marlin_format", False):
        settings.fail("is_marlin_format", "true; the weights are laid out for one kernel; save them as gptq")
    formats = [settings.choice(key, "gptq", ("gptq", "gptq_v2")) for key in ("checkpoint_format", "format")]
    zero_offset = 0 if "gptq_v2" in formats else 1
    declared = None if settings.get("dynamic") else (bits, group)

    found: dict[str, Tensor] = dict(tensors)
    for name in tensors:
        layer = name.removesuffix("qweight")
        if layer == name:
            continue
        parts = [need_part(tensors, layer + part) for part in ("qweight", "scales", "qzeros")]
        if layer + "g_idx" in tensors:
            parts.append(tensors[layer + "g_idx"])
        for part in parts:
            del found[part.name]
        tensor = _tensor(layer + "weight", tuple(parts), zero_offset, (bits, group), declared)
        add_tensor(found, tensor)
    return found


def _tensor(
    name: str,
    parts: tuple[TensorInfo, ...],
    zero_offset: int,
    default: tuple[int, int],
    declared: tuple[int, int] | None,
) -> _GptqTensor:
    """`declared` are bits and group, None where they may differ from layer to layer."""
    qweight, scales, qzeros = parts[:3]
    for part in (qweight, scales, qzeros):
        check_matrix(part)
    groups, outputs = scales.shape
    bits = default[0] if declared else 32 * qzeros.shape[1] // outputs
    if bits not in _BITS or 32 * qweight.shape[0] % bits:
        raise CorruptError(
            f"{qzeros.path}: tensor {qzeros.name!r}: shape {list(qzeros.shape)} for {outputs} outputs is not one of "
            f"{', '.join(map(str, _BITS))}-bit zeros"
        )
    inputs = 32 * qweight.shape[0] // bits
    group = _group(inputs, groups, default[1] if declared else None, default[1], scales)
    because = f"{bits} bits in groups of {group} for {outputs} outputs of {inputs} inputs"
    check_part(qweight, WORDS, (inputs * bits // 32, outputs), because)
    check_part(scales, SCALES, (-(-inputs // group), outputs), because)
    check_part(qzeros, WORDS, (groups, -(-outputs * bits // 32)), because)
    if len(parts) > 3:
        check_part(parts[3], ("I32",), (inputs,), because)
    return _GptqTensor(name, (outputs, inputs), parts, bits, group, zero_offset)


def _group(inputs: int, groups: int, declared: int | None, usual: int, scales: TensorInfo) -> int:
    """The length of a group; found from their number where none is declared."""
    if declared is not None:
        return inputs if declared == -1 else declared
    for group in (inputs if usual == -1 else usual, *(1 << power for power in range(4, 14)), inputs):
        if -(-inputs // group) == groups:
            return group
    raise CorruptError(f"{scales.path}: tensor {scales.name!r}: {groups} groups for {inputs} inputs")
