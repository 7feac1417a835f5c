"""A rope with `long`: which frequencies count follows from the context that a model is loaded for, not from a prompt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, answer, convert, edit_manifest, open_model

BEYOND = 256


@pytest.fixture
def bundle(tiny_source: Path, tmp_path: Path) -> Path:
    return convert(tiny_source, tmp_path / "plain.edgert", **F32)


def with_rope(bundle: Path, name: str, change: Any) -> Path:
    """A copy whose ropes are changed."""

    def edit(manifest: dict[str, Any]) -> None:
        for block in manifest["recipe"]["blocks"]:
            change(block["mixer"]["rope"])

    copy = bundle.parent / f"{name}.edgert"
    shutil.copytree(bundle, copy)
    edit_manifest(copy, edit)
    return copy


def stretched(rope: dict[str, Any]) -> dict[str, Any]:
    return {"inv_freq": [f / 4 for f in rope["inv_freq"]], "attention_factor": 1.2}


def test_the_context_decides(bundle: Path) -> None:
    both = with_rope(bundle, "both", lambda rope: rope.update(long={"beyond": BEYOND, **stretched(rope)}))
    longer = with_rope(bundle, "longer", lambda rope: rope.update(stretched(rope)))
    assert np.array_equal(answer(open_model(both, context=BEYOND)), answer(open_model(bundle)))
    assert np.array_equal(answer(open_model(both, context=BEYOND + 1)), answer(open_model(longer)))
    assert not np.array_equal(answer(open_model(longer)), answer(open_model(bundle)))
