"""A model that reads images as well becomes the same bundle as its text half alone; what is left out is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import read_manifest
from checkpoints import write_safetensors
from variants import VARIANTS, Variant, by_name, make_checkpoint

from edgert.converters.convert import convert


def wrapped(source: Path, family: str, prefixes: dict[str, str], other: str) -> None:
    """Make the text model at `source` the half of one: names change by prefix, `other` is a tensor more."""
    from safetensors.numpy import load_file

    tensors = {}
    for name, array in load_file(source / "model.safetensors").items():
        old = next(prefix for prefix in prefixes if name.startswith(prefix))
        tensors[prefixes[old] + name.removeprefix(old)] = array
    write_safetensors(source / "model.safetensors", tensors | {other: np.ones((4, 4), np.float32)})
    text = json.loads((source / "config.json").read_text())
    config = {"model_type": family, "text_config": text, "vision_config": {"hidden_size": 4}}
    config["tie_word_embeddings"] = text["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("family", "variant", "prefixes", "other"),
    [
        ("llama4", "llama4_text", {"": "language_model."}, "vision_model.patch.weight"),
        ("gemma4", "gemma4_text", {"model.": "model.language_model."}, "model.vision_tower.patch.weight"),
        ("mistral3", "ministral3", {"": "language_model."}, "vision_tower.patch.weight"),
        ("mistral3", "mistral-window", {"": "language_model."}, "multi_modal_projector.patch.weight"),
    ],
)
def test_the_text_half(
    tmp_path: Path, family: str, variant: str, prefixes: dict[str, str], other: str
) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", by_name(VARIANTS, variant))
    convert(source, tmp_path / "text.edgert")
    model_type = json.loads((source / "config.json").read_text())["model_type"]
    wrapped(source, family, prefixes, other)
    report = convert(source, tmp_path / "half.edgert")
    assert any("1 tensors for other than text" in note for note in report.notes)

    def weights(name: str) -> Any:
        manifest = read_manifest(tmp_path / f"{name}.edgert")
        assert manifest["recipe"].pop("architecture") == {"half": family, "text": model_type}[name]
        checksums = [(row["name"], row["checksum"]) for row in manifest["tensors"]]
        return manifest["recipe"], checksums, manifest["experts"]

    assert weights("half") == weights("text")


@pytest.mark.parametrize("tied", [True, False])
def test_mistral3_embeddings_are_tied_where_the_head_is_left_out(tmp_path: Path, tied: bool) -> None:
    """transformers writes `tie_word_embeddings` true beside a text_config that says false."""
    source = make_checkpoint(
        tmp_path / "checkpoint",
        Variant("mistral", "mistral", {"intermediate_size": 100, "tie_word_embeddings": tied}),
    )
    wrapped(source, "mistral3", {"": "language_model."}, "vision_tower.patch.weight")
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = True, False
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "m.edgert")
    assert read_manifest(tmp_path / "m.edgert")["recipe"]["output"]["tied"] is tied
