"""The weight formats of the second reader (oracle.py): packed tiles to numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FLOATS = {"f32": (4, "<f4"), "f16": (2, "<f2"), "bf16": (2, "<u2")}


@dataclass(frozen=True)
class Integers:
    """A row of the table: bits of the planes, columns of a group and a block, types of scale and zero, codebook."""

    planes: tuple[int, ...]
    group: int
    scale: str = "f16"
    zero: str = "none"
    codebook: tuple[int, ...] = ()
    block: int = 0

    def parts(self) -> dict[str, tuple[str, int]]:
        """The parts after the codes in their order: type, and columns that share an element."""
        block = self.block or self.group
        parts = {"scales": ("u1" if self.scale == "e8m0" else "<f2", block)}
        if self.block:
            shared = 2 * self.group if self.scale == "u4x2" else self.group
            parts["group_scales"] = ("i1" if self.scale == "i8" else "u1", shared)
        if self.zero != "none":
            parts["zeros"] = ("u1" if self.zero == "u8" else "<f2", block)
        if self.zero == "min_u8":
            parts["group_minima"] = ("u1", self.group)
        return parts

    def padded(self, cols: int) -> int:
        return round_up(cols, self.block or self.group)


IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
NL2 = (-10, -3, 3, 10)
NL3 = (-18, -11, -6, -2, 2, 6, 11, 18)
NL4 = (-64, -48, -38, -29, -22, -15, -9, -3, 3, 9, 15, 22, 29, 38, 48, 64)
INTEGERS = {
    "int8": Integers((8,), 32),
    "int4": Integers((4,), 64, zero="u8"),
    "int3": Integers((2, 1), 64, zero="u8"),
    "int2": Integers((2,), 32, zero="u8"),
    "int4_32": Integers((4,), 32, zero="u8"),
    "q4_0": Integers((4,), 32),
    "q4_1": Integers((4,), 32, zero="min_f16"),
    "q5_0": Integers((4, 1), 32),
    "q5_1": Integers((4, 1), 32, zero="min_f16"),
    "q2_k": Integers((2,), 16, "u4", "min_u4", block=256),
    "q3_k": Integers((2, 1), 16, "i8", block=256),
    "q4_k": Integers((4,), 32, "i8", "min_u8", block=256),
    "q5_k": Integers((4, 1), 32, "i8", "min_u8", block=256),
    "q6_k": Integers((4, 2), 16, "i8", block=256),
    "iq4_nl": Integers((4,), 32, codebook=IQ4_NL),
    "iq4_xs": Integers((4,), 32, "i8", codebook=IQ4_NL, block=256),
    "mxfp4": Integers((4,), 32, "e8m0", codebook=E2M1),
    "affine2": Integers((2,), 64, zero="min_f16"),
    "affine3": Integers((2, 1), 64, zero="min_f16"),
    "affine4": Integers((4,), 64, zero="min_f16"),
    "affine5": Integers((4, 1), 64, zero="min_f16"),
    "affine6": Integers((4, 2), 64, zero="min_f16"),
    "affine8": Integers((8,), 64, zero="min_f16"),
    "affine2_32": Integers((2,), 32, zero="min_f16"),
    "affine3_32": Integers((2, 1), 32, zero="min_f16"),
    "affine6_32": Integers((4, 2), 32, zero="min_f16"),
    "affine8_32": Integers((8,), 32, zero="min_f16"),
    "nl2": Integers((2,), 256, codebook=NL2),
    "nl2_16": Integers((2,), 16, "u4x2", codebook=NL2, block=256),
    "nl3": Integers((2, 1), 128, codebook=NL3),
    "nl3_16": Integers((2, 1), 16, "u4x2", codebook=NL3, block=256),
    "nl4": Integers((4,), 128, codebook=NL4),
    "nl4_16": Integers((4,), 16, "u4x2", codebook=NL4, block=256),
}
TILE_ROWS = 16


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def tile_bytes(format: str, cols: int) -> int:
    if format in FLOATS:
        return round_up(TILE_ROWS * cols * FLOATS[format][0], 64)
    row = INTEGERS[format]
    padded = row.padded(cols)
    parts = sum(padded // shared * np.dtype(dtype).itemsize for dtype, shared in row.parts().values())
    return round_up(TILE_ROWS * (padded * sum(row.planes) // 8 + parts), 64)


def packed_bytes(format: str, rows: int, cols: int) -> int:
    return round_up(rows, TILE_ROWS) // TILE_ROWS * tile_bytes(format, cols)


def plane(data: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of one plane of a tile -> codes [16, columns]."""
    vectors = data.reshape(-1, TILE_ROWS, 4)  # [vector, row, j]
    parts = [(vectors >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)]
    return np.stack(parts, axis=2).transpose(1, 0, 2, 3).reshape(TILE_ROWS, -1)  # [row, (vector, i, j)]


def unpack_tile(format: str, data: np.ndarray, cols: int) -> np.ndarray:
    if format in FLOATS:
        size, dtype = FLOATS[format]
        elements = data[: TILE_ROWS * cols * size].view(dtype)
        if format == "bf16":
            elements = (elements.astype("<u4") << 16).view("<f4")
        return elements.reshape(cols, TILE_ROWS).T.astype(np.float64)
    row = INTEGERS[format]
    padded = row.padded(cols)
    codes, at, shift = np.zeros((TILE_ROWS, padded), np.int64), 0, 0
    for bits in row.planes:
        length = TILE_ROWS * padded * bits // 8
        codes += plane(data[at : at + length], bits).astype(np.int64) << shift
        at, shift = at + length, shift + bits
    parts: dict[str, np.ndarray] = {}  # [16, padded]
    for name, (dtype, shared) in row.parts().items():
        length = TILE_ROWS * (padded // shared) * np.dtype(dtype).itemsize
        parts[name] = data[at : at + length].view(dtype).reshape(-1, TILE_ROWS).T.repeat(shared, axis=1)
        at += length
    scales = parts["scales"].astype(np.float64)
    if row.scale == "e8m0":
        scales = 2.0 ** (scales - 128)
    elif row.scale == "u4x2":
        nibbles = np.arange(padded) // row.group % 2 * 4
        scales = scales * ((parts["group_scales"] >> nibbles) & 15)
    elif row.scale == "u4":
        scales = scales * (parts["group_scales"] & 15)
    elif row.scale == "i8":
        scales = scales * parts["group_scales"]
    if row.zero.startswith("min"):
        minima = parts["zeros"].astype(np.float64)
        if row.zero == "min_u4":
            minima = minima * (parts["group_scales"] >> 4)
        elif row.zero == "min_u8":
            minima = minima * parts["group_minima"]
        # Each product and the difference are rounded to f32, as the weight is.
        weights = (scales * codes).astype(np.float32) - minima.astype(np.float32)
        return np.asarray(weights.astype(np.float64))[:, :cols]
    values = np.array(row.codebook)[codes] if row.codebook else codes - (1 << (sum(row.planes) - 1))
    if row.zero == "u8":
        values = codes - parts["zeros"]
    return np.asarray(scales * values)[:, :cols]


def unpack(format: str, data: np.ndarray, rows: int, cols: int) -> np.ndarray:
    tiles = data.reshape(-1, tile_bytes(format, cols))
    return np.concatenate([unpack_tile(format, tile, cols) for tile in tiles])[:rows]
