"""Families whose layers mix otherwise than by plain attention: their recipes, the tensors they take apart, and what they
refuse."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, convert, read_manifest
from checkpoints import encode, write_weights
from families import Requests, describe, ffns, mixers
from variants import VARIANTS, by_name, make_checkpoint

from edgert.converters.derived import Mapped, PickedRows, TransposedHeads
from edgert.converters.tensor import TensorInfo
from edgert.errors import CorruptError, EdgertError, UnsupportedError

# --- recipes ------------------------------------------------------------------------------------------


def test_latent_attention() -> None:
    tensors = Requests()
    decoder = describe("deepseek_v3", tensors)
    mixer = mixers(decoder)[0]
    assert mixer["kind"] == "latent_attention" and mixer["q_rank"] == 24 and mixer["kv_rank"] == 32
    assert mixer["scale"] == 32**-0.5 and mixer["rope"]["layout"] == "interleaved"
    assert len(mixer["rope"]["inv_freq"]) == 4 and "qkv_bias" not in mixer
    assert tensors.shapes["model.layers.0.self_attn.kv_b_proj.weight"] == (4 * 40, 32)
    shapes = {tensor.name: tensor.shape for tensor in decoder.dense}
    assert shapes["layers.0.attention.k_b"] == (4 * 32, 24)
    assert shapes["layers.0.attention.v_b"] == (4 * 16, 32)
    assert shapes["layers.0.attention.q_b"] == (4 * 32, 24)
    assert "layers.0.attention.q_b" not in {tensor.name for tensor in describe("deepseek_v2").dense}
    assert mixers(describe("deepseek_v3", rope_interleave=False))[0]["rope"]["layout"] == "half"


def test_q_lora_rank_that_is_null_or_absent() -> None:
    assert mixers(describe("deepseek_v3", q_lora_rank=None))[0]["q_rank"] is None
    config = describe("deepseek_v2").recipe
    assert config["blocks"][0]["mixer"]["q_rank"] is None


def test_yarn_scales_scores() -> None:
    yarn = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64}
    plain = mixers(describe("deepseek_v3", rope_scaling=yarn))[0]["scale"]
    scaled = mixers(describe("deepseek_v3", rope_scaling=yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}))[0]
    assert scaled["scale"] == pytest.approx(plain * (0.1 * np.log(40) + 1) ** 2, rel=1e-12)
    assert scaled["rope"]["attention_factor"] == 1.0


def test_routers_of_deepseek() -> None:
    assert ffns(describe("deepseek_v2"))[1]["router"] == {
        "scoring": "softmax",
        "normalize": False,
        "scale": 1.0,
    }
    grouped = describe("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2)
    assert ffns(grouped)[1]["router"]["groups"] == {"count": 4, "keep": 2, "score": "max"}
    router = ffns(describe("kimi_k2", routed_scaling_factor=2.827))[1]["router"]
    assert router["scale"] == 2.827 and router["bias"] == "selection" and "groups" not in router
    assert [ffn["kind"] for ffn in ffns(describe("deepseek_v3", first_k_dense_replace=2))] == [
        "dense"
    ] * 2 + ["moe"] * 2
    assert ffns(describe("deepseek_v3"))[1]["shared"] == {"intermediate_size": 96, "gate": None}


def test_dense_layers_of_glm4_moe_lite() -> None:
    types = ["sparse", "dense", "sparse", "sparse"]
    listed = describe("glm4_moe_lite", first_k_dense_replace=None, mlp_layer_types=types)
    assert [ffn["kind"] for ffn in ffns(listed)] == ["moe", "dense", "moe", "moe"]
    assert [ffn["kind"] for ffn in ffns(describe("glm4_moe_lite"))] == ["dense", "moe", "moe", "moe"]


def test_gated_delta_and_gated_attention_take_turns() -> None:
    kinds = [mixer["kind"] for mixer in mixers(describe("qwen3_next"))]
    assert kinds == ["gated_delta"] * 3 + ["attention"]
    every_second = describe("qwen3_next", full_attention_interval=2)
    assert [mixer["kind"] for mixer in mixers(every_second)] == ["gated_delta", "attention"] * 2
    attention = mixers(describe("qwen3_next"))[3]
    assert attention["output_gate"] == "sigmoid" and attention["qk_norm"] == "head"
    assert len(attention["rope"]["inv_freq"]) == 4  # a quarter of 32 elements, in pairs
    assert len(mixers(describe("qwen3_next", partial_rotary_factor=0.5))[3]["rope"]["inv_freq"]) == 8


def test_joined_projections_and_separate_ones() -> None:
    joined, separate = Requests(), Requests()
    first, second = describe("qwen3_next", joined), describe("qwen3_5_moe_text", separate)
    assert joined.shapes["model.layers.0.linear_attn.in_proj_qkvz.weight"] == (2 * (2 * 16 + 4 * 24), 64)
    assert joined.shapes["model.layers.0.linear_attn.in_proj_ba.weight"] == (8, 64)
    assert separate.shapes["model.layers.0.linear_attn.in_proj_qkv.weight"] == (2 * 2 * 16 + 4 * 24, 64)
    assert {t.name: t.shape for t in first.dense} == {t.name: t.shape for t in second.dense}


def test_the_text_of_a_model_that_sees() -> None:
    tensors = Requests()
    decoder = describe("qwen3_5_moe", tensors)
    assert decoder.recipe["architecture"] == "qwen3_5_moe_text"
    assert "model.language_model.layers.3.self_attn.q_proj.weight" in tensors.shapes
    sections = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    assert (
        mixers(describe("qwen3_5_moe_text", rope_parameters=sections))[3]["rope"]
        == mixers(decoder)[3]["rope"]
    )


def test_short_convolutions() -> None:
    tensors = Requests()
    decoder = describe("lfm2", tensors, intermediate_size=100, block_multiple_of=16)
    assert [mixer["kind"] for mixer in mixers(decoder)] == [
        "short_conv",
        "short_conv",
        "attention",
        "short_conv",
    ]
    assert mixers(decoder)[0] == {"kind": "short_conv", "conv_kernel": 3}
    assert ffns(decoder)[0]["intermediate_size"] == 80 and decoder.recipe["output"]["tied"]
    assert tensors.shapes["model.layers.0.conv.conv.weight"] == (64, 1, 3)
    by_index = describe("lfm2", layer_types=None, full_attn_idxs=[1, 3])
    assert [mixer["kind"] for mixer in mixers(by_index)] == ["short_conv", "attention"] * 2
    stated = describe("lfm2", block_ff_dim=90, block_auto_adjust_ff_dim=False)
    assert ffns(stated)[0]["intermediate_size"] == 90
    assert "bias" not in ffns(describe("lfm2_moe", use_expert_bias=False))[3]["router"]
    assert not describe("lfm2_moe", tie_embedding=False).recipe["output"]["tied"]


REFUSED: list[tuple[str, dict[str, Any], type[EdgertError], str]] = [
    ("deepseek_v2", {"norm_topk_prob": True}, CorruptError, "norm_topk_prob"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, UnsupportedError, "noaux_tc"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, UnsupportedError, "sigmoid"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 3}, CorruptError, "n_group"),
    ("deepseek_v3", {"topk_method": "greedy"}, UnsupportedError, "greedy"),
    ("deepseek_v3", {"moe_layer_freq": 2}, CorruptError, "moe_layer_freq"),
    ("deepseek_v3", {"num_key_value_heads": 2}, CorruptError, "num_key_value_heads"),
    ("deepseek_v3", {"head_dim": 64}, CorruptError, "head_dim"),
    ("deepseek_v3", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, EdgertError, "rope_scaling"),
    ("deepseek_v3", {"index_topk": 2048}, UnsupportedError, "index_topk"),  # sparse attention of V3.2
    ("glm4_moe_lite", {"mlp_layer_types": ["sparse"]}, CorruptError, "mlp_layer_types"),
    ("qwen3_next", {"attention_bias": True}, UnsupportedError, "attention_bias"),
    ("qwen3_next", {"linear_num_value_heads": 3}, CorruptError, "linear_num_value_heads"),
    ("qwen3_next", {"linear_conv_kernel_dim": 9}, CorruptError, "linear_conv_kernel_dim"),
    ("qwen3_next", {"layer_types": ["conv"] * 4}, CorruptError, "layer_types"),
    ("qwen3_next", {"rope_parameters": {"mrope_section": [1, 2]}}, UnsupportedError, "mrope_section"),
    ("qwen3_next", {"partial_rotary_factor": 0.03}, CorruptError, "partial_rotary_factor"),
    ("qwen3_5_moe_text", {"attn_output_gate": False}, CorruptError, "attn_output_gate"),
    ("qwen3_5_moe", {"text_config": None}, CorruptError, "text_config"),
    ("qwen3_5_moe", {"text_config": {"model_type": "other"}}, UnsupportedError, "model_type"),
    ("lfm2", {"conv_L_cache": 1}, CorruptError, "conv_L_cache"),
    ("lfm2", {"layer_types": ["mamba"] * 4}, CorruptError, "layer_types"),
    ("lfm2", {"conv_dim": 128}, CorruptError, "conv_dim"),
    ("lfm2", {"use_pos_enc": False}, CorruptError, "use_pos_enc"),
    ("lfm2_moe", {"rms_norm_eps": 1e-6}, UnsupportedError, "rms_norm_eps"),
]


@pytest.mark.parametrize(("family", "changes", "error", "names"), REFUSED)
def test_what_changes_the_model_and_is_not_understood(
    family: str, changes: dict[str, Any], error: type[EdgertError], names: str
) -> None:
    with pytest.raises(error, match=names):
        describe(family, **changes)


# --- what is left out ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "changes", "tensor"),
    [
        ("deepseek_v3", {"num_nextn_predict_layers": 1}, "model.layers.3.eh_proj.weight"),
        ("qwen3_next", {}, "mtp.fc.weight"),
    ],
)
def test_multi_token_prediction_is_left_out_and_noted(
    variant: str, changes: dict[str, Any], tensor: str, tmp_path: Path
) -> None:
    import json

    from edgert.converters.checkpoint import open_checkpoint
    from edgert.converters.registry import read_decoder

    source = make_checkpoint(tmp_path / "checkpoint", by_name(VARIANTS, variant))
    expected = read_manifest(convert(source, tmp_path / "without.edgert", **F32))
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    from safetensors.numpy import load_file

    tensors = {name: np.array(value) for name, value in load_file(source / "model.safetensors").items()}
    write_weights(source, tensors | {tensor: np.zeros((4, 8), np.float32)})
    assert any(
        "1 tensors for multi-token prediction" in note for note in read_decoder(open_checkpoint(source)).notes
    )
    manifest = read_manifest(convert(source, tmp_path / "with.edgert", **F32))
    assert [row["checksum"] for row in manifest["tensors"]] == [
        row["checksum"] for row in expected["tensors"]
    ]
    assert manifest["recipe"] == expected["recipe"]


# --- tensors made from others -------------------------------------------------------------------------


def stored(directory: Path, values: np.ndarray, dtype: str) -> TensorInfo:
    path = directory / f"{dtype}.bin"
    raw = encode(values, dtype)
    path.write_bytes(b"head" + raw)
    return TensorInfo("t", dtype, values.shape, 4, 4 + len(raw), path)


def read(tensor: Any, first: int, rows: int, step: int = 1) -> np.ndarray:
    with tensor.open() as reader:
        raw, dtype = reader.floats(first, rows, step)
    assert dtype == "f32"
    return np.frombuffer(raw, np.float32).reshape(rows, -1)


def test_picked_rows(tmp_path: Path) -> None:
    values = np.arange(12 * 3, dtype=np.float32).reshape(12, 3)
    tensor = PickedRows(stored(tmp_path, values, "F32"), first=1, rows=2, period=4)
    picked = values[[1, 2, 5, 6, 9, 10]]
    assert tensor.shape == (6, 3) and tensor.row_bytes == 12
    assert np.array_equal(read(tensor, 0, 6), picked)
    assert np.array_equal(read(tensor, 1, 3), picked[1:4])
    assert np.array_equal(read(tensor, 1, 2, step=3), picked[1::3])
    assert tensor.address(3, 2) == f"byte {4 + (6 * 3 + 2) * 4}"


def test_transposed_heads(tmp_path: Path) -> None:
    values = np.arange(2 * 5 * 4, dtype=np.float32).reshape(
        10, 4
    )  # two heads of three rows, and two of others
    tensor = TransposedHeads(stored(tmp_path, values, "F32"), inputs=3, period=5)
    transposed = np.concatenate([values[0:3].T, values[5:8].T])
    assert tensor.shape == (8, 3)
    assert np.array_equal(read(tensor, 0, 8), transposed)
    assert np.array_equal(read(tensor, 3, 2), transposed[3:5])
    assert tensor.address(5, 2) == f"byte {4 + (7 * 4 + 1) * 4}"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_mapped_elements_are_rounded_to_f32_once(tmp_path: Path, dtype: str) -> None:
    values = np.array([0.5, -1.25, 3.0, 2.0**-8], np.float32)
    tensor = Mapped(stored(tmp_path, values, dtype), lambda x: 1.0 + x)
    assert np.array_equal(read(tensor, 0, 1)[0], np.float32(1) + values)
    assert struct.calcsize("f") == 4 and tensor.stored_format is None
