"""A few thousand rounds of each fuzzer; fuzz_readers.py runs as many as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_readers import TARGETS, fuzz


@pytest.mark.parametrize("target", TARGETS)
def test_a_mutated_file_is_read_or_refused(target: str, tmp_path: Path) -> None:
    counts = fuzz(target, 3000, 1, tmp_path)
    assert counts["read"] > 100, (
        "nearly everything is refused: the checks behind the first ones are not reached"
    )
    assert counts["refused"] > 1000
    assert not list(tmp_path.iterdir())
