"""The file of a calibration: what it says, what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrations import calibration, recipe_of

from edgert.calibration import Calibration
from edgert.calibration_file import triangle_size
from edgert.errors import (
    CorruptError,
    InvalidArgumentError,
    NotFoundError,
    StorageError,
    UnsupportedError,
)


def matrix(triangle: np.ndarray) -> np.ndarray:
    n = int((np.sqrt(8 * len(triangle) + 1) - 1) / 2)
    lower = np.zeros((n, n), np.float32)
    lower[np.tril_indices(n)] = triangle
    return lower + np.tril(lower, -1).T


@pytest.mark.parametrize("full", [True, False])
def test_what_was_saved_is_loaded(tmp_path: Path, full: bool) -> None:
    made = calibration(full=full)
    made.save(tmp_path / "a.calibration")
    read = Calibration.load(tmp_path / "a.calibration")
    assert (read.model, read.tokens, read.window) == (made.model, made.tokens, made.window)
    assert read.tensors.keys() == made.tensors.keys()
    for name, array in made.tensors.items():
        assert read.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(read.tensors[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["a.calibration"]


def test_other_tools_read_the_file(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    made = calibration()
    made.save(tmp_path / "a.calibration")
    tensors = load_file(tmp_path / "a.calibration")
    np.testing.assert_array_equal(tensors["layers.1.experts.tokens"], [100, 100, 0])


def test_routing_as_shares_and_means() -> None:
    made = calibration()
    np.testing.assert_array_equal(made.frequency[0], [1, 1, 0])
    np.testing.assert_array_equal(made.frequency[1], [1, 0.5, 0.3, 0.2])
    np.testing.assert_array_equal(made.gate_weight[0], [0.5, 0.5, 0])
    np.testing.assert_allclose(made.gate_weight_squared[0], [0.3, 0.3, 0])
    assert made.effective_experts[0] == pytest.approx(2)
    assert 3 < made.effective_experts[1] < 4
    assert made.co_activation[0] is None and made.co_activation_2[1] is None
    assert made.co_activation[1].shape == (3, 4)
    assert [counts.shape for counts in made.previous_token] == [(3, 3), (4, 4)]
    assert [{d: cross.shape for d, cross in row.items()} for row in made.router_cross] == [{1: (8, 4)}, {}]


def test_an_expert_leans_on_the_layer_as_far_as_it_lacks_tokens() -> None:
    made = calibration()
    layer = matrix(made.tensors["layers.1.ffn.input.triangle"])
    own = matrix(made.tensors["layers.1.experts.input.triangle"][0])
    share = 100 / (100 + 2 * 8)
    np.testing.assert_allclose(made.input_moments(0, 0), share * own + (1 - share) * layer, rtol=1e-5)
    np.testing.assert_array_equal(made.input_moments(0, 2), layer)


def test_channels_of_an_expert_without_tokens_are_alike() -> None:
    made = calibration()
    used = [matrix(made.tensors["layers.1.experts.inner.triangle"][e]) for e in (0, 1)]
    power = np.mean([np.diagonal(m) for m in used])
    np.testing.assert_allclose(made.inner_moments(0, 2), power * np.eye(6), rtol=1e-5)
    share = 100 / (100 + 32)
    diagonal = share * np.diagonal(used[0]) + (1 - share) * power
    share = 100 / (100 + 2 * 6)
    expected = share * used[0] + (1 - share) * np.diag(diagonal)
    np.testing.assert_allclose(made.inner_moments(0, 0), expected, rtol=1e-5)


def test_diagonals_lean_likewise() -> None:
    made = calibration(full=False)
    layer = made.tensors["layers.1.ffn.input.diagonal"]
    own = made.tensors["layers.1.experts.input.diagonal"][1]
    share = 100 / (100 + 32)
    np.testing.assert_allclose(made.input_moments(0, 1), share * own + (1 - share) * layer, rtol=1e-5)
    np.testing.assert_array_equal(made.input_moments(0, 2), layer)
    assert made.inner_moments(1, 3).shape == (6,)
    assert made.router_moments[0].shape == (8,)


def test_a_matrix_of_the_layer_stands_for_diagonals_of_experts() -> None:
    made = calibration(full=False)
    whole = calibration().tensors["layers.1.ffn.input.triangle"]
    tensors = dict(made.tensors)
    del tensors["layers.1.ffn.input.diagonal"]
    tensors["layers.1.ffn.input.triangle"] = whole
    mixed = dataclasses.replace(made, tensors=tensors)
    np.testing.assert_array_equal(mixed.input_moments(0, 0), matrix(whole))


def test_matrices_that_read_the_same_rows_share_their_moments() -> None:
    made = calibration()
    q = made.dense_moments("layers.0.attention.q")
    assert q is not None and q.shape == (8, 8)
    for name in ("attention.k", "attention.v", "attention.gate", "attention.kv_a", "delta.z", "conv.in"):
        np.testing.assert_array_equal(made.dense_moments(f"layers.0.{name}"), q)
    np.testing.assert_array_equal(made.dense_moments("layers.1.shared.up"), made.router_moments[0])
    assert made.dense_moments("layers.2.attention.o").shape == (10, 10)
    assert made.dense_moments("output").shape == (8,)
    for name in ("layers.0.ffn.down", "layers.9.attention.q", "embedding", "layers.0.attention_norm"):
        assert made.dense_moments(name) is None


def test_check_knows_its_model() -> None:
    made = calibration()
    recipe = recipe_of(made.model)
    made.check(recipe)
    made.check(recipe, {"final_norm": "0123456789abcdef", "layers.0.attention.q": "0" * 16})
    with pytest.raises(InvalidArgumentError, match="final_norm has another checksum"):
        made.check(recipe, {"final_norm": "0" * 16})
    with pytest.raises(InvalidArgumentError, match="hidden_size is 8, this one has 16"):
        made.check(recipe | {"hidden_size": 16})
    with pytest.raises(InvalidArgumentError, match="num_layers is 3, this one has 2"):
        made.check(recipe | {"layers": [0, 1]})
    with pytest.raises(InvalidArgumentError, match="moe is 2 layers, this one has 1 layers"):
        made.check(recipe | {"layers": [0, 0, 1]})
    recipe["blocks"][2]["ffn"]["num_experts_per_tok"] = 1
    with pytest.raises(
        InvalidArgumentError, match="4 experts of width 6, 2 a token, in layer 2, this one has"
    ):
        made.check(recipe)


# --- files that are refused -----------------------------------------------------------------------------


def rewrite(path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change the header: its tensors, and the metadata's object."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["edgert.calibration"])
    edit(header, metadata)
    if "__metadata__" in header:
        header["__metadata__"] = {"edgert.calibration": json.dumps(metadata)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


HOSTILE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "no metadata": (lambda header, _: header.pop("__metadata__"), "not a calibration"),
    "no tokens": (lambda _, meta: meta.pop("tokens"), "tokens is missing"),
    "an unknown key": (lambda _, meta: meta.update(date=1), "date is unknown"),
    "tokens of text": (lambda _, meta: meta.update(tokens="9"), "tokens: found 9"),
    "no model": (lambda _, meta: meta.update(model=3), "model: found 3"),
    "no layer": (lambda _, meta: meta["model"].update(num_layers=0), "model.num_layers: found 0"),
    "layers past the end": (lambda _, meta: meta["model"].update(num_layers=2), "model.moe.1.layer: found 2"),
    "layers out of order": (
        lambda _, meta: meta["model"]["moe"][1].update(layer=1),
        "moe.1.layer: found 1, allowed is 2 to 2",
    ),
    "more a token than there are": (
        lambda _, meta: meta["model"]["moe"][0].update(num_experts_per_tok=4),
        "num_experts_per_tok: found 4",
    ),
    "other experts": (
        lambda _, meta: meta["model"]["moe"][0].update(num_experts=4),
        r"found (I64|F64|F32) \[3",
    ),
    "a huge size": (lambda _, meta: meta["model"].update(hidden_size=1 << 40), "hidden_size: found 1099511"),
    "a checksum that is none": (lambda _, meta: meta["model"].update(checksums={"a": 1}), "checksums: found"),
    "a tensor of another name": (
        lambda header, _: header.update(x=header.pop("layers.1.router.mean")),
        "tensor 'x' has no place",
    ),
    "a tensor of a layer too far": (
        lambda header, _: header.update(
            {"layers.7.mixer.input.triangle": header.pop("layers.0.mixer.input.triangle")}
        ),
        "'layers.7.mixer.input.triangle' has no place",
    ),
    "moments of no matrix": (
        lambda header, _: header.update(
            {"layers.1.mixer.input.triangle": header.pop("output.diagonal")}
            | {"output.diagonal": header.pop("layers.1.mixer.input.triangle")}
        ),
        r"'layers.1.mixer.input.triangle': F32 \[8\] are no moments",
    ),
    "another dtype": (
        lambda header, _: header["layers.1.experts.tokens"].update(dtype="F64"),
        r"found F64 \[3\], allowed is I64 \[3\]",
    ),
    "fewer tokens than were counted": (lambda _, meta: meta.update(tokens=99), "counts 200 uses of experts"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, case: str) -> None:
    edit, message = HOSTILE[case]
    path = tmp_path / "a.calibration"
    calibration().save(path)
    rewrite(path, edit)
    with pytest.raises(CorruptError, match=message) as error:
        Calibration.load(path)
    assert str(path) in str(error.value)


def test_a_newer_format_is_refused_by_version(tmp_path: Path) -> None:
    path = tmp_path / "a.calibration"
    calibration().save(path)
    rewrite(path, lambda _, meta: meta.update(version=2))
    with pytest.raises(UnsupportedError, match="format version 2, this edgert reads up to 1"):
        Calibration.load(path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    made = calibration()
    tensors = dict(made.tensors)
    del tensors["layers.2.router.logits"]
    dataclasses.replace(made, tensors=tensors).save(tmp_path / "a.calibration")
    with pytest.raises(CorruptError, match=r"'layers.2.router.logits' is missing"):
        Calibration.load(tmp_path / "a.calibration")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.calibration"
    calibration().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CorruptError, match=r"a\.calibration"):
        Calibration.load(path)


def test_foreign_files_are_refused(tmp_path: Path, tiny_source: Path) -> None:
    with pytest.raises(NotFoundError, match="absent"):
        Calibration.load(tmp_path / "absent")
    with pytest.raises(CorruptError, match="directory"):
        Calibration.load(tmp_path)
    with pytest.raises(CorruptError, match="not a calibration"):
        Calibration.load(tiny_source / "model.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_no_measurement_gives_are_refused(tmp_path: Path, value: float) -> None:
    made = calibration()
    made.tensors["layers.1.experts.weight_squared"][1] = value
    with pytest.raises(InvalidArgumentError, match=r"'layers.1.experts.weight_squared': holds"):
        made.save(tmp_path / "a.calibration")
    assert not list(tmp_path.iterdir())


def test_saving_replaces_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "a.calibration"
    path.write_text("old")
    (tmp_path / ".a.calibration.new").write_text("of a run that was killed")
    calibration().save(path)
    assert Calibration.load(path).tokens == 100
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.calibration"]
    with pytest.raises(StorageError, match="cannot be written"):
        calibration().save(tmp_path / "absent" / "a.calibration")


def test_triangles_have_the_size_of_half_a_matrix() -> None:
    assert [triangle_size(n) for n in (1, 2, 8)] == [1, 3, 36]
