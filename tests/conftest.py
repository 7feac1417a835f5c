"""Fixtures that more than one file uses. Session fixtures are made once a worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bundles import F32, convert
from checkpoints import tiny_checkpoint

# Small matrices: more threads than this only make the reference slower, and change its sums.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small qwen3_moe checkpoint."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_source: Path) -> Path:
    """It as a bundle in the default formats; read only, copy it to change it."""
    return convert(tiny_source, tiny_source.parent / "tiny.edgert")


@pytest.fixture(scope="session")
def tiny_f32_bundle(tiny_source: Path) -> Path:
    return convert(tiny_source, tiny_source.parent / "tiny-f32.edgert", **F32)
