"""Codes and scales out of the bytes of a checkpoint, by whole arrays."""

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]

# The least number of bytes that holds a whole number of codes: 1, 2, 4 or 8 of them.
_UNIT_BYTES = {2: 1, 3: 3, 4: 1, 5: 5, 6: 3, 8: 1}
_LANES: dict[int, Any] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def unpack_bits(packed: Bytes, bits: int, count: int) -> Bytes:
    """The first `count` codes of every row: `packed` [rows, bytes] is a stream of `bits` a code, lowest bits first."""
    if bits == 8:
        return packed[:, :count]
    unit = _UNIT_BYTES[bits]
    codes = 8 * unit // bits
    lane = _LANES[codes]
    packed = packed[:, : -(-count // codes) * unit]
    value = packed[:, ::unit].astype(lane)
    for byte in range(1, unit):
        value |= packed[:, byte::unit].astype(lane) << lane(8 * byte)
    # Code i of a unit, at bit bits * i, goes to byte i.
    spread = value & lane((1 << bits) - 1)
    for code in range(1, codes):
        moved = value << lane((8 - bits) * code)
        moved &= lane(((1 << bits) - 1) << (8 * code))
        spread |= moved
    unpacked: Bytes = spread.view(np.uint8)
    return unpacked[:, :count]


def floats_of(raw: Bytes, dtype: str) -> Floats:
    """F32, F16, BF16 or F8_E8M0 elements as f32: each holds them exactly."""
    if dtype == "F32":
        return raw.view("<f4")
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return powers_of_two(raw)


def powers_of_two(exponents: Bytes) -> Floats:
    """E8M0: 2^(e - 127); 255 is NaN."""
    return _E8M0[exponents]


def floats_of_e4m3(raw: Bytes) -> Floats:
    """F8_E4M3: sign, 4 bits of exponent, 3 of fraction; no infinities, NaN where the other 7 bits are ones."""
    return _E4M3[raw]


def _e8m0() -> Floats:
    return np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)


def _e4m3() -> Floats:
    codes = np.arange(128)
    exponent, fraction = codes >> 3, codes & 7
    magnitude = np.where(
        exponent == 0, np.ldexp(fraction / 8, -6), np.ldexp(1 + fraction / 8, exponent - 7)
    ).astype(np.float32)
    magnitude[127] = np.nan
    return np.concatenate([magnitude, -magnitude])


_E8M0 = _e8m0()
_E4M3 = _e4m3()
# E2M1, the elements of MXFP4.
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
