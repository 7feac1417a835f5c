"""Adapters on bundles of every family, of checkpoints and of GGUF files, which have other names and some another order of rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, convert
from gguf_models import MODELS, Model, write_pair
from peft_directories import PREFIX, write_peft

import edgert
from edgert.errors import UnsupportedError

TOKENS = list(range(3, 27))
# Modules whose weights a bundle has in several matrices.
IN_PARTS = {"qwen3_5_moe_text": ("q_proj",), "deepseek_v2": ("kv_b_proj",), "deepseek_v3": ("kv_b_proj",)}


def write_both(source: Path, place: Path, left_out: tuple[str, ...]) -> tuple[Path, Path]:
    """LoRA of the projections of attention, and the checkpoint with it in its weights."""
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    weights = load_file(source / "model.safetensors")
    lora: dict[str, np.ndarray] = {}
    for name in [
        name for name in weights if "self_attn" in name and "_proj" in name and weights[name].ndim == 2
    ]:
        module = name.removesuffix(".weight")
        if module.endswith(left_out):
            continue
        rows, cols = weights[name].shape
        a, b = (rng.standard_normal(shape, np.float32) * np.float32(0.2) for shape in ((2, cols), (rows, 2)))
        lora |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        weights[name] = weights[name] + b @ a
    shutil.copytree(source, place / "merged")
    save_file(weights, place / "merged" / "model.safetensors")
    return write_peft(place / "adapter", lora, peft_type="LORA", lora_alpha=2, r=2), place / "merged"


def logits(bundle: Path, adapter: Path | None = None) -> Any:
    with edgert.load(bundle, memory="64MiB", threads=1) as model:
        if adapter is None:
            return model.logits(TOKENS)
        model.load_adapter(adapter, "a")
        return model.logits(TOKENS, adapter="a")


@pytest.mark.parametrize("pair", MODELS, ids=lambda pair: pair.variant.name)
def test_an_adapter_computes_what_weights_with_it_merged_do(tmp_path: Path, pair: Model) -> None:
    source, gguf = write_pair(tmp_path, pair)
    adapter, merged = write_both(source, tmp_path, IN_PARTS.get(pair.variant.family, ()))
    expected = logits(convert(merged, tmp_path / "merged.edgert", **F32))
    scale = np.abs(expected).max(-1)
    for path in (source, gguf):
        bundle = convert(path, tmp_path / f"{path.stem}.edgert", **F32)
        error = np.abs(logits(bundle, adapter) - expected).max(-1) / scale
        assert np.median(error) < 1e-4, path.name
    assert np.median(np.abs(logits(bundle) - expected).max(-1) / scale) > 1e-2


@pytest.mark.parametrize("family", IN_PARTS)
def test_modules_in_parts_are_refused(tmp_path: Path, family: str) -> None:
    pair = next(pair for pair in MODELS if pair.variant.family == family)
    source, _ = write_pair(tmp_path, pair)
    adapter, _ = write_both(source, tmp_path, ())
    bundle = convert(source, tmp_path / "own.edgert", **F32)
    with pytest.raises(
        UnsupportedError, match=rf"{IN_PARTS[family][0]}: the bundle has its weights in several matrices"
    ):
        logits(bundle, adapter)


def test_magnitudes_and_biases_follow_the_order_of_rows(tmp_path: Path) -> None:
    """DoRA reads the base's rows, and trained biases take the place of its own: in a GGUF file's order."""
    from safetensors.numpy import load_file, save_file

    pair = next(pair for pair in MODELS if pair.variant.name == "llama-bias")
    source, gguf = write_pair(tmp_path, pair)
    rng = np.random.default_rng(0)
    weights = load_file(source / "model.safetensors")
    tensors: dict[str, np.ndarray] = {}
    for name in [name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight"))]:
        module, own = name.removesuffix(".weight"), weights[name]
        (rows, cols), scale = own.shape, np.float32(0.2)
        a, b = (rng.standard_normal(shape, np.float32) * scale for shape in ((2, cols), (rows, 2)))
        magnitude = (np.linalg.norm(own, axis=1) * rng.uniform(0.5, 1.5, rows)).astype(np.float32)
        bias = weights[f"{module}.bias"] + rng.standard_normal(rows, np.float32) * scale
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        tensors |= {f"{PREFIX}{module}.lora_magnitude_vector": magnitude, f"{PREFIX}{module}.bias": bias}
        changed = own + b @ a
        weights[name] = changed * (magnitude / np.linalg.norm(changed, axis=1))[:, np.newaxis]
        weights[f"{module}.bias"] = bias
    shutil.copytree(source, tmp_path / "merged")
    save_file(weights, tmp_path / "merged" / "model.safetensors")
    options: dict[str, Any] = {"peft_type": "LORA", "lora_alpha": 2, "r": 2, "use_dora": True, "bias": "all"}
    adapter = write_peft(tmp_path / "adapter", tensors, **options)
    expected = logits(convert(tmp_path / "merged", tmp_path / "merged.edgert", **F32))
    for path in (source, gguf):
        bundle = convert(path, tmp_path / f"{path.stem}.edgert", **F32)
        assert np.abs(logits(bundle, adapter) - expected).max() < 1e-4 * np.abs(expected).max(), path.name


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe-tied", "granitemoe", "mixtral"])
def test_a_resized_vocabulary_fits_the_gguf_file_too(tmp_path: Path, name: str) -> None:
    """Whose embedding and head have names of their own, and which may have one tensor for both."""
    from safetensors.numpy import load_file

    pair = next(pair for pair in MODELS if pair.variant.name == name)
    source, gguf = write_pair(tmp_path, pair)
    rng = np.random.default_rng(0)
    weights = load_file(source / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    new = rng.standard_normal((2, embedding.shape[1]), np.float32) * np.float32(0.3)
    whole = np.concatenate([embedding * np.float32(1.1), new])
    tensors = {f"{PREFIX}{module}.weight": whole for module in ("model.embed_tokens", "lm_head")}
    options: dict[str, Any] = {"peft_type": "LORA", "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = write_peft(tmp_path / "adapter", tensors, **options)
    of_source, of_gguf = (
        logits(convert(path, tmp_path / f"{path.stem}.edgert", **F32), adapter) for path in (source, gguf)
    )
    assert of_source.shape == (len(TOKENS), len(embedding) + 2)
    assert np.abs(of_source - of_gguf).max() < 1e-4 * np.abs(of_source).max()
