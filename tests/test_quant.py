"""Weight formats: what pack() writes is what docs/bundle-format.md says, and as near to the weights as can be."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert import _native
from edgert.errors import InvalidArgumentError, UnsupportedError

Floats = npt.NDArray[np.float32]

TABLE = {row["name"]: row for row in _native.formats()}
FORMATS = [name for name, row in TABLE.items() if row["packs_floats"]]
# Those with a codebook are read back in test_bundle_format.py, and lack the value 0 and steps of one size.
PLAIN = [name for name in FORMATS if TABLE[name]["codebook"] == "none"]
INTEGERS = [name for name in PLAIN if TABLE[name]["scale"] != "none"]
SHAPES = [(1, 1), (15, 31), (16, 32), (17, 33), (5, 1408), (3, 2880)]
BITS = {name: int(row["bits"]) for name, row in TABLE.items()}
GROUP = {name: int(row["group"]) for name, row in TABLE.items()}
PLANES = {8: [8], 6: [4, 2], 5: [4, 1], 4: [4], 3: [2, 1], 2: [2]}


def weights_like_a_layer(rows: int, cols: int, seed: int = 0) -> Floats:
    """Gaussian weights, a tenth of the rows with heavy tails, as trained layers have them."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, cols))
    weights[::10] = rng.standard_t(3, (len(weights[::10]), cols))
    return (0.02 * weights).astype(np.float32)


def to_bf16(weights: Floats) -> npt.NDArray[np.uint16]:
    """The nearest bf16, ties to even, as raw bits."""
    bits = weights.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def stored(values: Floats, dtype: str) -> npt.NDArray[Any]:
    """The values as a checkpoint of this type holds them."""
    if dtype == "bf16":
        return to_bf16(values)
    return values.astype(np.float16 if dtype == "f16" else np.float32)


def pack(
    name: str, weights: Floats, *, threads: int = 1, remainder: bytearray | None = None
) -> tuple[bytes, tuple[float, ...]]:
    rows, cols = weights.shape
    packed = bytearray(_native.packed_bytes(name, rows, cols))
    report = _native.pack(
        name, weights.data, "f32", rows, cols, destination=packed, remainder=remainder, threads=threads
    )
    return bytes(packed), report


def unpack(name: str, packed: bytes, rows: int, cols: int) -> Floats:
    return np.frombuffer(_native.unpack(name, packed, rows, cols), np.float32).reshape(rows, cols)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def decode_plane(plane: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int64]:
    """[16, columns] of a plane: byte 4r + j of a 64-byte vector holds row r, column first + 4i + j in its i-th bits."""
    vectors = plane.reshape(-1, 16, 4)
    codes = np.stack([(vectors >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)], axis=1)
    return codes.transpose(2, 0, 1, 3).reshape(16, -1).astype(np.int64)  # [row, vector, i, j]


def decode(name: str, packed: bytes, rows: int, cols: int) -> tuple[Floats, Floats]:
    """The weights and their scales, with the padding, by the words of docs/bundle-format.md alone."""
    tiles = round_up(rows, 16) // 16
    raw = np.frombuffer(packed, np.uint8).reshape(tiles, -1)
    if name not in INTEGERS:
        width = BITS[name] // 8
        elements = np.ascontiguousarray(raw[:, : cols * 16 * width].reshape(tiles, cols, 16, width))
        if name == "bf16":
            values = from_bf16(elements.view(np.uint16))
        else:
            values = elements.view(np.float32 if name == "f32" else np.float16).astype(np.float32)
        return values[..., 0].transpose(0, 2, 1).reshape(tiles * 16, cols), np.ones(
            (tiles * 16, cols), np.float32
        )

    group = GROUP[name]
    padded = round_up(cols, group)
    groups = padded // group
    decoded, all_scales = [], []
    for tile in raw:
        codes = np.zeros((16, padded), np.int64)
        at = shift = 0
        for bits in PLANES[BITS[name]]:
            count = padded * 16 * bits // 8
            codes |= decode_plane(tile[at : at + count], bits) << shift
            at += count
            shift += bits
        scales = tile[at : at + groups * 32].view(np.float16).reshape(groups, 16).T.astype(np.float32)
        at += groups * 32
        zeros = np.full((16, groups), 1 << (BITS[name] - 1))
        if TABLE[name]["zero"] == "u8":
            zeros = tile[at : at + groups * 16].reshape(groups, 16).T.astype(np.int64)
            at += groups * 16
        assert len(tile) == round_up(at, 64)
        assert not tile[at:].any()
        scale = scales.repeat(group, axis=1)
        decoded.append(scale * (codes - zeros.repeat(group, axis=1)).astype(np.float32))
        all_scales.append(scale)
    return np.concatenate(decoded), np.concatenate(all_scales)


def absmax_error(name: str, weights: Floats) -> float:
    """Squared error of the textbook quantiser: the scale covers the group's range, the zero is rounded."""
    rows, cols = weights.shape
    group, levels = GROUP[name], 2 ** BITS[name] - 1
    padded = np.zeros((rows, round_up(cols, group)))
    padded[:, :cols] = weights
    groups = padded.reshape(rows, -1, group)
    if TABLE[name]["zero"] == "none":
        most = levels // 2
        scale = np.abs(groups).max(-1, keepdims=True) / most
        zero, low, high = np.zeros_like(scale), -most, most
    else:
        bottom = np.minimum(groups.min(-1, keepdims=True), 0)
        scale = (np.maximum(groups.max(-1, keepdims=True), 0) - bottom) / levels
        zero, low, high = np.rint(-bottom / np.where(scale > 0, scale, 1)), 0, levels
    scale = scale.astype(np.float16).astype(np.float64)
    codes = np.clip(np.rint(groups / np.where(scale > 0, scale, 1)) + zero, low, high)
    return float(np.square(scale * (codes - zero) - groups).sum())


def test_the_table_lists_every_format() -> None:
    assert list(TABLE) == [
        "f32", "f16", "bf16", "int8", "int4", "int3", "int2", "int4_32", "q4_0", "q4_1", "q5_0", "q5_1",
        "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4",
        "affine2", "affine3", "affine4", "affine5", "affine6", "affine8", "affine2_32", "affine3_32", "affine6_32",
        "affine8_32", "nl2", "nl2_16", "nl3", "nl3_16", "nl4", "nl4_16",
    ]  # fmt: skip
    assert TABLE["int4"] == {
        "name": "int4", "bits": 4, "group": 64, "block": 64, "scale": "f16", "zero": "u8", "codebook": "none",
        "packs_floats": True, "bits_per_weight": 4.375,
    }  # fmt: skip
    assert TABLE["q4_k"] == {
        "name": "q4_k", "bits": 4, "group": 32, "block": 256, "scale": "i8", "zero": "min_u8", "codebook": "none",
        "packs_floats": False, "bits_per_weight": 4.625,
    }  # fmt: skip
    assert TABLE["bf16"]["scale"] == TABLE["bf16"]["zero"] == "none"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PLAIN)
def test_packed_bytes_are_the_documented_layout(name: str, shape: tuple[int, int]) -> None:
    rows, cols = shape
    weights = weights_like_a_layer(rows, cols)
    packed, report = pack(name, weights)
    decoded, _ = decode(name, packed, rows, cols)
    np.testing.assert_array_equal(unpack(name, packed, rows, cols), decoded[:rows, :cols])
    assert not decoded[rows:].any()
    assert not decoded[:, cols:].any()

    error = decoded[:rows, :cols].astype(np.float64) - weights
    assert report[0] == pytest.approx(np.square(error).sum(), rel=1e-4)
    assert report[1] == pytest.approx(np.square(weights.astype(np.float64)).sum(), rel=1e-4)
    assert report[2] == pytest.approx(np.abs(error).max(), rel=1e-4)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_float_formats_round_to_nearest_even(name: str) -> None:
    weights = weights_like_a_layer(40, 100)
    expected = {
        "f32": weights,
        "f16": weights.astype(np.float16).astype(np.float32),
        "bf16": from_bf16(to_bf16(weights)),
    }[name]
    np.testing.assert_array_equal(unpack(name, pack(name, weights)[0], 40, 100), expected)


@pytest.mark.parametrize(("name", "most"), [("int8", 0.01), ("int4", 0.115), ("int3", 0.225), ("int2", 0.39)])
def test_quantisation_is_near(name: str, most: float) -> None:
    weights = weights_like_a_layer(64, 512)
    _, (squared_error, squared_weight, _) = pack(name, weights)
    assert (squared_error / squared_weight) ** 0.5 < most


@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (64, 512)])
@pytest.mark.parametrize("name", INTEGERS)
def test_search_is_no_worse_than_the_plain_range(name: str, shape: tuple[int, int]) -> None:
    weights = weights_like_a_layer(*shape)
    _, (squared_error, _, _) = pack(name, weights)
    # The sums are of f32 terms; and a tie between two codes may fall either way.
    assert squared_error <= absmax_error(name, weights) * 1.0001 + 1e-12


@pytest.mark.parametrize("name", ["int4", "int3", "int2"])
def test_low_bit_weights_are_carried_over_exactly(name: str) -> None:
    """A checkpoint that was trained on a grid within the format's loses nothing."""
    rng = np.random.default_rng(3)
    most = 2 ** (BITS[name] - 1) - 1
    codes = rng.integers(-most, most + 1, (32, 2 * GROUP[name]))
    codes[:, :: GROUP[name]] = most
    codes[:, 1 :: GROUP[name]] = -most
    weights = (codes * 0.0078125).astype(np.float32)
    np.testing.assert_array_equal(unpack(name, pack(name, weights)[0], *weights.shape), weights)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", FORMATS)
def test_source_types_agree(name: str, dtype: str) -> None:
    """The same values give the same bytes, whatever they are stored in."""
    rows, cols = 33, 96
    values = from_bf16(to_bf16(weights_like_a_layer(rows, cols)))
    values = np.where(np.abs(values) < 2.0**-14, 0, values).astype(np.float32)  # exact in all three
    source = stored(values, dtype)
    packed = bytearray(_native.packed_bytes(name, rows, cols))
    _native.pack(name, source.data, dtype, rows, cols, destination=packed)
    assert packed == pack(name, values)[0]


@pytest.mark.parametrize("name", FORMATS)
def test_slabs_and_threads_do_not_show(name: str) -> None:
    rows, cols = 100, 130
    weights = weights_like_a_layer(rows, cols)
    whole, report = pack(name, weights)
    for threads in (0, 2, 7):
        assert pack(name, weights, threads=threads) == (whole, report)
    for slab in (16, 48):
        assert b"".join(pack(name, weights[at : at + slab])[0] for at in range(0, rows, slab)) == whole


@pytest.mark.parametrize("name", INTEGERS)
def test_remainder_reconstructs_the_weights(name: str) -> None:
    rows, cols = 33, 100
    weights = weights_like_a_layer(rows, cols)
    remainder = bytearray(rows * cols)
    packed, _ = pack(name, weights, remainder=remainder)
    assert packed == pack(name, weights)[0]
    decoded, scales = (part[:rows, :cols] for part in decode(name, packed, rows, cols))
    steps = np.frombuffer(remainder, np.int8).reshape(rows, cols)
    restored = decoded + steps * scales / 200
    fits = np.abs(weights - decoded) <= 127 / 200 * scales  # a clipped weight may lie further away
    assert fits.mean() > 0.95
    assert np.all(np.abs(restored - weights)[fits] <= 0.5001 / 200 * scales[fits] + 1e-9)
    assert np.all(np.abs(steps[~fits]) == 127)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(INTEGERS),
    exponent=st.integers(-30, 12),
    shift=st.floats(-2, 2),
    rows=st.integers(1, 20),
    cols=st.integers(1, 140),
    seed=st.integers(0, 1000),
)
def test_any_scale_and_offset(
    name: str, exponent: int, shift: float, rows: int, cols: int, seed: int
) -> None:
    weights = ((np.random.default_rng(seed).standard_normal((rows, cols)) + shift) * 2.0**exponent).astype(
        np.float32
    )
    packed, (squared_error, squared_weight, _) = pack(name, weights)
    decoded, _ = decode(name, packed, rows, cols)
    np.testing.assert_array_equal(unpack(name, packed, rows, cols), decoded[:rows, :cols])
    assert np.isfinite(decoded).all()
    assert not decoded[:, cols:].any()
    assert squared_error <= squared_weight  # never worse than nothing at all


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_that_are_no_numbers_are_refused(name: str, dtype: str, value: float) -> None:
    weights = weights_like_a_layer(40, 70)
    weights[37, 65] = value
    source = stored(weights, dtype)
    packed = bytearray(_native.packed_bytes(name, 40, 70))
    with pytest.raises(InvalidArgumentError, match=r"row 37, column 65 is -?(nan|inf)"):
        _native.pack(name, source.data, dtype, 40, 70, destination=packed, threads=2)


@pytest.mark.parametrize(
    ("name", "fits", "too_large"),
    [
        ("f16", 65519, 65520),
        ("bf16", 3.389e38, 3.4e38),
        ("int8", 8.31e6, 8.33e6),
        ("int4", 4.58e5, 4.6e5),
        ("int3", 1.96e5, 1.97e5),
        ("int2", 65504, 65505),
    ],
)
def test_weights_past_the_range_are_refused(name: str, fits: float, too_large: float) -> None:
    weights = weights_like_a_layer(3, 70)
    weights[1, 69] = -fits
    assert np.isfinite(unpack(name, pack(name, weights)[0], 3, 70)).all()
    weights[1, 69] = too_large
    with pytest.raises(InvalidArgumentError, match=r"row 1, column 69 is .*; pack this tensor as f32"):
        pack(name, weights)


def test_arguments_are_checked() -> None:
    weights = weights_like_a_layer(16, 32)
    packed = bytearray(_native.packed_bytes("int8", 16, 32))
    with pytest.raises(UnsupportedError, match="'int5' is unknown; known are f32, f16"):
        _native.packed_bytes("int5", 1, 1)
    with pytest.raises(UnsupportedError, match="'f64' cannot be packed"):
        _native.pack("int8", weights.data, "f64", 16, 32, destination=packed)
    with pytest.raises(InvalidArgumentError, match="0 rows"):
        _native.packed_bytes("int8", 0, 1)
    with pytest.raises(InvalidArgumentError, match="source has 2048 bytes; needed are 2112"):
        _native.pack("int8", weights.data, "f32", 16, 33, destination=packed)
    with pytest.raises(InvalidArgumentError, match="destination has 576 bytes; needed are 192"):
        _native.pack("int2", weights.data, "f32", 16, 32, destination=packed)
    with pytest.raises(InvalidArgumentError, match="remainder has 3 bytes"):
        _native.pack("int8", weights.data, "f32", 16, 32, destination=packed, remainder=bytearray(3))
    with pytest.raises(InvalidArgumentError, match="f32 has no remainder"):
        pack("f32", weights, remainder=bytearray(16 * 32))
    with pytest.raises(
        InvalidArgumentError, match="destination: needed is a contiguous writable buffer, found bytes"
    ):
        _native.pack("int8", weights.data, "f32", 16, 32, destination=bytes(packed))
    with pytest.raises(InvalidArgumentError, match="source: needed is a contiguous buffer, found memoryview"):
        _native.pack("int8", weights.T[::2].data, "f32", 16, 16, destination=packed)
    with pytest.raises(InvalidArgumentError, match="threads"):
        _native.pack("int8", weights.data, "f32", 16, 32, destination=packed, threads=-1)
    with pytest.raises(InvalidArgumentError, match="packed has 576 bytes"):
        _native.unpack("int8", packed, 17, 32)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 7, 8, 31, 32, 33, 63, 64, 65, 1000])
def test_xxh64_is_xxhash(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    expected = xxhash.xxh64(data).hexdigest()
    assert _native.xxh64(data) == expected
    for piece in (1, 5, 32, 50):
        stream = _native.Xxh64()
        for at in range(0, size, piece):
            stream.update(memoryview(data)[at : at + piece])
        assert stream.hexdigest() == expected


def test_buffers_of_every_kind(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.float32)
    path = tmp_path / "values"
    path.write_bytes(values.tobytes())
    expected = xxhash.xxh64(values.tobytes()).hexdigest()
    assert _native.xxh64(values.data) == _native.xxh64(bytearray(values.tobytes())) == expected
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert _native.xxh64(mapped) == expected
    with pytest.raises(InvalidArgumentError, match="data: needed is a contiguous buffer, found str"):
        _native.xxh64("text")  # type: ignore[arg-type]
