"""Shapes of known models: bundles of random weights to measure with, written once and found again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from bundles import flip_bit, read_manifest

import edgert
from edgert import _native, shapes
from edgert.benchmark import benchmark
from edgert.converters import synthetic
from edgert.converters.formats import Defaults, choose_formats
from edgert.converters.layout import plan_layout
from edgert.converters.manifest import build_manifest
from edgert.converters.pack import Packed
from edgert.converters.synthetic import synthetic_decoder
from edgert.errors import InvalidArgumentError, StorageError
from edgert.roof import Bandwidths, Footprint

INT4 = choose_formats(None, None, None, None, None, Defaults("int4", "int4", "int4", "int4"), tied=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    return tmp_path


def manifest_of(name: str) -> dict[str, Any]:
    """What the bundle's manifest would say, without its gigabytes."""
    decoder = synthetic_decoder(name, shapes.SHAPES[name])
    layout = plan_layout(decoder, INT4, alignment=16384, remainders=False)
    packed = [Packed("", (), ()) for _ in (*layout.dense, *layout.experts)]
    return build_manifest(decoder, layout, packed, {}, {})


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [("olmoe-1b-7b", 6.92, 1.28), ("qwen3-30b-a3b", 30.5, 3.35), ("mixtral-8x7b", 46.7, 12.9)],
)
def test_a_shape_has_the_parameters_of_its_model(name: str, billions: float, active: float) -> None:
    manifest = manifest_of(name)
    footprint = Footprint.of(manifest)
    embedding = manifest["recipe"]["vocab_size"] * manifest["recipe"]["hidden_size"]
    dense = footprint.dense_weights + footprint.output_weights + embedding
    experts = sum(
        len(sizes) * weights
        for sizes, weights in zip(footprint.experts, footprint.expert_weights, strict=True)
    )
    assert (dense + experts) / 1e9 == pytest.approx(billions, rel=0.005)
    assert (dense + footprint.routed_weights) / 1e9 == pytest.approx(active, rel=0.01)
    assert 4.375 < footprint.bits_per_weight <= 4.5


def test_a_shape_is_a_sound_bundle_of_the_formats_asked_for(home: Path) -> None:
    path = shapes.shape_bundle("tiny", dense_format="int8", expert_format="int2")
    assert path.parent == home / "cache" / "shapes"
    assert _native.verify_bundle(str(path)) > 1 << 20
    manifest = read_manifest(path)
    formats = {tensor["name"]: tensor["format"] for tensor in manifest["tensors"]}
    assert formats["layers.0.attention.q"] == formats["output"] == "int8"
    assert formats["layers.0.router"] == "f32"
    assert manifest["expert_formats"] == [["int2", "int2", "int2"]]


def test_the_same_shape_gives_the_same_bytes(home: Path, tiny_shape: Path) -> None:
    again = shapes.shape_bundle("tiny")
    assert again != tiny_shape
    for file in sorted(tiny_shape.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_a_bundle_that_is_there_is_used_again(home: Path) -> None:
    path = shapes.shape_bundle("tiny")
    before = (path / "manifest.json").stat()
    assert shapes.shape_bundle("tiny") == path
    assert (path / "manifest.json").stat().st_ino == before.st_ino


@pytest.mark.parametrize("damage", ["truncated", "manifest"])
def test_a_damaged_bundle_is_written_again(home: Path, tiny_shape: Path, damage: str) -> None:
    path = shapes.shape_bundle("tiny")
    if damage == "truncated":
        os.truncate(path / "experts-00000.bin", 16384)
    else:
        flip_bit(path / "manifest.json", 200)
    assert shapes.shape_bundle("tiny") == path
    for file in sorted(tiny_shape.iterdir()):
        assert (path / file.name).read_bytes() == file.read_bytes()


def test_a_bundle_of_other_weights_is_written_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shapes.shape_bundle("tiny")
    monkeypatch.setattr(synthetic, "GENERATION", synthetic.GENERATION + 1)
    shapes.shape_bundle("tiny")
    assert read_manifest(path)["provenance"]["generation"] == synthetic.GENERATION


def test_progress_counts_the_bytes_of_the_bundle(home: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = shapes.shape_bundle("tiny", progress=lambda done, total: seen.append((done, total)))
    size = sum(file.stat().st_size for file in path.glob("*.bin"))
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096) + (100,) * 8))
    with pytest.raises(StorageError, match="the bundle needs .* bytes, but only 409600 are free"):
        shapes.shape_bundle("mixtral-8x7b")
    assert not any((home / "cache" / "shapes").iterdir())


def test_unknown_shapes_and_formats_are_refused(home: Path) -> None:
    with pytest.raises(
        InvalidArgumentError, match="olmoe-1b-7b, qwen3-30b-a3b, mixtral-8x7b, gpt-oss-20b, tiny"
    ):
        shapes.shape_bundle("gpt")
    with pytest.raises(InvalidArgumentError, match="expert_format"):
        shapes.shape_bundle("tiny", expert_format="int5")


def test_random_weights_route_every_token_apart(tiny_shape: Path) -> None:
    """With a mean that is not zero, or outputs that outgrow the embeddings, the overlap would go towards 1."""
    with edgert.load(tiny_shape, threads=1, context=400) as model:
        report = benchmark(model, prompt_tokens=64, decode_tokens=256, repetitions=2)
    assert report["uniform_overlap"] == pytest.approx(4 / 32)
    assert report["expert_overlap"] == pytest.approx(4 / 32, rel=0.25)


@pytest.mark.parametrize("own", [None, "uniform"])
def test_the_roof_stands_beside_the_result(tiny_shape: Path, own: str | None) -> None:
    slow = Bandwidths(memory_bytes_per_s=1e6, storage_bytes_per_s=1e3)
    # Without reading ahead, whose trial of itself is a matter of time, every byte is one that a token asked for.
    with edgert.load(tiny_shape, memory="1.6MiB", threads=1, context=100, prefetch="none") as model:
        assert not model.resident
        report = benchmark(
            model, prompt_tokens=16, decode_tokens=64, repetitions=2, routing=own, bandwidths=slow
        )
        assert model.native.plan()["slots_bytes"] > model.native.plan()["token_bytes"]
    for row in report["results"]:
        assert row["roof_tokens_per_s"] == pytest.approx(1e3 / row["simulated_bytes_per_token"])
        assert row["roof_fraction"] == row["tokens_per_s"] / row["roof_tokens_per_s"]
    decode = report["results"][1]
    assert decode["bytes_read_per_token"] <= 1.03 * decode["simulated_bytes_per_token"]
