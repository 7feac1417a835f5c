"""LoRA of tensors that hold all experts of a layer, as LoRA of every expert's matrices."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgert.errors import InvalidArgumentError, UnsupportedError

from .adapter_base import Base
from .adapter_part import Part
from .adapter_targets import LAYER, Targets
from .peft_reader import FusedDelta, PeftAdapter

if TYPE_CHECKING:
    from numpy.typing import NDArray

_EXPERTS = re.compile(r"(?:(?:mlp|block_sparse_moe|feed_forward)[.])?experts")
# Whose tensors of all experts are [experts, inputs, outputs].
_INPUTS_FIRST = ("gpt_oss", "llama4_text", "llama4")
_INTERLEAVED = ("gpt_oss",)  # gate and up by turns


def expert_parts(adapter: PeftAdapter, base: Base, targets: Targets, fused: FusedDelta) -> Iterator[Part]:
    """Of every expert's matrices. Raises InvalidArgumentError and UnsupportedError."""
    match = LAYER.fullmatch(fused.module)
    if match is None or _EXPERTS.fullmatch(match[2]) is None:
        targets.unknown(fused.module)
    layer = int(match[1])
    ffn = base.block(layer)["ffn"]
    if ffn["kind"] != "moe":
        targets.unknown(fused.module)
    a, b = _by_expert(adapter, base, fused, ffn)
    scale = fused.scale(a.shape[1])
    width = ffn["moe_intermediate_size"]
    for e in range(ffn["num_experts"]):
        prefix = f"layers.{layer}.experts.{e}."
        if fused.parameter == "down_proj":
            yield Part(prefix + "down", a[e], b[e], scale)
        elif base.architecture in _INTERLEAVED:
            yield Part(prefix + "gate", a[e], b[e][0::2], scale)
            yield Part(prefix + "up", a[e], b[e][1::2], scale)
        else:
            yield Part(prefix + "gate", a[e], b[e][:width], scale)
            yield Part(prefix + "up", a[e], b[e][width:], scale)


def _by_expert(
    adapter: PeftAdapter, base: Base, fused: FusedDelta, ffn: dict[str, Any]
) -> "tuple[NDArray[Any], NDArray[Any]]":
    """a [experts, rank, inputs] and b [experts, outputs, rank]."""
    experts, width, hidden = (
        ffn["num_experts"],
        ffn["moe_intermediate_size"],
        base.recipe["hidden_size"],
    )
    outputs, inputs = (hidden, width) if fused.parameter == "down_proj" else (2 * width, hidden)
    rank = fused.a.shape[0] // experts
    if rank * experts != fused.a.shape[0] or fused.b.shape[1] != fused.a.shape[0]:
        raise InvalidArgumentError(
            f"{adapter.path}: {fused.module}: lora_A has {fused.a.shape[0]} rows; the base has {experts} experts"
        )
    a = fused.a.reshape(experts, rank, -1)
    b = fused.b.reshape(fused.b.shape[0], rank, experts).transpose(2, 0, 1)
    found = (fused.b.shape[0], fused.a.shape[1])
    if found not in ((outputs, inputs), (inputs, outputs)):
        raise InvalidArgumentError(
            f"{adapter.path}: {fused.module}.{fused.parameter}: A and B make {list(found)}; the base's matrix is "
            f"{[outputs, inputs]}"
        )
    if not _is_direct(adapter, base, fused, ffn, square=outputs == inputs):
        a, b = b.swapaxes(1, 2), a.swapaxes(1, 2)
    return a, b


def _is_direct(
    adapter: PeftAdapter, base: Base, fused: FusedDelta, ffn: dict[str, Any], *, square: bool
) -> bool:
    """Whether A reads the experts' inputs. Where the matrix is square, the version says so: PEFT took the two dimensions
    of [experts, outputs, inputs] the wrong way around before 0.19.1, and those of [experts, inputs, outputs] in 0.19.0;
    and if no version is written, the other tensor of the experts."""
    hidden, width = base.recipe["hidden_size"], ffn["moe_intermediate_size"]
    inputs = width if fused.parameter == "down_proj" else hidden
    if not square:
        return bool(fused.a.shape[1] == inputs)
    version = adapter.version
    if version is not None:
        inputs_first = base.architecture in _INPUTS_FIRST
        if version >= (0, 19, 1):
            return True
        return inputs_first and version < (0, 19)
    for other in adapter.fused:
        if other.module == fused.module and other.parameter != fused.parameter:
            reads = width if other.parameter == "down_proj" else hidden
            if len(set(other.a.shape[1:] + other.b.shape[:1])) > 1:
                return bool(other.a.shape[1] == reads)
    raise UnsupportedError(
        f"{adapter.path}: {fused.module}.{fused.parameter}: the matrix is square and {adapter.path.name} states no "
        "peft_version, so that nothing says which side is which"
    )
