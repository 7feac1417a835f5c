"""Safetensors checkpoints that are quantised already: the weights that they stand for, bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, convert, open_model, read_manifest
from checkpoints import prompt_tokens, write_weights
from quantised import (
    CONFIG,
    Array,
    Parts,
    Scheme,
    fp8,
    gptq,
    mlx,
    mlx_mxfp4,
    mxfp4_codes,
    packed_integers,
    quantised_checkpoint,
    quantised_parts,
    stream,
    write_parts,
)
from quantised_schemes import FP8, SCHEMES, gptq_scheme, mlx_scheme, packed_scheme
from reference import Reference, assert_close, near_ties
from variants import VARIANTS, by_name, make_checkpoint

from edgert import _native
from edgert.converters.checkpoint import open_checkpoint
from edgert.converters.convert import convert as convert_checkpoint
from edgert.converters.registry import read_decoder
from edgert.converters.safetensors import read_header
from edgert.converters.schemes import read_scheme
from edgert.converters.tensor import TensorInfo


@pytest.fixture(scope="module", params=SCHEMES, ids=lambda scheme: scheme.name)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Scheme, Path, Path]:
    """A scheme, a checkpoint of it, and the unquantised one of the same weights."""
    return request.param, *quantised_checkpoint(tmp_path_factory.mktemp("quantised"), request.param)


def made(directory: Path, scheme: Scheme) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sources of a checkpoint of this scheme, and those of the unquantised one."""
    quantised, plain = quantised_checkpoint(directory, scheme)
    return sources(quantised), sources(plain)


def sources(checkpoint: Path) -> dict[str, Any]:
    """Every source of the model by its name in the bundle."""
    decoder = read_decoder(open_checkpoint(checkpoint))
    found = {tensor.name: tensor.source for tensor in decoder.dense}
    for expert in decoder.experts:
        for part, source in zip(("gate", "up", "down"), expert.sources, strict=True):
            found[f"{expert.layer}.{expert.index}.{part}"] = source
    return found


def weights(source: Any, first_row: int, rows: int) -> Array:
    """The bits of f32 weights."""
    with source.tensor.open() as reader:
        raw, dtype = reader.floats(source.first_row + first_row * source.step, rows, source.step)
    assert dtype == "f32"
    return np.frombuffer(raw, np.uint32)


def carried(source: Any) -> Array:
    """The bits of the weights that are carried over, unpacked again."""
    format = source.tensor.stored_format
    packed = bytearray(_native.packed_bytes(format, source.rows, source.cols))
    with source.tensor.open() as reader:
        reader.carry(source.first_row, source.rows, packed, source.step)
    return np.frombuffer(_native.unpack(format, packed, source.rows, source.cols), np.uint32)


def test_dequantised_weights(pair: tuple[Scheme, Path, Path]) -> None:
    _, quantised, plain = pair
    expected = sources(plain)
    for name, source in sources(quantised).items():
        assert (source.rows, source.cols) == (expected[name].rows, expected[name].cols)
        whole = weights(expected[name], 0, source.rows)
        assert np.array_equal(weights(source, 0, source.rows), whole), name
        if source.rows > 32:  # any rows by themselves
            part = weights(source, 16, source.rows - 32)
            assert np.array_equal(part, whole[16 * source.cols : -16 * source.cols]), name


def test_codes_are_carried_over(pair: tuple[Scheme, Path, Path]) -> None:
    scheme, quantised, plain = pair
    expected = sources(plain)
    for name, source in sources(quantised).items():
        if isinstance(source.tensor, TensorInfo):
            assert source.tensor.stored_format is None
            continue
        assert source.tensor.stored_format == scheme.format, name
        if scheme.format is not None:
            assert np.array_equal(carried(source), weights(expected[name], 0, source.rows)), name


def test_logits(pair: tuple[Scheme, Path, Path], tmp_path: Path) -> None:
    _, quantised, plain = pair
    model = open_model(convert(quantised, tmp_path / "model.edgert", **F32))
    tokens = prompt_tokens(24, CONFIG["vocab_size"])
    expected, _, _ = Reference.load(plain).forward(tokens)
    assert_close(model.logits(model.sequence(), tokens), expected, list(range(len(tokens))))


def test_the_bundle_keeps_formats(pair: tuple[Scheme, Path, Path], tmp_path: Path) -> None:
    scheme, quantised, _ = pair
    manifest = read_manifest(convert(quantised, tmp_path / "model.edgert"))
    assert manifest["expert_formats"] == [[scheme.format or "int4"] * 3]
    by_name = {row["name"]: row["format"] for row in manifest["tensors"]}
    assert by_name["layers.0.attention.q"] == scheme.format or "int8"
    assert by_name["output"] == "int8" and by_name["layers.0.router"] == "f32"


# --- layers that differ -----------------------------------------------------------------------------------


def check_formats(directory: Path, scheme: Scheme, formats: dict[str, str | None]) -> None:
    """`formats` by the end of the name in the bundle."""
    found, expected = made(directory, scheme)
    for name, source in found.items():
        ending = name.rpartition(".")[2]
        assert source.tensor.stored_format == formats.get(ending), name
        assert np.array_equal(weights(source, 0, source.rows), weights(expected[name], 0, source.rows)), name


def test_mlx_layers_of_their_own_bits(tmp_path: Path) -> None:
    own: dict[str, Any] = {"model.layers.0.mlp.gate": False}
    for layer in range(CONFIG["num_hidden_layers"]):
        own[f"model.layers.{layer}.mlp.switch_mlp.down_proj"] = {"group_size": 32, "bits": 6}
        own[f"model.layers.{layer}.self_attn.q_proj"] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    scheme = mlx_scheme(4, 32, "q4_1")
    others = {"down_proj": mlx(6, 32), "q_proj": mlx_mxfp4}
    scheme = replace(scheme, settings={**scheme.settings, **own}, extra={}, others=others)
    check_formats(
        tmp_path, scheme,
        {"q": "mxfp4", "k": "q4_1", "v": "q4_1", "o": "q4_1", "gate": "q4_1", "up": "q4_1", "down": "affine6_32"},
    )  # fmt: skip


def test_gptq_layers_that_dynamic_treats_apart(tmp_path: Path) -> None:
    def floats(weight: Array) -> tuple[Parts, Array]:
        return {"weight": ("F32", weight)}, weight

    scheme = gptq_scheme(4, 64, "int4")
    others = {"down_proj": gptq(8, 32, symmetric=True), "q_proj": floats}
    dynamic = {"+:.*down_proj": {"bits": 8, "group_size": 32}, "-:.*q_proj": {}}
    scheme = replace(scheme, settings={**scheme.settings, "dynamic": dynamic}, others=others)
    check_formats(
        tmp_path,
        scheme,
        {"k": "int4", "v": "int4", "o": "int4", "gate": "int4", "up": "int4", "down": "int8"},
    )


def test_compressed_groups_of_different_bits(tmp_path: Path) -> None:
    scheme = packed_scheme(4, 32, "q4_0", "F16")
    settings = dict(scheme.settings)
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "strategy": "channel"}
    settings["config_groups"] = settings["config_groups"] | {
        "group_1": {"targets": ["re:.*down_proj"], "weights": eight}
    }
    scheme = replace(
        scheme, settings=settings, others={"down_proj": packed_integers(8, -1, "F16", symmetric=True)}
    )
    check_formats(
        tmp_path, scheme,
        {"q": "q4_0", "k": "q4_0", "v": "q4_0", "o": "q4_0", "gate": "q4_0", "up": "q4_0", "down": "int8"},
    )  # fmt: skip


def test_router_embedding_and_output_that_are_quantised_too(tmp_path: Path) -> None:
    """The router is dequantised, the others keep their format; the engine computes with it."""
    quantised, plain = quantised_checkpoint(tmp_path, replace(mlx_scheme(8, 32, None), everything=True))
    bundle = convert(quantised, tmp_path / "model.edgert")
    manifest = read_manifest(bundle)
    formats = {row["name"]: row["format"] for row in manifest["tensors"]}
    assert (formats["embedding"], formats["output"], formats["layers.0.router"]) == (
        "affine8_32",
        "affine8_32",
        "f32",
    )
    assert manifest["expert_formats"] == [["affine8_32"] * 3]

    tokens = prompt_tokens(24, CONFIG["vocab_size"])
    expected, _, _ = Reference.load(plain).forward(tokens)
    exact = open_model(convert(quantised, tmp_path / "exact.edgert", **F32))
    assert_close(exact.logits(exact.sequence(), tokens), expected, list(range(24)))
    kept = open_model(bundle)
    logits = kept.logits(kept.sequence(), tokens)
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()  # activations in 8 bits


# --- what no format holds ------------------------------------------------------------------------------------


def test_scales_that_f16_does_not_hold_are_told(tmp_path: Path) -> None:
    """bf16 scales of a quiet layer lie below f16's range: its weights are right, and a note names it."""

    def quiet(weight: Array) -> tuple[Parts, Array]:
        return mlx(4, 32, "BF16")(weight * np.float32(1e-8))

    scheme = replace(mlx_scheme(4, 32, "q4_1", "BF16"), others={"layers.1.self_attn.k_proj": quiet})
    quantised, plain = quantised_checkpoint(tmp_path, scheme)
    source = sources(quantised)["layers.1.attention.k"]
    assert source.tensor.stored_format is None
    assert np.array_equal(weights(source, 0, 40), weights(sources(plain)["layers.1.attention.k"], 0, 40))
    (note,) = convert_checkpoint(quantised, tmp_path / "model.edgert").notes
    assert note.startswith("1 of the tensors") and "layers.1.self_attn.k_proj" in note


def test_groups_of_zeros(tmp_path: Path) -> None:
    """MLX gives them a scale of 1e-7, which f16 does not hold and which scales nothing."""

    def pack(weight: Array) -> tuple[Parts, Array]:
        weight = weight.copy()
        weight[3:7, :64] = 0
        return mlx(4, 32, "BF16")(weight)

    quantised, plain = quantised_checkpoint(tmp_path, replace(mlx_scheme(4, 32, "q4_1", "BF16"), pack=pack))
    source, expected = sources(quantised)["layers.0.attention.q"], sources(plain)["layers.0.attention.q"]
    assert source.tensor.stored_format == "q4_1"
    assert np.array_equal(carried(source), weights(expected, 0, source.rows))
    assert not carried(source).reshape(source.rows, -1)[3:7, :64].any()


def test_columns_out_of_order_are_told(tmp_path: Path) -> None:
    quantised, _ = quantised_checkpoint(tmp_path, gptq_scheme(4, 64, None, order=True))
    (note,) = convert_checkpoint(quantised, tmp_path / "model.edgert").notes
    assert note.startswith("32 of the tensors") and "act-order" in note and "q_proj.weight" in note


def test_a_format_that_is_asked_for(tmp_path: Path) -> None:
    quantised, _ = quantised_checkpoint(tmp_path, gptq_scheme(4, 64, "int4"))
    manifest = read_manifest(convert(quantised, tmp_path / "model.edgert", expert_format="int8"))
    assert manifest["expert_formats"] == [["int8"] * 3]
    assert {row["format"] for row in manifest["tensors"] if row["name"].endswith("attention.q")} == {"int4"}


def test_fp8_is_told(tmp_path: Path) -> None:
    scheme = next(scheme for scheme in SCHEMES if scheme.name == "fp8-blocks")
    quantised, _ = quantised_checkpoint(tmp_path, scheme)
    (note,) = convert_checkpoint(quantised, tmp_path / "model.edgert").notes
    assert note.startswith("32 of the tensors") and "8-bit floats" in note


# --- files and other readers -------------------------------------------------------------------------------------


def test_parts_in_different_files(tmp_path: Path) -> None:
    scheme = gptq_scheme(4, 64, "int4", symmetric=False)
    quantised, plain = quantised_checkpoint(tmp_path, scheme)
    parts, _ = quantised_parts(scheme)
    (quantised / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(3):
        names = sorted(parts)[number::3]
        write_parts(quantised / f"{number}.safetensors", {name: parts[name] for name in names})
        weight_map |= dict.fromkeys(names, f"{number}.safetensors")
    (quantised / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = sources(plain)
    for name, source in sources(quantised).items():
        assert np.array_equal(weights(source, 0, source.rows), weights(expected[name], 0, source.rows)), name


def test_fp8_as_transformers_reads_it(tmp_path: Path) -> None:
    import torch
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    rng = np.random.default_rng(1)
    codes = (
        rng.integers(0, 0x7F, (200, 300), dtype=np.uint8)
        | rng.integers(0, 2, (200, 300), dtype=np.uint8) << 7
    )
    scales = rng.random((2, 3), np.float32)
    write_parts(tmp_path / "x.safetensors", {"x": ("F8_E4M3", codes), "x_scale_inv": ("F32", scales)})
    tensors = {tensor.name: tensor for tensor in read_header(tmp_path / "x.safetensors")}
    with read_scheme(FP8 | {"weight_block_size": [128, 128]}, tensors, "c")["x"].open() as reader:
        ours = np.frombuffer(reader.floats(0, 200)[0], np.uint32)
    theirs = _dequantize_fp8_weight(
        torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales), [128, 128], torch.float32
    )
    assert np.array_equal(ours, theirs.numpy().reshape(-1).view(np.uint32))


# --- experts in one tensor --------------------------------------------------------------------------------------


def test_fp8_blocks_of_fused_experts(tmp_path: Path) -> None:
    """Blocks begin anew with every expert, whose rows are no whole number of them."""
    rng = np.random.default_rng(0)
    packed = [fp8((128, 128), "scale")(rng.standard_normal((160, 192)).astype(np.float32)) for _ in range(3)]
    path = tmp_path / "model.safetensors"
    codes, scales = (np.stack([parts[part][1] for parts, _ in packed]) for part in ("weight", "scale"))
    write_parts(path, {"x": ("F8_E4M3", codes), "x_scale_inv": ("F32", scales)})
    tensors = {tensor.name: tensor for tensor in read_header(path)}
    found = read_scheme(FP8 | {"weight_block_size": [128, 128]}, tensors, "config.json")
    expected = np.concatenate([weight for _, weight in packed])
    with found["x"].open() as reader:
        for first, rows, step in ((0, 480, 1), (150, 20, 1), (1, 200, 2), (479, 1, 1)):
            raw, _ = reader.floats(first, rows, step)
            assert np.array_equal(
                np.frombuffer(raw, np.float32).reshape(rows, -1), expected[first::step][:rows]
            )


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """gpt-oss with experts in MXFP4, and with the floats that transformers makes of them."""
    import torch
    from safetensors.numpy import load_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    directory = tmp_path_factory.mktemp("gpt_oss")
    variant = replace(by_name(VARIANTS, "gpt_oss"), config={"hidden_size": 64, "intermediate_size": 96})
    plain = make_checkpoint(directory / "plain", variant)
    tensors = load_file(plain / "model.safetensors")
    parts: Parts = {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            parts[name] = ("F32", tensor)
            continue
        experts, inputs, outputs = tensor.shape
        codes, exponents, _ = mxfp4_codes(tensor.transpose(0, 2, 1).reshape(-1, inputs))
        blocks = stream(codes, 4).view(np.uint8).reshape(experts, outputs, -1, 16)
        scales = exponents.reshape(experts, outputs, -1).astype(np.uint8)
        parts |= {name + "_blocks": ("U8", blocks), name + "_scales": ("U8", scales)}
        floats = convert_moe_packed_tensors(
            torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
        )
        tensors[name] = floats.numpy()
    write_weights(plain, tensors)
    shutil.copytree(plain, directory / "quantised")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.embed_tokens"],
    }
    (directory / "quantised" / "config.json").write_text(json.dumps(config))
    write_parts(directory / "quantised" / "model.safetensors", parts)
    return directory / "quantised", plain


def test_mxfp4_of_gpt_oss(gpt_oss: tuple[Path, Path], tmp_path: Path) -> None:
    quantised, plain = gpt_oss
    found, expected = sources(quantised), sources(plain)
    for name, source in found.items():
        whole = weights(expected[name], 0, source.rows)
        assert np.array_equal(weights(source, 0, source.rows), whole), name
        if isinstance(source.tensor, TensorInfo):
            continue
        assert source.tensor.stored_format == "mxfp4" and np.array_equal(carried(source), whole)
    manifest = read_manifest(convert(quantised, tmp_path / "model.edgert"))
    assert manifest["expert_formats"] == [["mxfp4"] * 3]


def test_logits_of_gpt_oss(gpt_oss: tuple[Path, Path], tmp_path: Path) -> None:
    quantised, plain = gpt_oss
    model = open_model(convert(quantised, tmp_path / "model.edgert", **F32))
    tokens = prompt_tokens(24, model.vocab_size)
    expected, margins, _ = Reference.load(plain).forward(tokens)
    assert near_ties(expected, margins).size == 0
    assert_close(model.logits(model.sequence(), tokens), expected, list(range(len(tokens))))


def test_mlx_gpt_oss(gpt_oss: tuple[Path, Path], tmp_path: Path) -> None:
    """MLX takes gate and up apart, and calls biases otherwise."""
    from safetensors.numpy import load_file

    _, plain = gpt_oss
    parts: Parts = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if ".experts." not in name:
            parts[name] = ("F32", tensor)
            continue
        module, _, projection = name.rpartition(".")
        projection, bias, _ = projection.partition("_bias")
        halves = {"gate_proj": np.s_[:, ::2], "up_proj": np.s_[:, 1::2]}
        for half, rows in halves.items() if projection == "gate_up_proj" else [("down_proj", np.s_[:])]:
            if bias:
                parts[f"{module}.{half}.bias"] = ("F32", tensor[rows])
                continue
            weight = tensor.transpose(0, 2, 1)[rows]
            packed, _ = mlx_mxfp4(weight.reshape(-1, weight.shape[-1]))
            for part, (dtype, array) in packed.items():
                parts[f"{module}.{half}.{part}"] = (dtype, array.reshape(*weight.shape[:2], -1))
    shutil.copytree(plain, tmp_path / "quantised")
    config = json.loads((plain / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    write_parts(tmp_path / "quantised" / "model.safetensors", parts)
    expected = sources(plain)
    for name, source in sources(tmp_path / "quantised").items():
        whole = weights(expected[name], 0, source.rows)
        assert np.array_equal(weights(source, 0, source.rows), whole), name
        assert isinstance(source.tensor, TensorInfo) or np.array_equal(carried(source), whole)


def test_deepseek_v3_in_fp8(tmp_path: Path) -> None:
    """Blocks of 128 x 128 under everything that is projected, as published; rows are sliced for the latent attention."""
    from safetensors.numpy import load_file

    variant = next(variant for variant in VARIANTS if variant.family == "deepseek_v3" and not variant.shards)
    plain = make_checkpoint(tmp_path / "plain", variant)
    shutil.copytree(plain, tmp_path / "quantised")
    parts: Parts = {}
    floats: dict[str, Array] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        floats[name] = tensor
        parts[name] = ("F32", tensor)
        if "proj" in name and name.endswith(".weight") and tensor.ndim == 2:
            packed, floats[name] = fp8((128, 128), "scale")(tensor)
            parts |= {name: packed["weight"], name + "_scale_inv": packed["scale"]}
    write_weights(plain, floats)
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = FP8 | {"weight_block_size": [128, 128]}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    write_parts(tmp_path / "quantised" / "model.safetensors", parts)
    expected = sources(plain)
    quantised = sources(tmp_path / "quantised")
    assert any(not isinstance(source.tensor, TensorInfo) for source in quantised.values())
    for name, source in quantised.items():
        whole = weights(expected[name], 0, source.rows)
        assert np.array_equal(weights(source, 0, source.rows), whole), name
