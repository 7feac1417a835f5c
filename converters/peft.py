"""Adapters as the PEFT library saves them: adapter_config.json and adapter_model.safetensors.

Whatever its kind, an adapter is reduced to what it adds to the output of a module, y = W x + b:

    y + gain * (W x, or y itself) + B (A x) + S x

Formats: PEFT 0.18 to 0.21 (huggingface.co/docs/peft), read from what it writes.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from edgert.errors import CorruptError, NotFoundError, UnsupportedError

from . import peft_kinds as kinds
from . import peft_low_rank as low_rank
from .checkpoint import resolve
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

# What PEFT up to 0.21 writes for these kinds.
_OPTIONS = """
    alora_invocation_tokens alpha alpha_pattern arrow_config auto_mapping base_model_name_or_path beta1 beta2
    bias corda_config cpt_mask cpt_token_ids cpt_tokens_type_mask d_initial deltaT encoder_dropout
    encoder_hidden_size encoder_num_layers encoder_reparameterization_type ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out feedforward_modules generator_seed inference_mode init_ia3_weights
    init_lora_weights init_r init_weights kasa_config layer_replication layers_pattern layers_to_transform
    loftq_config lora_alpha lora_bias lora_dropout lora_ga_config mask_type megatron_config megatron_core
    mini_r miss_dropout module_dropout modules_to_save monteclora_config num_attention_heads
    num_frozen_tokens num_layers num_transformer_submodules num_virtual_tokens opt_loss_decay_factor
    opt_projection_epsilon opt_projection_format_epsilon opt_weighted_loss_type orth_reg_weight peft_type
    peft_version prefix_projection projection_prng_key prompt_tuning_init prompt_tuning_init_text
    pvera_dropout qalora_group_size r random_seed rank_dropout rank_pattern revision runtime_config
    sample_at_inference save_precomputed_indices save_projection select_top sparsity target_modules
    target_parameters target_r task_type tfinal tinit token_dim token_indices tokenizer_kwargs
    tokenizer_name_or_path total_step trainable_token_indices use_bdlora use_dora use_effective_conv2d
    use_qalora use_rslora velora_config vera_dropout
    """


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
    config = read_json_object(resolve(directory, CONFIG), max_bytes=_MAX_CONFIG_BYTES)
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
    known = set(_OPTIONS.split())
    reader.adapter.unknown = sorted(key for key, value in config.items() if value and key not in known)
    return reader.adapter


def doubts(adapter: PeftAdapter, bundle: str) -> list[str]:
    """What speaks against running it on this bundle, although its shapes and the names of its modules fit."""
    found = []
    if adapter.unknown:
        found.append(
            f"{adapter.path / CONFIG}: {', '.join(adapter.unknown[:8])[:160]}: not known to this version, which reads what PEFT up to "
            "0.21 writes; what they change, if anything, is not run"
        )
    base = adapter.base_model or ""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base):  # a name of the hub, and no path
        named, given = (re.sub(r"[\W_]", "", name.lower()) for name in (base.partition("/")[2], bundle))
        if named not in given and given not in named:
            found.append(
                f"{adapter.path}: is for {base[:120]}, as far as it says, and the base is called {bundle}; its shapes and the names of "
                "its modules fit, and nothing more is known"
            )
    return found
