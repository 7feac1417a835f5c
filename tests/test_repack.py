"""Weights that are quantised already are carried over: every number is the file's own."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle_formats
import pytest

from edgert import _native
from edgert.errors import InvalidArgumentError, UnsupportedError

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Blocks of random bytes with scales of every size, and what gguf.quants.dequantize of gguf-py makes of them.
GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "ggml_blocks.npz"))
TYPES = {row["name"]: row for row in _native.block_types()}
FORMATS = {row["name"]: row for row in _native.formats()}
HALVES = {  # where in a block its f16 lie
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}  # fmt: skip


def random_blocks(name: str, rows: int, cols: int, seed: int = 0) -> Bytes:
    """[rows, bytes of a row], every byte as likely, but for scales that are finite."""
    rng = np.random.default_rng(seed)
    row = TYPES[name]
    blocks = rng.integers(0, 256, (rows, cols // row["elements"], row["bytes"]), np.uint8)
    for at in HALVES[name]:
        scales = rng.standard_normal(blocks.shape[:2]) * 10.0 ** rng.integers(-7, 4, blocks.shape[:2])
        blocks[..., at : at + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = rng.integers(0, 255, blocks.shape[:2])
    return blocks.reshape(rows, -1)


def dequantize(name: str, blocks: Bytes, rows: int, cols: int) -> Floats:
    values = _native.dequantize(name, np.ascontiguousarray(blocks).data, rows, cols)
    return np.frombuffer(values, np.float32).reshape(rows, cols)


def carry_over(name: str, blocks: Bytes, rows: int, cols: int, threads: int = 1) -> bytes:
    packed = bytearray(_native.packed_bytes(TYPES[name]["format"], rows, cols))
    source = np.ascontiguousarray(blocks).data
    _native.repack(name, source, rows, cols, destination=packed, threads=threads)
    return bytes(packed)


def unpack(form: str, packed: bytes, rows: int, cols: int) -> Floats:
    return np.frombuffer(_native.unpack(form, packed, rows, cols), np.float32).reshape(rows, cols)


def assert_same_bits(found: Floats, expected: Floats) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_the_table_names_the_types_of_public_files() -> None:
    assert set(TYPES) == set(HALVES) == {name for name in GOLDEN if not name.endswith("_values")}
    assert TYPES["Q4_K"] == {"name": "Q4_K", "elements": 256, "bytes": 144, "format": "q4_k"}
    assert TYPES["Q8_0"]["format"] == "int8"


@pytest.mark.parametrize("name", TYPES)
def test_tiles_are_nearly_as_small_as_the_file(name: str) -> None:
    of_file = TYPES[name]["bytes"] * 8 / TYPES[name]["elements"]
    of_tiles = FORMATS[TYPES[name]["format"]]["bits_per_weight"]
    six_bit_scales = {"Q3_K": 0.125, "Q4_K": 0.125, "Q5_K": 0.125, "IQ4_XS": 0.0625}  # a byte each in a tile
    assert of_tiles == of_file + six_bit_scales.get(name, 0)


@pytest.mark.parametrize("name", TYPES)
def test_weights_are_those_of_the_golden_blocks(name: str) -> None:
    blocks, values = GOLDEN[name], GOLDEN[name + "_values"]
    assert_same_bits(dequantize(name, blocks, 1, len(values))[0], values)
    packed = carry_over(name, blocks, 1, len(values))
    form = TYPES[name]["format"]
    assert_same_bits(unpack(form, packed, 1, len(values))[0], values)
    documented = oracle_formats.unpack(form, np.frombuffer(packed, np.uint8), 1, len(values))[0]
    np.testing.assert_array_equal(documented.astype(np.float32), values)


@pytest.mark.parametrize("name", TYPES)
def test_weights_are_those_of_gguf_py(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    blocks = random_blocks(name, 40, 1024)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert_same_bits(dequantize(name, blocks, 40, 1024), values)


@pytest.mark.parametrize("shape", [(1, 1), (15, 2), (16, 3), (33, 5)])
@pytest.mark.parametrize("name", TYPES)
def test_carried_over_weights_unpack_to_the_same_bits(name: str, shape: tuple[int, int]) -> None:
    rows, cols = shape[0], shape[1] * TYPES[name]["elements"]
    blocks = random_blocks(name, rows, cols, seed=rows)
    packed = carry_over(name, blocks, rows, cols)
    assert_same_bits(unpack(TYPES[name]["format"], packed, rows, cols), dequantize(name, blocks, rows, cols))


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "MXFP4"])
def test_rows_that_are_no_multiple_of_a_super_block(name: str) -> None:
    blocks = random_blocks(name, 17, 2880)
    packed = carry_over(name, blocks, 17, 2880)
    assert_same_bits(unpack(TYPES[name]["format"], packed, 17, 2880), dequantize(name, blocks, 17, 2880))


@pytest.mark.parametrize("name", TYPES)
def test_slabs_and_threads_do_not_show(name: str) -> None:
    rows, cols = 50, 512
    blocks = random_blocks(name, rows, cols)
    whole = carry_over(name, blocks, rows, cols)
    for threads in (0, 2, 5):
        assert carry_over(name, blocks, rows, cols, threads) == whole
    slabs = [blocks[at : at + 16] for at in range(0, rows, 16)]
    assert b"".join(carry_over(name, slab, len(slab), cols) for slab in slabs) == whole


@pytest.mark.parametrize("name", TYPES)
def test_scales_that_are_no_numbers_are_refused(name: str) -> None:
    elements = TYPES[name]["elements"]
    for at in HALVES[name] or [0]:
        for bad in ([0x00, 0x7C], [0x00, 0xFC], [0x01, 0x7E]) if HALVES[name] else ([0xFF],):
            blocks = random_blocks(name, 20, 3 * elements).reshape(20, 3, -1)
            blocks[18, 1, at : at + len(bad)] = bad
            with pytest.raises(InvalidArgumentError, match=rf"row 18, column {elements}: the scale of this"):
                carry_over(name, blocks.reshape(20, -1), 20, 3 * elements)


def coded(form: str, rows: int, cols: int, group: int, seed: int = 0) -> dict[str, Any]:
    """A random matrix as codes, scales and zeros, and its weights."""
    rng = np.random.default_rng(seed)
    row = FORMATS[form]
    groups = -(-cols // group)
    codes = rng.integers(0, 1 << row["bits"], (rows, cols), np.uint8)
    scales = (rng.standard_normal((rows, groups)) * 0.1).astype(np.float16).astype(np.float32)
    of_column = np.arange(cols) // group
    wide = codes.astype(np.float32)
    zeros: npt.NDArray[Any] | None = None
    if row["zero"] == "u8":
        zeros = rng.integers(0, 1 << row["bits"], (rows, groups), np.uint8)
        weights = scales[:, of_column] * (wide - zeros[:, of_column].astype(np.float32))
    elif row["zero"] == "min_f16":
        zeros = rng.standard_normal((rows, groups)).astype(np.float16).astype(np.float32)
        weights = scales[:, of_column] * wide - zeros[:, of_column]
    else:
        weights = scales[:, of_column] * (wide - np.float32(1 << (row["bits"] - 1)))
    return {"codes": codes, "scales": scales, "zeros": zeros, "weights": weights}


def pack_codes(form: str, source: dict[str, Any], rows: int, cols: int, threads: int = 1) -> bytes:
    packed = bytearray(_native.packed_bytes(form, rows, cols))
    zeros = source["zeros"]
    _native.pack_codes(
        form, source["codes"].data, source["scales"].data, None if zeros is None else zeros.data,
        rows, cols, destination=packed, threads=threads,
    )  # fmt: skip
    return bytes(packed)


CODED = [row["name"] for row in FORMATS.values() if row["scale"] == "f16" and row["codebook"] == "none"]


@pytest.mark.parametrize("shape", [(1, 32), (17, 100), (33, 192)])
@pytest.mark.parametrize("form", CODED)
def test_codes_and_scales_apart_are_carried_over(form: str, shape: tuple[int, int]) -> None:
    source = coded(form, *shape, FORMATS[form]["group"])
    packed = pack_codes(form, source, *shape)
    np.testing.assert_array_equal(unpack(form, packed, *shape), source["weights"])
    assert pack_codes(form, source, *shape, threads=2) == packed


def test_exponents_of_mxfp4_are_carried_over() -> None:
    rng = np.random.default_rng(1)
    codes, exponents = rng.integers(0, 16, (5, 64), np.uint8), rng.integers(0, 255, (5, 2), np.uint8)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float64)
    with np.errstate(over="ignore"):
        weights = (values[codes] * 2.0 ** (exponents.repeat(32, 1) - 127.0)).astype(np.float32)
    packed = pack_codes("mxfp4", {"codes": codes, "scales": exponents, "zeros": None}, 5, 64)
    np.testing.assert_array_equal(unpack("mxfp4", packed, 5, 64), weights)
    exponents[3, 1] = 255
    with pytest.raises(InvalidArgumentError, match="row 3, column 32: scale 255 of e8m0 is no number"):
        pack_codes("mxfp4", {"codes": codes, "scales": exponents, "zeros": None}, 5, 64)


def test_what_a_format_does_not_hold_exactly_is_refused() -> None:
    def refuses(change: str, value: float, match: str) -> None:
        source = coded("q4_1", 20, 64, 32)
        source[change][17, -1] = value
        with pytest.raises(InvalidArgumentError, match=match):
            pack_codes("q4_1", source, 20, 64)

    refuses("codes", 16, "row 17, column 63: code 16 has more than 4 bits")
    refuses("scales", 0.1, "row 17, column 32: scale 0.1 is no finite f16")
    refuses("scales", np.inf, "row 17, column 32: scale inf is no finite f16")
    refuses("zeros", 1e-9, "row 17, column 32: minimum 1e-09 is no finite f16")
    source = coded("int4", 16, 64, 64)
    with pytest.raises(UnsupportedError, match="codes and scales apart do not make q4_k"):
        pack_codes("q4_k", source, 16, 64)
    with pytest.raises(InvalidArgumentError, match="zeros has 0 bytes; needed are 16"):
        pack_codes("int4", source | {"zeros": None}, 16, 64)
    with pytest.raises(InvalidArgumentError, match="zeros has 16 bytes; needed are 0"):
        pack_codes("q4_0", coded("int4", 16, 32, 64), 16, 32)


def test_arguments_are_checked() -> None:
    blocks = random_blocks("Q4_K", 2, 256)
    with pytest.raises(UnsupportedError, match="block type 'IQ1_S' is unknown; known are Q4_0"):
        _native.dequantize("IQ1_S", blocks.data, 2, 256)
    with pytest.raises(InvalidArgumentError, match="128 columns of Q4_K: needed is a multiple of 256"):
        _native.dequantize("Q4_K", blocks.data, 2, 128)
    with pytest.raises(InvalidArgumentError, match="source has 288 bytes; needed are 432"):
        carry_over("Q4_K", blocks, 3, 256)
    with pytest.raises(InvalidArgumentError, match="destination has 8 bytes"):
        _native.repack("Q4_K", blocks.data, 2, 256, destination=bytearray(8))
    weights = np.zeros((16, 256), np.float32)
    with pytest.raises(
        UnsupportedError, match="q4_k holds weights that a file has in it; floats are packed as one of"
    ):
        _native.pack("q4_k", weights.data, "f32", 16, 256, destination=bytearray(9472))
