"""Fixtures that more than one file uses. Session fixtures are made once a worker."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, answer, convert, minimum_bytes, open_model
from checkpoints import tiny_checkpoint
from shell import Shell

from edgert.loading import load
from edgert.model import Model

# Small matrices: more threads than this only make the reference slower, and change its sums.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What the developer has configured for edgert is not what the tests are about.
for name in [name for name in os.environ if name.startswith(("EDGERT_", "XDG_"))]:
    if name not in ("EDGERT_REFERENCE_DIR", "EDGERT_LLAMA_PYTHON"):
        del os.environ[name]
os.environ["EDGERT_CONFIG"] = os.devnull
os.environ["EDGERT_HOME"] = os.devnull  # neither the developer's probe and bundles nor a place to leave some


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


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same sizes; read only."""
    directory = tmp_path_factory.mktemp("other")
    return convert(tiny_checkpoint(directory / "checkpoint", seed=9), directory / "other.edgert")


@pytest.fixture(scope="module")
def docs_moe() -> Iterator[Model]:
    """The package's own model."""
    with load("docs-moe", memory="64MiB", threads=1, context=512) as model:
        yield model


@pytest.fixture
def edgert(tmp_path: Path) -> Shell:
    """The command line, at home in an empty directory."""
    return Shell(tmp_path)


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle, to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy.edgert"))


@pytest.fixture(scope="module")
def bystander(tiny_bundle: Path) -> tuple[Any, np.ndarray]:
    """A paged model that is loaded all along, and what it answers."""
    model = open_model(tiny_bundle, memory=minimum_bytes(tiny_bundle) + 20_000)
    return model, answer(model)


@pytest.fixture(scope="session")
def tiny_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the shape "tiny": random weights, no tokenizer; read only."""
    from edgert.shapes import shape_bundle

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGERT_HOME", str(tmp_path_factory.mktemp("shapes")))
        return shape_bundle("tiny")
