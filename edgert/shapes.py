"""Shapes of known models: bundles of random weights that run at the model's speed, to measure a machine with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgert import settings
from edgert.bundle import Bundle
from edgert.errors import CorruptError, InvalidArgumentError, NotFoundError, StorageError, UnsupportedError

# The models' own config.json, as far as it shapes the computation.
SHAPES: dict[str, dict[str, Any]] = {
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "intermediate_size": 1024,
        "norm_topk_prob": False,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-05,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-05,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "sliding_window": 128,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "intermediate_size": 2880,
        "swiglu_limit": 7.0,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "rms_norm_eps": 1e-05,
    },
    # No model: everything that the others have, in 2 MB.
    "tiny": {
        "model_type": "qwen3_moe",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "vocab_size": 1024,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-06,
    },
}


def shape_recipe(name: str) -> dict[str, Any]:
    """What the shape's bundle will compute. Raises InvalidArgumentError for an unknown shape."""
    from edgert.converters.synthetic import synthetic_decoder

    _require(name)
    return synthetic_decoder(name, SHAPES[name]).recipe


def _require(name: str) -> None:
    if name not in SHAPES:
        raise InvalidArgumentError(f"shape: found {name[:60]!r}, allowed are {', '.join(SHAPES)}")


def shape_bundle(
    name: str,
    *,
    dense_format: str | None = None,
    expert_format: str | None = None,
    embedding_format: str | None = None,
    output_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Return the bundle of a shape, written if it is not there yet; every format is int4 unless it is given.

    Bundles are kept in settings.cache()/shapes. progress(done, total) counts bytes written. Raises
    InvalidArgumentError for an unknown shape or format, StorageError where the disk has no room.
    """
    from edgert.converters.formats import Defaults, choose_formats
    from edgert.converters.synthetic import write_synthetic

    _require(name)
    formats = choose_formats(
        dense_format,
        expert_format,
        embedding_format,
        output_format,
        None,
        Defaults("int4", "int4", "int4", "int4"),
        tied=False,
    )
    chosen = (formats.dense, formats.embedding, formats.output, formats.expert[0])
    path = settings.cache() / "shapes" / f"{name}-{'-'.join(chosen)}.edgert"
    if not _is_current(path, name, formats.options()):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{path.parent}: cannot be made: {error.strerror}") from None
        write_synthetic(name, SHAPES[name], path, formats, progress=progress)
    return path


def _is_current(path: Path, name: str, options: dict[str, Any]) -> bool:
    """Whether `path` is what would be written: whole, of this shape and these formats, by this generation's code."""
    from edgert.converters.synthetic import provenance, synthetic_decoder

    try:
        manifest = Bundle.open(path).manifest
    except (NotFoundError, CorruptError, UnsupportedError):
        return False
    found = (manifest["provenance"], manifest["quantization"]["options"], manifest["recipe"])
    return found == (provenance(name), options, synthetic_decoder(name, SHAPES[name]).recipe)
