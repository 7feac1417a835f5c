"""Typed, exhaustive reading of config.json: what a family does not read is refused, never ignored."""

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

from edgert.errors import CorruptError, UnsupportedError

# Keys without effect on what a trained model computes.
_WITHOUT_EFFECT = {
    "_name_or_path", "name_or_path", "_commit_hash", "architectures", "auto_map", "model_type",
    "transformers_version", "dtype", "torch_dtype", "attention_dropout", "attn_dropout", "hidden_dropout",
    "embd_pdrop", "resid_pdrop", "dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "initializer_factor", "use_cache",
    "output_router_logits", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise",
    "moe_aux_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size", "output_attentions", "output_hidden_states", "output_scores", "return_dict",
    "return_dict_in_generate", "torchscript", "pruned_heads", "chunk_size_feed_forward", "pretraining_tp",
    "gradient_checkpointing", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_experts_implementation", "use_flash_attn", "use_flash_attention", "use_flash_attention_2", "bos_token_id", "eos_token_id",
    "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id", "tokenizer_class", "prefix",
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    "is_encoder_decoder", "is_decoder", "add_cross_attention", "cross_attention_hidden_size",
    "tie_encoder_decoder", "use_bfloat16", "tf_legacy_loss", "bad_words_ids", "begin_suppress_tokens",
    "suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "do_sample", "temperature", "top_k",
    "top_p", "typical_p", "min_length", "max_length", "num_beams", "num_beam_groups",
    "num_return_sequences", "diversity_penalty", "early_stopping", "length_penalty", "repetition_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "remove_invalid_values", "is_llama_config", "unsloth_fixed", "unsloth_version",
    "transformers.js_config", "max_sequence_length", "model_max_length", "tokenizer_model_max_length",
    "neftune_noise_alpha", "for_llm_compressor", "_flash_attn_2_enabled",
}  # fmt: skip

# Keys whose value here changes nothing; another value is an operation that the family does not have.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "qkv_bias": (False, None),
    "mlp_bias": (False, None),
    "clip_qkv": (None,),
    "sliding_window": (None, 0),
    "use_sliding_window": (False, None),
    "head_dim": (None,),
    "partial_rotary_factor": (1.0, 1, None),
    "layer_types": (None,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "per_layer_config": (None,),
    "per_layer_attributes": (None,),
    "logit_scale": (1.0, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "rope_interleaved": (False, None),
    "num_nextn_predict_layers": (0, None),
    "shared_expert_intermediate_size": (0, None),
    "use_mrope": (False, None),
    "compression_ratio": (1.0, None),
}

_MISSING = object()


class Config:
    """config.json of one model.

    Every getter raises CorruptError for a value of the wrong type or out of range. `finish()` raises
    UnsupportedError for a key that nobody read and that is not known to be without effect.
    """

    def __init__(
        self, values: dict[str, Any], where: str, spelled: Callable[[str], str] = lambda key: key
    ) -> None:
        """`spelled` gives a key as the checkpoint itself has it, for messages."""
        self.where = where
        self._values = values
        self._spelled = spelled
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; a null counts as absent."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def stated(self, key: str) -> bool:
        """Whether config.json has the key, be it null."""
        return key in self._values

    def integer(self, key: str, default: int | object = _MISSING, *, minimum: int = 1, maximum: int) -> int:
        value = self._required(key, default)
        if type(value) is not int or not minimum <= value <= maximum:
            self.fail(key, f"{str(value)[:80]}; an integer from {minimum} to {maximum} is allowed")
        return value

    def number(
        self, key: str, default: float | object = _MISSING, *, minimum: float, maximum: float = 1e30
    ) -> float:
        value = self._required(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or not minimum <= value <= maximum:
            self.fail(key, f"{str(value)[:80]}; a number from {minimum:g} to {maximum:g} is allowed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"{str(value)[:80]}; true or false is allowed")
        return value

    def integers(self, key: str, *, maximum: int) -> list[int]:
        value = self.get(key, [])
        if not isinstance(value, list) or any(
            type(item) is not int or not 0 <= item <= maximum for item in value
        ):
            self.fail(key, f"{str(value)[:80]}; a list of integers from 0 to {maximum} is allowed")
        return value

    def choice(self, key: str, default: str, allowed: Iterable[str]) -> str:
        value = self.get(key, default)
        if value not in allowed:
            raise UnsupportedError(
                f"{self.where}: {self._spelled(key)}: {str(value)[:80]!r} is not supported; "
                f"this version has {', '.join(allowed)}"
            )
        return str(value)

    def inner(self, key: str) -> "Config":
        """The configuration that `key` holds; its finish() is the caller's to call."""
        values = self.get(key)
        if not isinstance(values, dict):
            self.fail(key, f"{str(values)[:80]}; an object is needed")
        return Config(values, f"{self.where}: {key}")

    def changed(self, values: dict[str, Any]) -> "Config":
        """The same with these values; what is read of it counts as read here."""
        config = Config({**self._values, **values}, self.where)
        config._read = self._read
        return config

    def unsupported(self, key: str, message: str) -> NoReturn:
        raise UnsupportedError(f"{self.where}: {key}: {str(self._values.get(key))[:80]}; {message}")

    def same(self, key: str, other: str) -> None:
        """Refuse two names of one value that disagree; `key` may be absent."""
        value, expected = self.get(key), self.get(other)
        if value is not None and value != expected:
            self.fail(key, f"{str(value)[:80]}, but {other} is {str(expected)[:80]}")

    def fail(self, key: str, message: str) -> NoReturn:
        raise CorruptError(f"{self.where}: {self._spelled(key)}: {message}")

    def keys(self) -> list[str]:
        return list(self._values)

    def finish(self, without_effect: Collection[str] = _WITHOUT_EFFECT) -> None:
        """Refuse what was not understood."""
        kind = "quant_method" if "quant_method" in self._values else "model_type"
        for key, value in self._values.items():
            if key in self._read or key in without_effect:
                continue
            if key in _NEUTRAL and any(
                value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL[key]
            ):
                continue
            raise UnsupportedError(
                f"{self.where}: {self._spelled(key)}: {str(value)[:80]!r} is not understood for {kind} "
                f"{self._values.get(kind)!r} and may change what the model computes, "
                "so it is not ignored"
            )

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            if default is _MISSING:
                self.fail(key, "missing")
            return default
        return value
