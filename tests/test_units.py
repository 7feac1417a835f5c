"""Sizes as people write them."""

import pytest

from edgert.errors import InvalidArgumentError
from edgert.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("10MiB", 10 << 20),
        ("10 mib", 10 << 20),
        ("2G", 2 << 30),
        ("2GB", 2 * 10**9),
        ("1.5GB", 1_500_000_000),
        ("0.1KB", 100),
        ("1b", 1),
        ("1TiB", 1 << 40),
    ],
)
def test_a_size_has_an_optional_decimal_or_binary_unit(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        2**63,
        True,
        1.5,
        None,
        "",
        "0",
        "-1",
        "1e30",
        "4GBx",
        "4 GB x",
        "GiB",
        "1.2.3MB",
        "0x10",
        "nan",
        "٣",
        "9" * 30,
        "1" * 10**6,
    ],
)
def test_anything_else_is_refused_by_name(value: object) -> None:
    with pytest.raises(
        InvalidArgumentError, match="memory: found .* allowed is a positive number of bytes"
    ) as refused:
        parse_bytes(value, "memory")  # type: ignore[arg-type]
    assert len(str(refused.value)) < 300


def test_sizes_are_shown_in_binary_units() -> None:
    assert [format_bytes(size) for size in (0, 1023, 1024, 10 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "10.0 MiB",
        "3.0 TiB",
    ]
