"""Measuring a model: against torch, at every budget, chunk and number of threads, and what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from bundles import F32, answer, convert, edit_manifest, open_model, read_manifest
from calibration_oracle import Seen, statistics
from calibrations import calibration
from checkpoints import TINY_CONFIG, prompt_tokens, tiny_checkpoint
from reference import Reference
from shell import Shell, assert_fails
from variants import VARIANTS, by_name, make_checkpoint

import edgert as edgert_package
from edgert.bundle import Bundle
from edgert.calibration import Calibration
from edgert.errors import BudgetError, InvalidArgumentError

TOKENS = prompt_tokens(150, TINY_CONFIG["vocab_size"])
WINDOW = 64
# Of the root of the product of two diagonal elements: what f32 sums of other sizes leave, and two frameworks.
SAME, OTHER_FRAMEWORK = 3e-6, 2e-4


def calibrate(model: Path, text: Any = TOKENS, **options: Any) -> Calibration:
    return edgert_package.calibrate(
        model, text, **{"memory": "64MiB", "threads": 1, "context": WINDOW, **options}
    )


def matrices(triangles: np.ndarray) -> np.ndarray:
    """Of lower triangles in the last dimension."""
    n = int((np.sqrt(8 * triangles.shape[-1] + 1) - 1) / 2)
    out = np.zeros((*triangles.shape[:-1], n, n), np.float32)
    rows, columns = np.tril_indices(n)
    out[..., rows, columns] = out[..., columns, rows] = triangles
    return out


def assert_same_moments(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Every element against the root of the product of its two diagonal elements, which are near the mean at least:
    what hardly moves is the rounding of larger numbers."""
    assert found.shape == expected.shape
    diagonal = np.diagonal(expected, axis1=-2, axis2=-1)
    deviation = np.sqrt(diagonal + 0.1 * diagonal.mean(axis=-1, keepdims=True))
    scale = deviation[..., :, None] * deviation[..., None, :]
    assert (np.abs(found - expected) <= tolerance * scale + 1e-12).all()


# --- against torch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_moe",
        "qwen3_moe-tied-raw_gates-dense_layer-bias-bf16-shards",
        "olmoe-MHA",
        "qwen2_moe",  # a gated shared expert
        "deepseek_v3",  # latent attention, sigmoid scores with a bias and groups, a dense layer first, shared experts
    ],
)
def test_statistics_are_those_of_torch(name: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", by_name(VARIANTS, name))
    reference = Reference.load(source)
    seen = Seen(reference.model)
    tokens = prompt_tokens(150, reference.model.config.vocab_size)
    for begin in range(0, len(tokens), WINDOW):
        reference.forward(tokens[begin : begin + WINDOW])
    expected = statistics(seen)
    bundle = convert(source, tmp_path / "model.edgert", **F32)
    found = calibrate(bundle, tokens, moments="full")

    assert (found.tokens, found.window) == (150, WINDOW)
    for site, values in expected.items():
        if f"{site}.triangle" in found.tensors:
            assert_same_moments(matrices(found.tensors[f"{site}.triangle"]), values, OTHER_FRAMEWORK)
        elif site.endswith(".residual"):
            diagonal = np.diagonal(values)
            np.testing.assert_allclose(found.tensors[f"{site}.diagonal"], diagonal, OTHER_FRAMEWORK)
        elif values.dtype == np.int64:
            np.testing.assert_array_equal(found.tensors[site], values, err_msg=site)
        else:
            scale = OTHER_FRAMEWORK * np.abs(values).max()
            np.testing.assert_allclose(found.tensors[site], values, rtol=0, atol=scale, err_msg=site)
    measured = {key.removesuffix(".triangle").removesuffix(".diagonal") for key in found.tensors}
    absorbed = {key for key in measured if key.endswith(("attention.k_b", "attention.v_b"))}
    assert measured - absorbed == expected.keys()


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss",  # biased logits
        "gemma4_text",  # norms of its own for router and experts
        "llama4_text",  # weights on the input
        "qwen3_next",  # delta nets
        "lfm2_moe",  # short convolutions
        "llama-llama3_rope-tied",  # no experts
        "phimoe",
    ],
)
def test_every_kind_of_layer_is_measured(name: str, tmp_path: Path) -> None:
    """Every matrix of the bundle that something is multiplied with has moments, which a file holds."""
    bundle = convert(
        make_checkpoint(tmp_path / "checkpoint", by_name(VARIANTS, name)), tmp_path / "model.edgert"
    )
    found = calibrate(bundle, prompt_tokens(150, 131), moments="full")
    found.save(tmp_path / "a.calibration")
    read = Calibration.load(tmp_path / "a.calibration")
    opened = Bundle.open(bundle)
    checksums = {tensor["name"]: tensor["checksum"] for tensor in opened.manifest["tensors"]}
    read.check(opened.recipe, checksums)
    for tensor in opened.manifest["tensors"]:
        matrix, shape = tensor["name"], tensor["shape"]
        if len(shape) == 1 or matrix == "embedding" or matrix.endswith((".router", ".conv")):
            continue
        moments = read.dense_moments(matrix)
        assert moments is not None and moments.shape == (shape[1], shape[1]), matrix
        assert (np.linalg.eigvalsh(moments.astype(np.float64)) > -1e-4 * moments.max()).all(), matrix
    for m, row in enumerate(read.model.moe):
        hidden = read.model.hidden_size
        assert read.router_moments[m].shape == read.input_moments(m, 0).shape == (hidden, hidden)
        assert read.inner_moments(m, row.num_experts - 1).shape == (row.width, row.width)


# --- the same whatever runs it --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path) -> Calibration:
    return calibrate(tiny_bundle, moments="full")


@pytest.mark.parametrize(
    "options", [{"threads": 3}, {"memory": "7MiB"}, {"chunk": 8}, {"chunk": 64, "threads": 2}, {"chunk": 1}]
)
def test_the_machine_does_not_show(tiny_bundle: Path, measured: Calibration, options: dict[str, Any]) -> None:
    other = calibrate(tiny_bundle, moments="full", **options)
    assert other.tensors.keys() == measured.tensors.keys()
    for name, values in measured.tensors.items():
        found = other.tensors[name]
        if "chunk" not in options or not (name.endswith(".triangle") or ".cross_" in name):
            np.testing.assert_array_equal(found, values, err_msg=name)
        elif name.endswith(".triangle"):
            assert_same_moments(matrices(found), matrices(values), SAME)
        else:
            np.testing.assert_allclose(found, values, rtol=0, atol=SAME * np.abs(values).max(), err_msg=name)


def test_diagonals_are_those_of_the_matrices(tiny_bundle: Path, measured: Calibration) -> None:
    other = calibrate(tiny_bundle, moments="diagonal")
    by_eight = calibrate(tiny_bundle, moments="diagonal", chunk=8)
    for name, values in measured.tensors.items():
        if not name.endswith(".triangle"):
            np.testing.assert_array_equal(other.tensors[name], values, err_msg=name)
            continue
        diagonal = np.diagonal(matrices(values), axis1=-2, axis2=-1)
        site = name.removesuffix(".triangle") + ".diagonal"
        found = other.tensors[site]
        np.testing.assert_array_equal(by_eight.tensors[site], found, err_msg=name)
        np.testing.assert_allclose(found, diagonal, rtol=1e-6, err_msg=name)


def test_small_models_are_measured_in_full(tiny_bundle: Path, measured: Calibration) -> None:
    assert calibrate(tiny_bundle).tensors.keys() == measured.tensors.keys()


def test_measuring_changes_no_bit(tiny_bundle: Path) -> None:
    np.testing.assert_array_equal(
        answer(open_model(tiny_bundle)), answer(open_model(tiny_bundle, moments="full"))
    )


def test_a_vector_longer_than_a_block_and_more_rows_than_one(tmp_path: Path) -> None:
    """Sizes that cross every border of the sums: 64 rows of them, 256 columns, 256 tokens."""
    source = tiny_checkpoint(
        tmp_path / "checkpoint", hidden_size=328, num_hidden_layers=1, moe_intermediate_size=72
    )
    bundle = convert(source, tmp_path / "model.edgert", **F32)
    tokens = prompt_tokens(500, TINY_CONFIG["vocab_size"])
    reference = Reference.load(source)
    seen = Seen(reference.model)
    reference.forward(tokens)
    expected = statistics(seen)
    found = calibrate(bundle, tokens, moments="full", context=512, chunk=500, threads=2)
    for name in ("layers.0.mixer.input", "layers.0.ffn.input", "layers.0.experts.inner", "output"):
        assert_same_moments(matrices(found.tensors[f"{name}.triangle"]), expected[name], OTHER_FRAMEWORK)


# --- budget and errors ----------------------------------------------------------------------------------


def test_sums_are_part_of_the_budget(tiny_bundle: Path) -> None:
    plain, full = open_model(tiny_bundle), open_model(tiny_bundle, moments="full")
    sums = full.plan()["observation_bytes"]
    assert plain.plan()["observation_bytes"] == 0 < sums
    assert full.minimum_bytes >= plain.minimum_bytes + sums
    from edgert import _native

    runtime = _native.Runtime(full.minimum_bytes, threads=1)
    model = _native.Model(runtime, str(tiny_bundle), moments="full")
    answer(model)
    assert runtime.peak_bytes <= full.minimum_bytes
    with pytest.raises(BudgetError, match="sums of the calibration"):
        _native.Model(_native.Runtime(plain.minimum_bytes, threads=1), str(tiny_bundle), moments="full")


def test_what_cannot_be_measured_is_refused(tiny_bundle: Path) -> None:
    for tokens in ([], [5], ""):
        with pytest.raises(InvalidArgumentError, match="text: .*2"):
            calibrate(tiny_bundle, tokens)
    with pytest.raises(InvalidArgumentError, match="found 1 tokens, at least 2"):
        calibrate(tiny_bundle, "a")
    with pytest.raises(InvalidArgumentError, match="tokens: found 1, at least 2"):
        calibrate(tiny_bundle, TOKENS, tokens=1)
    with pytest.raises(InvalidArgumentError, match="moments: found 'some', allowed are auto, full, diagonal"):
        calibrate(tiny_bundle, moments="some")
    with pytest.raises(InvalidArgumentError, match="token 1 is 320, allowed 0 to 319"):
        calibrate(tiny_bundle, [5, 320])
    with pytest.raises(InvalidArgumentError, match="loaded with none"):
        open_model(tiny_bundle).observed()


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    bundle = convert(source, tmp_path / "model.edgert", **F32)
    huge = np.full(72, 3e38, np.float32)  # finite, as a converter demands; what comes of it is not
    raw = bytearray((bundle / "dense.bin").read_bytes())
    tensor = next(t for t in read_manifest(bundle)["tensors"] if t["name"] == "layers.0.ffn_norm")
    raw[tensor["offset"] : tensor["offset"] + tensor["bytes"]] = huge.tobytes()
    (bundle / "dense.bin").write_bytes(raw)

    def reseal(manifest: dict[str, Any]) -> None:
        row = next(t for t in manifest["tensors"] if t["name"] == "layers.0.ffn_norm")
        row["checksum"] = xxhash.xxh64(huge.tobytes(), seed=0).hexdigest()

    edit_manifest(bundle, reseal)
    with pytest.raises(InvalidArgumentError, match=r"tensor 'layers.0.* not finite"):
        calibrate(bundle)


def test_a_calibration_of_another_model_is_refused(tiny_bundle: Path, other_bundle: Path) -> None:
    found = calibrate(tiny_bundle)
    for path, fits in ((tiny_bundle, True), (other_bundle, False)):
        bundle = Bundle.open(path)
        checksums = {tensor["name"]: tensor["checksum"] for tensor in bundle.manifest["tensors"]}
        if fits:
            found.check(bundle.recipe, checksums)
        else:
            with pytest.raises(InvalidArgumentError, match="another model of the same sizes"):
                found.check(bundle.recipe, checksums)


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The module reads the file and returns the number of bytes.\n" * 20)
    return path


def test_the_command_writes_a_file_and_says_what_it_saw(
    edgert: Shell, tiny_bundle: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.calibration"
    arguments = ("calibrate", tiny_bundle, "--text", text, "--out", out, "--context", 64)
    done = edgert(*arguments)
    assert done.returncode == 0, done.stderr
    head, *layers, _, explanation = done.stdout.splitlines()
    assert len(layers) == 3 and "effective" in head and "effective" in explanation
    assert f"kept as {out}" in done.stderr
    found = Calibration.load(out)
    said = edgert.json(*arguments, "--tokens", 100, "--moments", "diagonal")  # replaces the first
    assert Calibration.load(out).tokens == said["tokens"] == 100 < found.tokens
    assert (said["window"], said["moments"], said["path"]) == (64, ["diagonal"], str(out))
    assert [layer["experts"] for layer in said["layers"]] == [8, 8, 8]
    assert sum(said["layers"][0]["frequency"]) == pytest.approx(2)


def test_the_command_replaces_nothing_else(
    edgert: Shell, tiny_bundle: Path, text: Path, tmp_path: Path
) -> None:
    def complaint(out: Path, of: Path = text) -> subprocess.CompletedProcess[str]:
        return edgert("calibrate", tiny_bundle, "--text", of, "--out", out)

    content = text.read_bytes()
    assert_fails(complaint(text), "exists and is no calibration")
    assert text.read_bytes() == content
    assert_fails(complaint(tmp_path / "absent" / "a.calibration"), "no such directory")
    empty = tmp_path / "empty"
    empty.touch()
    assert_fails(complaint(tmp_path / "a.calibration", empty), "text: it is empty")
    assert not (tmp_path / "a.calibration").exists()


def test_the_result_is_named_after_the_model() -> None:
    from edgert.cli.calibrate import default_name

    assert default_name(None) == "docs-moe.calibration"
    assert default_name("models/OLMoE-1B-7B.edgert") == "OLMoE-1B-7B.calibration"
    assert default_name(Path("/x/model.Q4_K_M.gguf")) == "model.Q4_K_M.calibration"
    assert default_name("hf:org/name:model.gguf") == "model.calibration"


def test_unused_experts_are_named() -> None:
    from edgert.cli.calibrate import picture

    lines = picture(calibration()).splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["2", "50%"]
    assert lines[-1].startswith("3 of 7 experts met fewer than 32 tokens")
    assert "██·" in lines[1] and "█▅▃▂" in lines[2]
