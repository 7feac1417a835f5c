"""docs/bundle-format.md against the bundles that are written: a reader made from the document understands them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracle
import oracle_formats
import pytest
from bundles import F32, convert, open_model, read_manifest, runnable_isas
from checkpoints import TINY_CONFIG, prompt_tokens
from reference import Reference, assert_close, compared, near_ties
from variants import VARIANTS, Variant, by_name, make_checkpoint

from edgert import _native

FORMATS = [row["name"] for row in _native.formats() if row["packs_floats"]]
TOKENS = prompt_tokens(64, 131)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (16, 64), (17, 65), (40, 72), (131, 200)])
@pytest.mark.parametrize("name", FORMATS)
def test_packed_matrix(name: str, rows: int, cols: int) -> None:
    values = np.random.default_rng(rows).standard_normal((rows, cols), np.float32)
    packed = bytearray(_native.packed_bytes(name, rows, cols))
    assert len(packed) == oracle_formats.packed_bytes(name, rows, cols)
    _native.pack(name, values.tobytes(), "f32", rows, cols, destination=packed)
    ours = oracle_formats.unpack(name, np.frombuffer(packed, np.uint8), rows, cols)
    theirs = np.frombuffer(_native.unpack(name, packed, rows, cols), np.float32).reshape(rows, cols)
    assert np.array_equal(ours.astype(np.float32), theirs)
    key = name if name in oracle_formats.FLOATS else sum(oracle_formats.INTEGERS[name].planes)
    error = np.sqrt(((ours - values) ** 2).sum() / (values**2).sum())
    assert error <= {"f32": 0, "f16": 1e-3, "bf16": 5e-3, 8: 1e-2, 5: 0.05, 4: 0.1, 3: 0.2, 2: 0.45}[key]


def test_format_table() -> None:
    table = {f["name"]: f["bits_per_weight"] for f in _native.formats()}
    assert list(table) == [*oracle_formats.FLOATS, *oracle_formats.INTEGERS]
    for name, bits in table.items():
        assert oracle_formats.packed_bytes(name, 1024, 1024) * 8 / 1024**2 == bits


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_f32_bundle_as_documented(
    variant: Variant, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    """Converter and document together: the reader in numpy gives the logits of transformers."""
    source = make_checkpoint(tmp_path / "checkpoint", variant)
    expected, margins, _ = Reference.load(source).forward(TOKENS)
    positions = compared(variant.name, len(TOKENS), near_ties(expected, margins), record_property)
    bundle = convert(source, tmp_path / "model.edgert", **F32)
    assert_close(oracle.Oracle(bundle).logits(TOKENS), expected, positions, tolerance=2e-5)


@pytest.mark.parametrize("expert", FORMATS)
@pytest.mark.parametrize("dense", ("f32", "int8"))
def test_engine_runs_the_format_as_documented(
    tiny_source: Path, tmp_path: Path, dense: str, expert: str
) -> None:
    """Each format of experts under float and integer dense weights."""
    bundle = convert(
        tiny_source, tmp_path / "m.edgert", **dict.fromkeys(F32, dense) | {"expert_format": expert}
    )
    assert {f for formats in read_manifest(bundle)["expert_formats"] for f in formats} == {expert}
    assert_engine_agrees(bundle, TINY_CONFIG["vocab_size"])


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_moe",
        "olmoe-MHA",
        "mixtral-head_dim-tied-fused",
        "llama-llama3_rope-tied",
        "deepseek_v3",
        "qwen3_next",
        "lfm2_moe",
    ],
)
def test_engine_runs_the_families_in_default_formats(name: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", by_name(VARIANTS, name))
    assert_engine_agrees(convert(source, tmp_path / "model.edgert"), 131)


def assert_engine_agrees(bundle: Path, vocab_size: int) -> None:
    """With KV in f32, as the document has it. An activation that rounds the other way in double precision disturbs
    all that follows it, so the sequences are many and short: most meet none and agree as f32 sums do."""
    reader = oracle.Oracle(bundle)
    sequences = [prompt_tokens(4, vocab_size, seed) for seed in range(24)]
    expected = np.stack([reader.logits(tokens) for tokens in sequences])
    for isa in runnable_isas():
        model = open_model(bundle, isa=isa, kv_format="f32")
        actual = np.stack([model.logits(model.sequence(), tokens) for tokens in sequences])
        error = np.sort((np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)).max(-1))
        assert np.quantile(error, 0.7) <= 1e-5 and error[-1] <= 0.1, f"{isa}: {error}"


@pytest.mark.parametrize(("kind", "allowed"), [("f16", 5e-3), ("int8", 5e-2)])
def test_rounded_kv_is_close(tiny_f32_bundle: Path, kind: str, allowed: float) -> None:
    """Keys and values as f16 or int8 cost what their rounding costs."""
    tokens = prompt_tokens(64, TINY_CONFIG["vocab_size"])
    exact, rounded = (open_model(tiny_f32_bundle, kv_format=one) for one in ("f32", kind))
    expected = exact.logits(exact.sequence(), tokens)
    error = np.abs(rounded.logits(rounded.sequence(), tokens) - expected).max(-1) / np.abs(expected).max(-1)
    assert 0 < np.quantile(error, 0.9) <= allowed  # a token whose routing tips over costs more
