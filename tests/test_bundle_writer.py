"""The writer of bundles: exact bytes, the same every time."""

from __future__ import annotations

import json
import os
import shutil
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, contents, read_manifest
from checkpoints import TINY_CONFIG, encode, qwen3_moe_shapes, random_weights, tiny_checkpoint, write_weights

from edgert import _native
from edgert.converters import layout as layouts
from edgert.converters import pack
from edgert.converters.checkpoint import open_checkpoint
from edgert.converters.convert import ConversionReport, convert
from edgert.converters.formats import Defaults, Formats, choose_formats
from edgert.converters.layout import plan_layout
from edgert.converters.registry import read_decoder
from edgert.converters.tensor import TensorInfo
from edgert.errors import (
    CorruptError,
    InvalidArgumentError,
    NotFoundError,
)


def tensor_bytes(bundle: Path, manifest: dict[str, Any], row: dict[str, Any]) -> bytes:
    with (bundle / manifest["files"][row["file"]]["name"]).open("rb") as file:
        file.seek(row["offset"])
        content: bytes = file.read(row["bytes"])
        return content


# --- content ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_f32_bundle_holds_the_checkpoint(tmp_path: Path, dtype: str) -> None:
    weights = random_weights(qwen3_moe_shapes(TINY_CONFIG), 0)
    convert(tiny_checkpoint(tmp_path / "c", dtype=dtype), tmp_path / "m.edgert", **F32)
    manifest = read_manifest(tmp_path / "m.edgert")
    for row in manifest["tensors"]:
        stored = tensor_bytes(tmp_path / "m.edgert", manifest, row)
        if len(row["shape"]) == 2:
            stored = _native.unpack(row["format"], stored, *row["shape"])
        assert encode(np.frombuffer(stored, "<f4"), dtype) == encode(weights[row["source"]], dtype), row[
            "name"
        ]
        assert _native.xxh64(tensor_bytes(tmp_path / "m.edgert", manifest, row)) == row["checksum"]


def test_experts_are_gate_up_and_down_in_one_extent(tmp_path: Path) -> None:
    weights = random_weights(qwen3_moe_shapes(TINY_CONFIG), 0)
    convert(tiny_checkpoint(tmp_path / "c"), tmp_path / "m.edgert", **F32)
    manifest = read_manifest(tmp_path / "m.edgert")
    file, offset, size, checksum, number = manifest["experts"][1]["extents"][5]
    extent = tensor_bytes(tmp_path / "m.edgert", manifest, {"file": file, "offset": offset, "bytes": size})
    assert manifest["expert_formats"][number] == ["f32"] * 3 and checksum == _native.xxh64(extent)
    assert offset % manifest["alignment"] == 0
    for part, (rows, cols) in {"gate": (40, 72), "up": (40, 72), "down": (72, 40)}.items():
        size = _native.packed_bytes("f32", rows, cols)
        packed, extent = extent[:size], extent[size:]
        assert (
            _native.unpack("f32", packed, rows, cols)
            == weights[f"model.layers.1.mlp.experts.5.{part}_proj.weight"].tobytes()
        )
    assert len(extent) == 0


def test_the_native_reader_verifies_it(tiny_bundle: Path) -> None:
    assert _native.verify_bundle(str(tiny_bundle)) > 0


def test_slabs_do_not_show(
    tiny_source: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "SLAB_BYTES", 1)  # one tile at a time
    convert(tiny_source, tmp_path / "m.edgert")
    assert contents(tmp_path / "m.edgert") == contents(tiny_bundle)


@pytest.mark.parametrize(
    "options", [{}, {"expert_format": "int2", "dense_format": "f16", "remainders": True}]
)
def test_equal_inputs_give_equal_bytes(tmp_path: Path, options: dict[str, Any]) -> None:
    convert(tiny_checkpoint(tmp_path / "c"), tmp_path / "one.edgert", threads=1, **options)
    moved = shutil.copytree(tmp_path / "c", tmp_path / "elsewhere" / "d")
    convert(moved, tmp_path / "two.edgert", threads=3, **options)
    assert contents(tmp_path / "one.edgert") == contents(tmp_path / "two.edgert")


def test_sharding_and_fusing_change_provenance_only(tmp_path: Path) -> None:
    whole = tiny_checkpoint(tmp_path / "whole")
    sharded = tiny_checkpoint(tmp_path / "sharded", shards=3)
    fused = shutil.copytree(whole, tmp_path / "fused")
    weights = random_weights(qwen3_moe_shapes(TINY_CONFIG), 0)
    for layer in range(TINY_CONFIG["num_hidden_layers"]):

        def stack(part: str, layer: int = layer) -> np.ndarray:
            names = [
                f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight"
                for e in range(TINY_CONFIG["num_experts"])
            ]
            return np.stack([weights.pop(name) for name in names])

        weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate(
            [stack("gate"), stack("up")], 1
        )
        weights[f"model.layers.{layer}.mlp.experts.down_proj"] = stack("down")
    write_weights(fused, weights)
    manifests = []
    for source in (whole, sharded, fused):
        convert(source, tmp_path / "m.edgert")
        manifest = read_manifest(tmp_path / "m.edgert")
        del manifest["bundle_id"], manifest["provenance"]
        manifests.append(manifest)
    assert manifests[0] == manifests[1] == manifests[2]


def test_manifest_has_no_times_and_no_paths(tiny_bundle: Path, tiny_source: Path) -> None:
    text = (tiny_bundle / "manifest.json").read_text()
    assert str(tiny_source.parent) not in text and "20" + "26-" not in text
    provenance = read_manifest(tiny_bundle)["provenance"]
    assert provenance["files"] == [
        {"name": "model.safetensors", "bytes": (tiny_source / "model.safetensors").stat().st_size}
    ]


def test_report(tiny_source: Path, tmp_path: Path) -> None:
    report = convert(tiny_source, tmp_path / "m.edgert")
    assert isinstance(report, ConversionReport)
    assert report.weights == sum(int(np.prod(s)) for s in qwen3_moe_shapes(TINY_CONFIG).values())
    assert report.source_bytes == 4 * report.weights and report.num_experts == 24
    assert report.bytes == sum(f["bytes"] for f in read_manifest(tmp_path / "m.edgert")["files"])
    errors = {row["kind"]: row["relative_error"] for row in report.quantization["tensors"]}
    assert errors["router"] == 0 and 0 < errors["attention.q"] < 0.01 < errors["experts.up"] < 0.15


def test_progress_reaches_the_whole_source(tiny_source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = convert(
        tiny_source, tmp_path / "m.edgert", progress=lambda done, total: calls.append((done, total))
    )
    assert calls == sorted(calls) and calls[-1] == (report.source_bytes, report.source_bytes)


# --- formats ------------------------------------------------------------------------------------------


def formats_of(bundle: Path) -> dict[str, str]:
    return {row["name"].removeprefix("layers.0."): row["format"] for row in read_manifest(bundle)["tensors"]}


def test_formats_are_chosen_apart(tiny_source: Path, tmp_path: Path) -> None:
    convert(tiny_source, tmp_path / "m.edgert")
    formats = formats_of(tmp_path / "m.edgert")
    assert (formats["embedding"], formats["output"], formats["attention.q"]) == ("int8", "int8", "int8")
    convert(
        tiny_source, tmp_path / "m.edgert", dense_format="f16", embedding_format="int4", output_format="bf16"
    )
    formats = formats_of(tmp_path / "m.edgert")
    assert (formats["embedding"], formats["output"], formats["attention.q"]) == ("int4", "bf16", "f16")
    assert {formats[name] for name in ("router", "attention_norm", "final_norm")} == {"f32"}


def test_embedding_and_output_follow_the_dense_format(tiny_source: Path, tmp_path: Path) -> None:
    convert(tiny_source, tmp_path / "m.edgert", dense_format="f32", expert_format="f32")
    assert set(formats_of(tmp_path / "m.edgert").values()) == {"f32"}


def test_experts_of_mixed_formats(tiny_source: Path, tmp_path: Path) -> None:
    chosen = {"0.3": "int8", "1.*": "int2", "*.7": ["f16", "int4", "int3"]}
    convert(tiny_source, tmp_path / "m.edgert", expert_formats=chosen)
    manifest = read_manifest(tmp_path / "m.edgert")
    names = [
        [manifest["expert_formats"][row[4]] for row in layer["extents"]] for layer in manifest["experts"]
    ]
    assert names[0][3] == ["int8"] * 3 and names[0][0] == ["int4"] * 3
    assert names[1] == [["int2"] * 3] * 8
    assert names[0][7] == names[2][7] == ["f16", "int4", "int3"]
    convert(
        tiny_source,
        tmp_path / "f.edgert",
        expert_formats=lambda *expert: "int8" if expert == (0, 3) else None,
    )
    assert read_manifest(tmp_path / "f.edgert")["expert_formats"] == [["int4"] * 3, ["int8"] * 3]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"dense_format": "int5"}, "dense_format: 'int5'; known are f32"),
        (
            {"dense_format": "q4_k"},
            "dense_format: 'q4_k' is only kept from checkpoints that hold it.*allowed are f32",
        ),
        ({"expert_format": "mxfp4"}, "expert_format: 'mxfp4' is only kept"),
        ({"expert_formats": {"0.0": "q4_1"}}, "expert 0.0: 'q4_1' is only kept"),
        ({"expert_format": ["int4", "int4"]}, "expert_format: 2 formats"),
        ({"expert_formats": {"0.8": "int4"}}, "'0.8' names no expert"),
        ({"expert_formats": {"3.0": "int4"}}, "'3.0' names no expert"),
        ({"expert_formats": {"zero": "int4"}}, "'zero' names no expert"),
        ({"expert_formats": {"0.0": "q4"}}, "expert 0.0: 'q4'"),
        ({"expert_formats": ["int4"]}, "a mapping"),
        ({"alignment": 0}, "alignment: 0"),
        ({"alignment": 12288}, "alignment: 12288"),
        ({"alignment": 2 << 20}, "alignment: 2097152"),
        ({"threads": -1}, "threads: -1"),
        ({"threads": 9999}, "threads: 9999"),
    ],
)
def test_bad_options(tiny_source: Path, tmp_path: Path, options: dict[str, Any], names: str) -> None:
    with pytest.raises(InvalidArgumentError, match=names.replace("[", r"\[")):
        convert(tiny_source, tmp_path / "m.edgert", **options)
    assert os.listdir(tmp_path) == []


def test_output_of_tied_embeddings_has_no_format_of_its_own(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "c", tie_word_embeddings=True)
    convert(source, tmp_path / "m.edgert", embedding_format="f16", output_format="f16")
    with pytest.raises(InvalidArgumentError, match="output_format"):
        convert(source, tmp_path / "m.edgert", embedding_format="f16", output_format="int8")


def test_output_of_tied_embeddings_that_are_kept_has_no_format_of_its_own() -> None:
    def chosen(embedding: str | None, output: str | None) -> Formats:
        return choose_formats(None, None, embedding, output, None, Defaults(), tied=True, quantised=True)

    with pytest.raises(InvalidArgumentError, match="whose format is the one that it is stored in"):
        chosen(None, Defaults.embedding_format)
    assert {"embedding", "output"} <= chosen(None, None).stored
    assert {"embedding", "output"}.isdisjoint(chosen("int8", "int8").stored)


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "c")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(CorruptError, match="lm_head.weight.*differs"):
        convert(source, tmp_path / "m.edgert")
    weights = random_weights(qwen3_moe_shapes(TINY_CONFIG), 0)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    write_weights(source, weights)
    convert(source, tmp_path / "m.edgert")
    assert "output" not in formats_of(tmp_path / "m.edgert")


def test_device_profile(tiny_source: Path, tmp_path: Path) -> None:
    from edgert.devices import device_names, load_device

    for name in device_names():
        chosen = load_device(name).bundle
        convert(tiny_source, tmp_path / "m.edgert", device=name)
        manifest = read_manifest(tmp_path / "m.edgert")
        assert manifest["device"] == name and manifest["alignment"] == chosen.alignment_bytes
        assert manifest["defaults"]["context"] == min(chosen.context_tokens, 512)
        assert manifest["expert_formats"] == [[chosen.expert_format] * 3]
        assert formats_of(tmp_path / "m.edgert")["output"] == chosen.output_format
    with pytest.raises(NotFoundError, match="toaster"):
        convert(tiny_source, tmp_path / "m.edgert", device="toaster")


def test_remainders(tmp_path: Path) -> None:
    """remainders.bin holds what the packing routine gives, tensor by tensor."""
    source = tiny_checkpoint(tmp_path / "c")
    convert(source, tmp_path / "m.edgert", remainders=True, dense_format="f32", expert_format="int4")
    manifest = read_manifest(tmp_path / "m.edgert")
    table = {row[0]: row for row in manifest["remainders"]["tensors"]}
    assert set(table) == {
        f"layers.{i}.experts.{e}.{p}" for i in range(3) for e in range(8) for p in ("gate", "up", "down")
    }
    _, offset, size, checksum = table["layers.1.experts.5.down"]
    row = {"file": manifest["remainders"]["file"], "offset": offset, "bytes": size}
    stored = tensor_bytes(tmp_path / "m.edgert", manifest, row)
    assert size == 72 * 40 and offset % 64 == 0 and _native.xxh64(stored) == checksum
    weights = random_weights(qwen3_moe_shapes(TINY_CONFIG), 0)[
        "model.layers.1.mlp.experts.5.down_proj.weight"
    ]
    expected, packed = bytearray(size), bytearray(_native.packed_bytes("int4", 72, 40))
    _native.pack("int4", weights.tobytes(), "f32", 72, 40, destination=packed, remainder=expected)
    assert stored == bytes(expected)


# --- sizes past 4 GiB, with files that are mostly holes -------------------------------------------------


def test_offsets_past_4_gib(tmp_path: Path) -> None:
    """A checkpoint of two shards and more than 8 GB, of which one expert is really there and packed."""
    experts, width, hidden = 160, 1024, 4096
    config = TINY_CONFIG | {"num_hidden_layers": 1, "num_experts": experts, "moe_intermediate_size": width}
    config |= {"hidden_size": hidden, "vocab_size": 16, "tie_word_embeddings": True}
    shapes = {name: shape for name, shape in qwen3_moe_shapes(config).items() if ".experts." not in name}
    prefix = "model.layers.0.mlp.experts."
    shards: dict[str, dict[str, tuple[int, ...]]] = {
        "model-00001-of-00002.safetensors": shapes | {prefix + "gate_up_proj": (experts, 2 * width, hidden)},
        "model-00002-of-00002.safetensors": {prefix + "down_proj": (experts, hidden, width)},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, tensors in shards.items():
        table: dict[str, Any] = {}
        end = 0
        for name, shape in tensors.items():
            begin, end = end, end + 4 * int(np.prod(shape))
            table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(table).encode()
        (tmp_path / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(tmp_path / file, 8 + len(text) + end)
    assert sum((tmp_path / file).stat().st_size for file in shards) > 8 * 10**9

    decoder = read_decoder(open_checkpoint(tmp_path))
    last = decoder.experts[-1]
    values = np.random.default_rng(0).standard_normal((width, hidden), np.float32)
    assert isinstance(last.up.tensor, TensorInfo)
    begin = last.up.tensor.begin + last.up.first_row * last.up.tensor.row_bytes
    with last.up.tensor.path.open("r+b") as shard:
        assert begin > 4 << 30
        shard.seek(begin)
        shard.write(values.tobytes())
    formats = choose_formats("f32", "f32", None, None, None, Defaults(), tied=True)
    layout = plan_layout(decoder, formats, alignment=16384, remainders=False)
    extent = layout.experts[-1]
    assert extent.offset > 4 << 30
    with (tmp_path / "experts.bin").open("w+b") as written:
        packed = pack.pack_extent(
            extent.parts, written.fileno(), extent.offset, None, lambda done: None, threading.Event()
        )
        matrix = _native.packed_bytes("f32", width, hidden)
        written.seek(extent.offset + matrix)
        assert _native.unpack("f32", written.read(matrix), width, hidden) == values.tobytes()
        written.seek(extent.offset)
        assert _native.xxh64(written.read(extent.bytes)) == packed.checksum


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """An embedding of 128 MiB passes through slabs of a few MiB."""
    config = TINY_CONFIG | {"vocab_size": 65536, "hidden_size": 512, "num_hidden_layers": 1, "num_experts": 2}
    config["tie_word_embeddings"] = True
    table, end = {}, 0
    for name, shape in qwen3_moe_shapes(config).items():
        begin, end = end, end + 4 * int(np.prod(shape))
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / "model.safetensors", 8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tracemalloc.start()
    try:
        report = convert(tmp_path, tmp_path.with_suffix(".edgert"), threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.source_bytes > 128 << 20 and peak < 32 << 20


def test_expert_files_are_bounded(tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "MAX_EXPERT_FILE_BYTES", 100_000)
    convert(tiny_source, tmp_path / "m.edgert")
    manifest = read_manifest(tmp_path / "m.edgert")
    sizes = {file["name"]: file["bytes"] for file in manifest["files"]}
    assert list(sizes)[:3] == ["dense.bin", "experts-00000.bin", "experts-00001.bin"]
    assert all(size <= 100_000 + 16384 for name, size in sizes.items() if name.startswith("experts"))
    assert _native.verify_bundle(str(tmp_path / "m.edgert")) > 0
