"""Sizes as people write them: "10MiB", "1.5GB", 4096."""

import re
from fractions import Fraction

from edgert.errors import InvalidArgumentError

# A bare letter is binary, as in ulimit and systemd.
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[_letter] = _UNITS[_letter + "ib"] = 1024**_power
    _UNITS[_letter + "b"] = 1000**_power
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,9})?)\s*([A-Za-z]{0,3})", re.ASCII)
_SHARE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(%?)", re.ASCII)
_MAX_BYTES = 2**62


def parse_bytes(value: int | str, name: str = "size") -> int:
    """Return a size in bytes, at least 1.

    `value` is an int or a decimal number with an optional unit: B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB,
    TiB or K, M, G, T (powers of 1024); case does not matter. Raises InvalidArgumentError, naming `name`.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InvalidArgumentError(_complaint(name, value))
    if isinstance(value, int):
        size = Fraction(value)
    else:
        match = _SIZE.fullmatch(value.strip())
        if match is None or match[2].lower() not in _UNITS:
            raise InvalidArgumentError(_complaint(name, value))
        size = Fraction(match[1]) * _UNITS[match[2].lower()]
    if not 1 <= size <= _MAX_BYTES:
        raise InvalidArgumentError(_complaint(name, value))
    return int(size)


def _complaint(name: str, value: object) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return (
        f"{name}: found {shown}, allowed is a positive number of bytes with an optional unit "
        "(KB, MB, GB, TB or KiB, MiB, GiB, TiB), for example 512MiB"
    )


def parse_share(value: str, name: str) -> float:
    """A share: "2%" and "0.02" are the same. Raises InvalidArgumentError, naming `name`."""
    match = _SHARE.fullmatch(value.strip())
    if match is None:
        raise InvalidArgumentError(f"{name}: found {value!r:.60}, allowed is a share such as 2% or 0.02")
    return float(match[1]) / (100 if match[2] else 1)


def format_bytes(size: float) -> str:
    """Return `size` bytes for people: "10.0 MiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
