"""Adapters as the PEFT library saves them: adapter_config.json and adapter_model.safetensors.

Whatever its kind, an adapter is reduced to what it adds to the output of a module, y = W x + b:

    y + gain * (W x, or y itself) + B (A x) + S x

Formats: PEFT 0.18 to 0.21 (huggingface.co/docs/peft), read from what it writes.
"""

import os
from collections.abc import Callable
from pathlib import Path

from edgert.errors import CorruptError, NotFoundError, UnsupportedError

from . import peft_kinds as kinds
from . import peft_low_rank as low_rank
from .peft_reader import CONFIG, WEIGHTS, PeftAdapter, Reader
from .strict_json import read_json_object

_MAX_CONFIG_BYTES = 1 << 20
_KINDS: dict[str, Callable[[Reader], None]] = {
    "LORA": low_rank.lora,
    "ADALORA": low_rank.adalora,
    "VERA": low_rank.vera,
    "PVERA": low_rank.pvera,
    "LOHA": low_rank.loha,
    "MISS": low_rank.miss,
    "SHIRA": kinds.shira,
    "SUPERTUNING": kinds.supertuning,
    "IA3": kinds.ia3,
    "BEFT": kinds.beft,
    "TRAINABLE_TOKENS": kinds.trainable_tokens,
    "LN_TUNING": kinds.ln_tuning,
    "PROMPT_TUNING": kinds.prompt,
    "P_TUNING": kinds.prompt,
    "CPT": kinds.prompt,
    "PREFIX_TUNING": kinds.prefix,
    "CARTRIDGE": kinds.prefix,
}


def is_peft(path: str | os.PathLike[str]) -> bool:
    return os.path.lexists(Path(path) / CONFIG)


def _below(directory: Path) -> str:
    """Where a model had several adapters, each has a directory of its own."""
    try:
        names = sorted(entry.name for entry in directory.iterdir() if is_peft(entry))
    except OSError:
        return ""
    return f", but in {', '.join(names[:8])}" if names else ""


def read_peft(path: str | os.PathLike[str]) -> PeftAdapter:
    """Read a PEFT directory.

    Raises NotFoundError, CorruptError, and UnsupportedError by name for kinds and options that are not read; nothing in
    it is ever executed.
    """
    directory = Path(path)
    if not is_peft(directory):
        raise NotFoundError(f"{directory}: no PEFT adapter (there is no {CONFIG}{_below(directory)})")
    config = read_json_object(directory / CONFIG, max_bytes=_MAX_CONFIG_BYTES)
    if not os.path.lexists(directory / WEIGHTS):
        pickled = (
            "; adapter_model.bin is a pickle and never read"
            if (directory / "adapter_model.bin").exists()
            else ""
        )
        raise NotFoundError(
            f"{directory / WEIGHTS}: missing{pickled}; adapters are read from safetensors "
            "(`model.save_pretrained(..., safe_serialization=True)`)"
        )
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UnsupportedError(
            f"{directory / CONFIG}: peft_type: found {str(kind)[:60]!r}; read are {', '.join(sorted(_KINDS))}; of others, "
            f"{low_rank.WHAT_ELSE}"
        )
    reader = Reader(directory, config, kind)
    reader.refuse("layer_replication", "layers that stand more than once")
    _KINDS[kind](reader)
    kinds.tokens(reader, config.get("trainable_token_indices"), ".token_adapter.trainable_tokens_delta")
    kinds.saved_modules(reader)
    kinds.biases(reader)
    kinds.gates(reader)
    kinds.base_weights(reader)
    if reader.left:
        raise UnsupportedError(
            f"{reader.file}: tensor {min(reader.left)!r}: has no place in a {kind} adapter that this version reads; it is "
            "not ignored, for it may change what the model computes"
        )
    if reader.adapter.is_empty:
        raise CorruptError(f"{reader.file}: holds no tensor of an adapter")
    return reader.adapter
