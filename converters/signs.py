"""Arrays as the signs of their largest values times one number (ComPEFT, arXiv 2311.13171), in few bits.

Where the kept values stand is coded by the gaps between them, in Golomb's code with parameter 2^rice: the quotients in unary,
then the remainders, `rice` bits each, then a bit a sign (1: negative). Each of the three begins with a byte of its own, its
bits from the lowest on.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgert.errors import CorruptError

from .merging import largest

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

_MAX_RICE = 24
_MAX_ELEMENTS = 1 << 40


@dataclass(frozen=True)
class SignsHeader:
    """`unary_bits`: of all quotients; `value`: what a sign stands for."""

    rows: int
    cols: int
    count: int
    rice: int
    unary_bits: int
    value: float

    @classmethod
    def of(cls, found: object, where: str) -> "SignsHeader":
        """As JSON has it. Raises CorruptError."""
        names = list(cls.__dataclass_fields__)
        if not isinstance(found, dict) or sorted(found) != sorted(names):
            raise CorruptError(f"{where}: an object of {', '.join(names)} is needed")
        numbers = [found[name] for name in names]
        header = cls(*numbers)
        whole = all(type(number) is int and 0 <= number <= _MAX_ELEMENTS for number in numbers[:-1])
        if not whole or not isinstance(header.value, float) or not 0 <= header.value < 3e38:
            raise CorruptError(f"{where}: found {found!r:.120}")
        elements = header.rows * header.cols
        # The unary code of `count` gaps in that many elements has no more bits than this.
        if not (
            0 < elements <= _MAX_ELEMENTS
            and header.count <= elements
            and header.rice <= _MAX_RICE
            and header.count <= header.unary_bits <= header.count + (elements >> header.rice)
        ):
            raise CorruptError(f"{where}: found {found!r:.120}, which no array has")
        return header

    @property
    def bytes(self) -> int:
        return sum(-(-bits // 8) for bits in (self.unary_bits, self.count * self.rice, self.count))


@dataclass(frozen=True)
class Coded:
    """An array as its signs."""

    header: SignsHeader
    data: bytes


def encode(
    values: "NDArray[Any]", places: "NDArray[numpy.int64]", shape: tuple[int, int], density: float
) -> Coded:
    """The share of `values` that is largest, at ascending flat `places` of a matrix; the number is their mean magnitude,
    which leaves the least squared error."""
    import numpy as np

    kept = largest(values, density) & (values != 0)
    values, places = values[kept], places[kept]
    count = int(values.size)
    gaps = np.diff(places, prepend=-1) - 1
    elements = shape[0] * shape[1]
    costs = [int((gaps >> rice).sum()) + count * (1 + rice) for rice in range(_MAX_RICE + 1)]
    rice = int(np.argmin(costs))
    ends = np.cumsum((gaps >> rice) + 1)
    unary = np.zeros(int(ends[-1]) if count else 0, np.uint8)
    unary[ends - 1] = 1
    low = ((gaps[:, np.newaxis] >> np.arange(rice)) & 1).astype(np.uint8).reshape(-1)
    value = float(np.float32(np.abs(values).mean())) if count else 0.0
    header = SignsHeader(*shape, count, rice, len(unary), value)
    assert elements >= count
    streams = (unary, low, (values < 0).astype(np.uint8))
    return Coded(header, b"".join(np.packbits(bits, bitorder="little").tobytes() for bits in streams))


def decode(
    header: SignsHeader, data: "NDArray[numpy.uint8]", where: str
) -> "tuple[NDArray[numpy.int64], NDArray[numpy.int8]]":
    """Ascending flat places and signs (1 or -1). Takes memory in proportion to the data alone. Raises CorruptError."""
    import numpy as np

    if data.size != header.bytes:
        raise CorruptError(f"{where}: {data.size} bytes, its header needs {header.bytes}")
    streams, begin = [], 0
    for bits in (header.unary_bits, header.count * header.rice, header.count):
        end = begin + -(-bits // 8)
        unpacked = np.unpackbits(data[begin:end], bitorder="little")
        if unpacked[bits:].any():
            raise CorruptError(f"{where}: byte {end - 1}: bits after the last one are not 0")
        streams.append(unpacked[:bits])
        begin = end
    unary, low, negative = streams
    ends = np.flatnonzero(unary)
    if ends.size != header.count or (unary.size and not unary[-1]):
        raise CorruptError(f"{where}: {ends.size} gaps, its header says {header.count}")
    quotients = np.diff(ends, prepend=-1) - 1
    weights = np.int64(1) << np.arange(header.rice, dtype=np.int64)
    remainders = low.reshape(header.count, header.rice).astype(np.int64) @ weights
    places = np.cumsum((quotients << header.rice) + remainders + 1) - 1
    if header.count and places[-1] >= header.rows * header.cols:
        raise CorruptError(
            f"{where}: value {header.count - 1} stands at {places[-1]} of {header.rows * header.cols} elements"
        )
    return places, (1 - 2 * negative.astype(np.int8)).astype(np.int8)
