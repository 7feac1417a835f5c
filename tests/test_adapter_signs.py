"""Adapters as signs: the code, what it costs, and streams that are wrong."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_directories import lora, shira
from shell import Shell, assert_fails

import edgert as api
from edgert.adapter_sources import read_adapter
from edgert.bundle import Bundle
from edgert.converters.adapter_file import AdapterFile, write_adapter
from edgert.converters.adapter_part import Part
from edgert.converters.adapter_shapes import Shapes
from edgert.converters.compress import compress
from edgert.converters.fuse import fuse
from edgert.converters.merging import Thinning, merge
from edgert.converters.signs import SignsHeader, decode, encode
from edgert.errors import CorruptError, InvalidArgumentError


def bytes_of(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 9), st.integers(1, 400), st.floats(0.001, 1), st.integers(0, 2**32 - 1))
def test_what_is_kept_comes_back(rows: int, cols: int, density: float, seed: int) -> None:
    """The largest values, in place and with their signs; the code takes what its header says."""
    values = np.random.default_rng(seed).standard_normal(rows * cols).astype(np.float32)
    coded = encode(values, np.arange(values.size), (rows, cols), density)
    places, signs = decode(coded.header, bytes_of(coded.data), "x")
    largest = np.sort(np.argsort(-np.abs(values), kind="stable")[: int(density * values.size)])
    np.testing.assert_array_equal(places, largest)
    np.testing.assert_array_equal(signs, np.sign(values[largest]))
    assert len(coded.data) == coded.header.bytes
    if largest.size:
        assert coded.header.value == pytest.approx(float(np.abs(values[largest]).mean()), rel=1e-5)
    assert SignsHeader.of(asdict(coded.header), "x") == coded.header


def test_the_code_is_near_what_information_allows() -> None:
    """Within 5 % of the entropy of where the values stand, a bit a sign beside it."""
    rng = np.random.default_rng(0)
    for density in (0.01, 0.05, 0.2, 0.5):
        values = rng.standard_normal(200_000).astype(np.float32)
        coded = encode(values, np.arange(values.size), (1000, 200), density)
        entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
        assert len(coded.data) * 8 < 1.05 * values.size * (entropy + density)


HEADER = {"rows": 4, "cols": 50, "count": 20, "rice": 2, "unary_bits": 50, "value": 0.5}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 0},
        {"rows": -4},
        {"rows": 2**62},
        {"cols": 1.5},
        {"count": 201},
        {"rice": 25},
        {"unary_bits": 19},
        {"unary_bits": 71},
        {"unary_bits": 2**50},
        {"value": float("nan")},
        {"value": -1.0},
        {"value": 1},
        {"more": 1},
        {"count": True},
    ],
)
def test_a_header_that_no_array_has(change: dict[str, Any]) -> None:
    SignsHeader.of(HEADER, "x")
    with pytest.raises(CorruptError, match="^x: "):
        SignsHeader.of(HEADER | change, "x")


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_bytes_decode_to_places_inside_or_are_refused(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    values = rng.standard_normal(400).astype(np.float32)
    coded = encode(values, np.arange(400), (8, 50), data.draw(st.floats(0.01, 1)))
    header, stream = coded.header, bytearray(coded.data)
    if data.draw(st.booleans()):
        numbers = asdict(header)
        name = data.draw(st.sampled_from(["rows", "cols", "count", "rice", "unary_bits"]))
        numbers[name] = data.draw(st.integers(0, 500))
        try:
            header = SignsHeader.of(numbers, "x")
        except CorruptError:
            return
        stream = bytearray(data.draw(st.binary(min_size=header.bytes, max_size=header.bytes)))
    for _ in range(data.draw(st.integers(0, 3))):
        if stream:
            stream[data.draw(st.integers(0, len(stream) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        stream = stream[: data.draw(st.integers(0, len(stream)))]
    try:
        places, signs = decode(header, bytes_of(bytes(stream)), "x")
    except CorruptError:
        return
    assert places.size == signs.size == header.count
    assert (np.diff(places) > 0).all()
    assert places.size == 0 or 0 <= places[0] <= places[-1] < header.rows * header.cols
    assert set(np.unique(signs)) <= {-1, 1}


def dense(part: Part, shape: tuple[int, int]) -> np.ndarray:
    out = np.zeros(shape)
    factors = part.factors()
    if factors is not None:
        out += factors[1].astype(np.float64) @ factors[0]
    if part.values is not None:
        out[part.rows, part.cols] += part.values
    return out


@pytest.mark.parametrize("kind", ["low rank", "sparse"])
def test_the_stated_error_is_that_of_the_file(tiny_bundle: Path, tmp_path: Path, kind: str) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    made = lora() if kind == "low rank" else shira()
    read = read_adapter(made.write(tmp_path / "peft"), tiny_bundle, manifest)
    name, parts = read.kind, read.parts
    small = compress(parts, 0.5, manifest)
    write_adapter(tmp_path / "small.adapter", name, small.parts, manifest, small.signs)
    write_adapter(tmp_path / "whole.adapter", name, parts, manifest)
    file = AdapterFile.open(tmp_path / "small.adapter", manifest)
    found = {part.target: part for part in file.read()}
    assert len(found) == len(parts)
    lost = whole = 0.0
    for part in parts:
        before = dense(part, Shapes(manifest).of(part.target))
        after = dense(found[part.target], before.shape)
        lost, whole = lost + np.sum((before - after) ** 2), whole + np.sum(before**2)
    assert small.error == pytest.approx(math.sqrt(lost / whole), rel=1e-4)
    assert 0.05 < small.error < 0.8
    assert file.bytes < sum(array.nbytes for part in parts for array in part.arrays()) / 8
    with api.load(tiny_bundle, memory="64MiB", threads=1) as model:
        for path in ("whole", "small"):
            model.load_adapter(tmp_path / f"{path}.adapter")
        logits = {n: model.logits(range(3, 20), adapter=n or []) for n in ("", "whole", "small")}
    moved = np.linalg.norm(logits["whole"] - logits[""])
    assert 0 < np.linalg.norm(logits["small"] - logits["whole"]) < moved


def test_where_no_value_is_left_there_is_still_an_adapter(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    one = Part("layers.0.attention.q", rows=np.array([1, 2], np.int32), cols=np.array([3, 4], np.int32))
    one.values = np.ones(2, np.float32)
    small = compress([one], 0.1, manifest)
    write_adapter(tmp_path / "none.adapter", "SHIRA", small.parts, manifest, small.signs)
    parts = read_adapter(tmp_path / "none.adapter", tiny_bundle, manifest).parts
    for found in (fuse([(parts, 1.0), (parts, 1.0)]), merge([(parts, 1.0), (parts, 1.0)], Thinning("ties"))):
        assert [part.values is not None and part.values.size for part in found] == [0]
        write_adapter(tmp_path / "merged.adapter", "SHIRA", found, manifest)
        with api.load(tiny_bundle, memory="64MiB", threads=1) as model:
            model.load_adapter(tmp_path / "merged.adapter", "a")
            plain = model.logits(range(3, 20))
            assert np.array_equal(model.logits(range(3, 20), adapter="a"), plain)


def test_compressing_is_a_choice_of_the_command(edgert: Shell, tiny_bundle: Path, tmp_path: Path) -> None:
    source = shira().write(tmp_path / "peft")
    base: tuple[object, ...] = ("--base", tiny_bundle)
    about = edgert.json("adapter", "convert", source, tmp_path / "a.adapter", "--compress", "1", *base)
    assert about["uncompressed_bytes"] == 12 * 13 * 90 and 0 < about["error"] < 0.7
    done = edgert("adapter", "convert", source, tmp_path / "a.adapter", "--compress", *base)
    assert "x smaller; what it adds differs by " in done.stdout
    assert_fails(
        edgert("adapter", "convert", source, tmp_path / "a.adapter", "--compress", "2", *base),
        "compress: found 2.0",
    )


def test_a_density_that_is_none(tiny_bundle: Path) -> None:
    for density in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(InvalidArgumentError, match="compress: found"):
            compress([], density, {})
