"""GGUF files: what they hold is carried over exactly, and means what the same model's safetensors mean."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bundles import F32, contents, convert, open_model, read_manifest
from checkpoints import prompt_tokens
from gguf_models import MODELS, Model, write_pair
from ggufs import (
    QWEN3_MOE,
    Tensor,
    field,
    from_q8_0,
    gguf,
    gguf_arrays,
    metadata,
    qwen3_moe_arrays,
    write_gguf,
)
from test_bundle_format import assert_engine_agrees

from edgert import _native
from edgert.errors import NotFoundError


@pytest.mark.parametrize("pair", MODELS, ids=lambda pair: pair.variant.name)
def test_a_gguf_computes_what_the_checkpoint_does(pair: Model, tmp_path: Path) -> None:
    source, path = write_pair(tmp_path, pair)
    expected = convert(source, tmp_path / "a.edgert", **F32)
    actual = convert(path, tmp_path / "b.edgert", **F32)
    tokens = prompt_tokens(40, 160)
    a, b = (model.logits(model.sequence(), tokens) for model in map(open_model, (expected, actual)))
    assert np.abs(a - b).max() <= 2e-5 * np.abs(a).max()


# --- what is quantised is carried over ------------------------------------------------------------------


def quantised(path: Path, seed: int = 0) -> dict[str, Tensor]:
    """A model whose matrices are Q8_0 and whose embedding is f16, written at `path`."""
    arrays = gguf_arrays(qwen3_moe_arrays(seed))
    tensors = {}
    for name, array in arrays.items():
        exact = array.ndim == 1 or "ffn_gate_inp" in name
        tensors[name] = Tensor.of(array, "F32" if exact else "F16" if name == "token_embd.weight" else "Q8_0")
    path.write_bytes(gguf(metadata("qwen3moe", QWEN3_MOE, general__name="made"), tensors))
    return tensors


def matrix(bundle: Path, name: str) -> np.ndarray:
    """A dense matrix of a bundle, dequantised."""
    manifest = read_manifest(bundle)
    row = next(tensor for tensor in manifest["tensors"] if tensor["name"] == name)
    packed = (bundle / manifest["files"][row["file"]]["name"]).read_bytes()[row["offset"] :][: row["bytes"]]
    return np.frombuffer(_native.unpack(row["format"], packed, *row["shape"]), np.float32).reshape(
        row["shape"]
    )


def test_codes_are_carried_over(tmp_path: Path) -> None:
    tensors = quantised(tmp_path / "model.gguf")
    bundle = convert(tmp_path / "model.gguf", tmp_path / "out.edgert")
    manifest = read_manifest(bundle)
    formats = {row["name"]: row["format"] for row in manifest["tensors"]}
    assert formats["embedding"] == "f16"
    assert formats["layers.0.attention.q"] == formats["output"] == "int8"
    assert formats["layers.0.router"] == formats["final_norm"] == "f32"
    assert manifest["expert_formats"] == [["int8", "int8", "int8"]]
    assert all(row["relative_error"] == 0 for row in manifest["quantization"]["tensors"])
    assert manifest["quantization"]["options"]["stored_formats"] == ["dense", "embedding", "expert", "output"]
    assert manifest["provenance"]["gguf"]["general.name"] == "made"
    for name, own in (("layers.1.attention.o", "blk.1.attn_output.weight"), ("output", "output.weight")):
        expected = from_q8_0(tensors[own].data, tensors[own].shape)
        assert np.array_equal(matrix(bundle, name), expected)


def test_the_kept_codes_compute_what_they_say(tmp_path: Path) -> None:
    quantised(tmp_path / "model.gguf")
    assert_engine_agrees(convert(tmp_path / "model.gguf", tmp_path / "kept.edgert"), 320)


def test_a_format_that_is_named_is_packed_anew(tmp_path: Path) -> None:
    quantised(tmp_path / "model.gguf")
    bundle = convert(
        tmp_path / "model.gguf", tmp_path / "out.edgert", expert_format="int4", embedding_format="int8"
    )
    manifest = read_manifest(bundle)
    formats = {row["name"]: row["format"] for row in manifest["tensors"]}
    assert manifest["expert_formats"] == [["int4", "int4", "int4"]]
    assert (formats["embedding"], formats["layers.0.attention.q"]) == ("int8", "int8")
    errors = {row["kind"]: row["relative_error"] for row in manifest["quantization"]["tensors"]}
    assert errors["experts.gate"] > 0 and errors["embedding"] > 0 and errors["attention.q"] == 0


def test_a_split_model_is_the_whole_one(tmp_path: Path) -> None:
    tensors = quantised(tmp_path / "whole.gguf")
    names = list(tensors)
    (tmp_path / "parts").mkdir()
    for number in range(3):
        split = [field("split.no", number, "uint16"), field("split.count", 3, "uint16"),
                 field("split.tensors.count", len(names), "int32")]  # fmt: skip
        fields = [*metadata("qwen3moe", QWEN3_MOE, general__name="made"), *split] if number == 0 else split
        part = {name: tensors[name] for name in names[number::3]}
        (tmp_path / f"parts/model-{number + 1:05}-of-00003.gguf").write_bytes(gguf(fields, part))
    whole = convert(tmp_path / "whole.gguf", tmp_path / "a.edgert")
    for number in (1, 2):  # any part names the model
        split_up = convert(
            tmp_path / f"parts/model-0000{number}-of-00003.gguf", tmp_path / f"{number}.edgert"
        )
        tokens = prompt_tokens(20, 320)
        a, b = (model.logits(model.sequence(), tokens) for model in map(open_model, (whole, split_up)))
        assert np.array_equal(a, b)


def test_a_link_to_a_file_is_the_file(tmp_path: Path) -> None:
    """As people link models from one disk to another."""
    (tmp_path / "store").mkdir()
    quantised(tmp_path / "store/blob")
    (tmp_path / "model.gguf").symlink_to("store/blob")
    linked = convert(tmp_path / "model.gguf", tmp_path / "linked.edgert")
    plain = convert(tmp_path / "store/blob", tmp_path / "plain.edgert")
    experts = "experts-00000.bin"
    assert (linked / experts).read_bytes()[32:] == (plain / experts).read_bytes()[32:]


def test_a_folder_of_files_asks_for_one(tmp_path: Path) -> None:
    quantised(tmp_path / "model.gguf")
    with pytest.raises(NotFoundError, match=r"name one of them, such as .*/model\.gguf"):
        convert(tmp_path, tmp_path.with_name("model.edgert"))


def test_a_bundle_is_no_checkpoint(tmp_path: Path) -> None:
    quantised(tmp_path / "model.gguf")
    bundle = convert(tmp_path / "model.gguf", tmp_path / "model.edgert")
    with pytest.raises(NotFoundError, match="is a bundle already"):
        convert(bundle, tmp_path / "again.edgert")


def test_version_2_and_another_alignment(tmp_path: Path) -> None:
    tensors = quantised(tmp_path / "model.gguf")
    first = contents(convert(tmp_path / "model.gguf", tmp_path / "a.edgert"))
    fields = [*metadata("qwen3moe", QWEN3_MOE, general__name="made"), field("general.alignment", 4096)]
    (tmp_path / "model.gguf").write_bytes(gguf(fields, tensors, version=2, alignment=4096))
    second = contents(convert(tmp_path / "model.gguf", tmp_path / "b.edgert"))
    header = 32
    for name in ("dense.bin", "experts-00000.bin"):
        assert first[name][header:] == second[name][header:]


def test_experts_one_by_one_and_rope_factors(tmp_path: Path) -> None:
    """Files of 2023 have a tensor an expert; llama 3's frequencies are divided by a tensor of factors."""
    values = {
        "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
        "attention.head_count": 2, "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0, "rope.dimension_count": 16, "expert_count": 2, "expert_used_count": 1,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (64, 32), "output": (64, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32),
              "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate_inp": (2, 32)}  # fmt: skip
    arrays = {
        f"{name}.weight": rng.standard_normal(shape, np.float32) * 0.1 for name, shape in shapes.items()
    }
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    arrays |= {f"{name}.weight": np.ones(32, np.float32) for name in norms}
    experts = rng.standard_normal((3, 2, 32, 32)).astype(np.float32)
    stacked, apart = dict(arrays), dict(arrays)
    for part, weights in zip(("gate", "up", "down"), experts, strict=True):
        stacked[f"blk.0.ffn_{part}_exps.weight"] = weights
        apart |= {f"blk.0.ffn_{part}.{index}.weight": weights[index] for index in range(2)}
    fields = metadata("llama", values)
    a = contents(convert(write_gguf(tmp_path / "a.gguf", fields, stacked), tmp_path / "a.edgert"))
    b = contents(convert(write_gguf(tmp_path / "b.gguf", fields, apart), tmp_path / "b.edgert"))
    assert a["experts-00000.bin"][32:] == b["experts-00000.bin"][32:]

    stacked["rope_freqs.weight"] = np.array([1, 1, 1, 1, 2, 4, 8, 8], np.float32)
    bundle = convert(write_gguf(tmp_path / "c.gguf", fields, stacked), tmp_path / "c.edgert")
    plain, scaled = (
        read_manifest(path)["recipe"]["blocks"][0]["mixer"]["rope"]
        for path in (tmp_path / "a.edgert", bundle)
    )
    assert plain["layout"] == scaled["layout"] == "interleaved"
    ratios = np.array(plain["inv_freq"]) / np.array(scaled["inv_freq"])
    assert np.allclose(ratios, [1, 1, 1, 1, 2, 4, 8, 8])


# --- running one ----------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_load_makes_a_bundle_once_and_anew_when_the_file_changes(tmp_path: Path, home: Path) -> None:
    import edgert

    path = tmp_path / "small model.gguf"
    quantised(path)
    tokens = prompt_tokens(20, 320)
    with edgert.load(path, memory="64MiB") as model:
        assert model.name == "small-model"
        first = model.logits(tokens)
        bundle = model.path
    assert home in bundle.parents
    made = (bundle / "manifest.json").stat().st_mtime_ns
    with edgert.load(path, memory="64MiB") as model:
        assert model.path == bundle and np.array_equal(model.logits(tokens), first)
    assert (bundle / "manifest.json").stat().st_mtime_ns == made

    quantised(path, seed=1)
    with edgert.load(path, memory="64MiB") as model:
        assert model.path != bundle and not np.array_equal(model.logits(tokens), first)
    assert not bundle.exists()  # of what the file was
    assert len(list((home / "cache/converted").iterdir())) == 1


def test_a_file_that_cannot_be_converted_leaves_nothing(tmp_path: Path, home: Path) -> None:
    import edgert
    from edgert.errors import CorruptError

    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(CorruptError, match=r"bad\.gguf"):
        edgert.load(tmp_path / "bad.gguf")
    with pytest.raises(NotFoundError, match=r"none\.gguf"):
        edgert.load(tmp_path / "none.gguf")
    assert list((home / "cache/converted").iterdir()) == []


def test_commands_take_a_gguf(tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgert.cli.main import main

    path = str(tmp_path / "model.gguf")
    quantised(tmp_path / "model.gguf")
    assert main(["show", path, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bundle"] is None and shown["num_experts"] == 24
    assert (
        set(shown["formats"]["experts"]) == {"int8"} and shown["provenance"]["gguf"]["general.name"] == "made"
    )
    assert main(["plan", path, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["minimum_bytes"] == shown["minimum_bytes"]
    assert not (home / "cache/converted").exists()  # neither of them converts
    assert main(["verify", path, "--json"]) == 0
    captured = capsys.readouterr()
    assert "converting" in captured.err and json.loads(captured.out)["ok"]
    assert main(["verify", path, "--json"]) == 0
    assert "converting" not in capsys.readouterr().err
    assert main(["show", path]) == 0
    assert "int8" in capsys.readouterr().out
