"""GGUFs that llama.cpp quantised, against llama.cpp and against their own dequantised weights in f32.

Needs an interpreter with llama-cpp-python and gguf, named by EDGERT_LLAMA_PYTHON. tests/test_gguf.py holds, for every
behaviour, a case that needs neither.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, convert, open_model, read_manifest
from checkpoints import prompt_tokens, tiny_checkpoint
from gguf_models import MODELS, Model, write_pair
from ggufs import fields_of, write_gguf

SIDE = Path(__file__).parent / "llama_cpp_side.py"
PYTHON = os.environ.get("EDGERT_LLAMA_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="EDGERT_LLAMA_PYTHON names no interpreter")
TYPES = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
         "MXFP4", "Q4_K_M"]  # fmt: skip
TOKENS = 48


def side(*arguments: object) -> None:
    subprocess.run(
        [str(PYTHON), str(SIDE), *map(str, arguments)], check=True, capture_output=True, timeout=300
    )


@pytest.fixture(scope="module", params=["made", "docs-moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose rows are whole super-blocks, and what it is as an f32 GGUF beside it."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "made":
        checkpoint = tiny_checkpoint(
            directory / "checkpoint", hidden_size=256, moe_intermediate_size=256, num_attention_heads=4,
            head_dim=64, vocab_size=512,
        )  # fmt: skip
    elif "EDGERT_REFERENCE_DIR" in os.environ:
        checkpoint = Path(os.environ["EDGERT_REFERENCE_DIR"]) / "models/docs-moe"
    else:
        pytest.skip("EDGERT_REFERENCE_DIR names no folder")
    side("write", checkpoint, directory / "model.gguf")
    return directory / "model.gguf"


def reference_logits(weights: dict[str, np.ndarray], source: Path, tokens: list[int]) -> np.ndarray:
    """An f32 evaluation of the dequantised weights: their safetensors, through edgert's own f32 path, which the tests
    hold against transformers."""
    path = write_gguf(source.with_name("dequantised.gguf"), fields_of(source), weights)
    model = open_model(convert(path, source.with_name("dequantised.edgert"), **F32))
    return np.asarray(model.logits(model.sequence(), tokens))


@pytest.mark.parametrize("pair", MODELS, ids=lambda pair: pair.variant.name)
def test_an_architecture(pair: Model, tmp_path: Path) -> None:
    """All in f32, so both compute the same but for the order of sums."""
    _, path = write_pair(tmp_path, pair)
    tokens = prompt_tokens(40, 160)
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))
    side("logits", path, tmp_path / "tokens.json", tmp_path / "logits.npy")
    theirs = np.load(tmp_path / "logits.npy")
    model = open_model(convert(path, tmp_path / "model.edgert"), kv_format="f32")
    ours = model.logits(model.sequence(), tokens)
    error = np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max(axis=1)
    assert np.median(error) <= pair.within and error.max() <= max(1e-3, 5 * pair.within), error


@pytest.mark.parametrize("kind", TYPES)
def test_a_type(kind: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    side("quantize", source, path, kind)
    side("dequantize", path, tmp_path / "weights.npz")
    tokens = prompt_tokens(TOKENS, 500)
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))
    side("logits", path, tmp_path / "tokens.json", tmp_path / "logits.npy")
    theirs = np.load(tmp_path / "logits.npy")
    with np.load(tmp_path / "weights.npz") as archive:
        weights = {name: archive[name] for name in archive.files}

    kept = convert(path, tmp_path / "kept.edgert")
    exact = convert(path, tmp_path / "exact.edgert", **F32)
    report: list[Any] = read_manifest(kept)["quantization"]["tensors"]
    assert all(row["relative_error"] == 0 for row in report)
    assert kind in ("F16", "BF16") or any(row["format"] not in ("f32", "f16", "bf16") for row in report)

    expected = reference_logits(weights, source, tokens)
    largest = np.abs(expected).max(axis=1)
    ours = {name: open_model(bundle) for name, bundle in (("kept", kept), ("exact", exact))}
    logits = {name: model.logits(model.sequence(), tokens) for name, model in ours.items()}
    assert (np.abs(logits["exact"] - expected).max(axis=1) <= 1e-4 * largest).all()
    # Both round activations to int8, each in its own way: both are as far from f32, and no farther from each other.
    rounding = np.median(np.abs(theirs - expected).max(axis=1) / largest)
    error = np.median(np.abs(logits["kept"] - expected).max(axis=1) / largest)
    assert error <= max(2 * rounding, 1e-3)
    assert np.median(np.abs(logits["kept"] - theirs).max(axis=1) / largest) <= max(3 * rounding, 2e-3)
