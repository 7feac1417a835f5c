"""Bits for each expert: what is predicted of formats, how bytes are shared, what a conversion says and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, contents, read_manifest
from checkpoints import SENTENCES, tiny_checkpoint
from shell import Shell, assert_fails

from edgert.calibrating import calibrate
from edgert.calibration import Calibration
from edgert.converters.allocation import Knapsack, smallest_within_loss
from edgert.converters.checkpoint import open_checkpoint
from edgert.converters.convert import convert
from edgert.converters.expert_errors import ErrorTable, measure, slopes
from edgert.converters.formats import Chosen
from edgert.converters.registry import read_decoder
from edgert.errors import InvalidArgumentError

TEXT = " ".join(SENTENCES) * 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose rows fill their groups, so that bits a weight are the formats' own."""
    return tiny_checkpoint(
        tmp_path_factory.mktemp("source") / "checkpoint", hidden_size=64, moe_intermediate_size=64
    )


@pytest.fixture(scope="module")
def calibration(source: Path) -> Calibration:
    convert(source, source.parent / "f32.edgert", **F32)
    return calibrate(source.parent / "f32.edgert", TEXT, context=64)


@pytest.fixture(scope="module")
def calibration_file(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "tiny.calibration"
    calibration.save(path)
    return path


def table_of(
    source: Path, calibration: Calibration, formats: tuple[str, ...], threads: int = 1
) -> ErrorTable:
    decoder = read_decoder(open_checkpoint(source))
    return measure(decoder, calibration, formats, [range(len(decoder.experts))], threads=threads)


def formats_of(bundle: Path) -> list[list[str]]:
    manifest = read_manifest(bundle)
    return [manifest["expert_formats"][row[4]] for layer in manifest["experts"] for row in layer["extents"]]


# --- what is predicted --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ffn",
    [
        {"activation": "silu"},
        {"activation": "gelu_tanh"},
        {"activation": "clamped_swiglu", "activation_alpha": 1.7, "activation_limit": 2.0},
    ],
    ids=lambda ffn: str(ffn["activation"]),
)
def test_slopes_of_an_activation_are_those_of_drawn_pairs(ffn: dict[str, Any]) -> None:
    from oracle import activation

    draw = np.random.default_rng(0)
    g = 1.3 * draw.standard_normal(400_000)
    u = 0.4 * g + 0.8 * draw.standard_normal(400_000)

    by_gate, by_up = slopes(ffn, *(np.array([(a * b).mean()]) for a, b in ((g, g), (u, u), (g, u))))

    step = 1e-5
    expected_gate = ((activation(ffn, g + step, u) - activation(ffn, g - step, u)) / (2 * step)) ** 2
    expected_up = ((activation(ffn, g, u + step) - activation(ffn, g, u - step)) / (2 * step)) ** 2
    assert by_gate[0] == pytest.approx(expected_gate.mean(), rel=0.1)
    assert by_up[0] == pytest.approx(expected_up.mean(), rel=0.1)


def test_more_bits_are_predicted_to_lose_less(source: Path, calibration: Calibration) -> None:
    table = table_of(source, calibration, ("int2", "int3", "int4", "int8"))

    assert (np.diff(table.sizes, axis=2) > 0).all()
    assert (np.diff(table.errors, axis=2) < 0).all()


def test_tables_do_not_depend_on_threads(source: Path, calibration: Calibration) -> None:
    one, three = (table_of(source, calibration, ("int2",), threads) for threads in (1, 3))

    assert (one.errors == three.errors).all()


def test_an_expert_that_nobody_used_is_rare_but_not_worthless(source: Path, calibration: Calibration) -> None:
    tensors = dict(calibration.tensors)
    for name in [
        name
        for name in tensors
        if name.endswith(("experts.tokens", "experts.weight", "experts.weight_squared"))
    ]:
        moved = tensors[name].copy()
        moved[1], moved[0] = moved[0] + moved[1], 0
        tensors[name] = moved
    unused = Calibration(calibration.model, calibration.tokens, calibration.window, tensors)

    table = table_of(source, unused, ("int2", "int4"))

    first = table.experts.index((0, 0))
    assert table.tokens[first] == 0
    assert 0 < table.importance[first] == table.importance[: len(tensors["layers.0.experts.tokens"])].min()


# --- searching ----------------------------------------------------------------------------------------


def test_the_search_finds_the_smallest_that_loses_little_enough(
    source: Path, calibration: Calibration
) -> None:
    ladder = Knapsack(table_of(source, calibration, ("int2", "int4", "int8")))
    heard: list[float] = []

    found = smallest_within_loss(ladder, loss_of, 0.1, lambda _, loss: heard.append(loss))

    expected = next(ladder[rung] for rung in range(len(ladder)) if loss_of(ladder[rung].chosen) <= 0.1)
    assert found == expected
    assert len(heard) < 10 < len(ladder)


def test_a_loss_that_the_best_experts_exceed_is_refused(source: Path, calibration: Calibration) -> None:
    ladder = Knapsack(table_of(source, calibration, ("int2", "int4", "int8")))
    with pytest.raises(InvalidArgumentError, match=r"max_loss: 1.00%; with 8.500 bits .* loses 3.00%"):
        smallest_within_loss(ladder, lambda _: 0.03, 0.01, lambda *_: None)


def loss_of(chosen: Chosen) -> float:
    return sum(0.001 for formats in chosen.values() for name in formats if name == "int2")


# --- conversions --------------------------------------------------------------------------------------


def test_bits_are_shared_out_among_experts(source: Path, calibration: Calibration, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "m.edgert", calibration=calibration, expert_bits=4.0)

    chosen = report.expert_bits
    assert chosen is not None and 3.9 < chosen.bits <= 4.0
    assert report.expert_bytes == chosen.bytes == sum(row.bytes for row in chosen.experts)
    assert chosen.error == pytest.approx(sum(row.error for row in chosen.experts))
    assert chosen.error == chosen.bound  # proven to be the best
    assert formats_of(tmp_path / "m.edgert") == [list(row.formats) for row in chosen.experts]
    assert len({row.formats for row in chosen.experts}) > 1
    assert (
        read_manifest(tmp_path / "m.edgert")["quantization"]["options"]["expert_bits"]["method"] == "knapsack"
    )


def test_the_knapsack_predicts_no_more_error_than_uniform_formats(
    source: Path, calibration: Calibration, tmp_path: Path
) -> None:
    ours, uniform = (
        convert(
            source,
            tmp_path / f"{method}.edgert",
            calibration=calibration,
            expert_bits=4.75,
            allocation=method,
        ).expert_bits
        for method in ("knapsack", "uniform")
    )
    assert ours is not None and uniform is not None
    assert len({row.formats for row in uniform.experts}) == 1
    assert ours.error < uniform.error


def test_equal_inputs_give_equal_bundles(source: Path, calibration_file: Path, tmp_path: Path) -> None:
    for name, threads in (("a.edgert", 1), ("b.edgert", 3)):
        convert(source, tmp_path / name, calibration=calibration_file, expert_bits=3.5, threads=threads)

    assert contents(tmp_path / "a.edgert") == contents(tmp_path / "b.edgert")


def test_matrices_are_chosen_apart_from_one_another(
    source: Path, calibration: Calibration, tmp_path: Path
) -> None:
    report = convert(source, tmp_path / "m.edgert", calibration=calibration, expert_bits=3.5)

    assert report.expert_bits is not None
    assert any(len(set(row.formats)) > 1 for row in report.expert_bits.experts)


def test_the_search_stays_within_the_loss_and_leaves_nothing_behind(
    source: Path, calibration: Calibration, tmp_path: Path
) -> None:
    report = convert(
        source,
        tmp_path / "m.edgert",
        calibration=calibration,
        max_loss=0.05,
        text=TEXT,
        dense_format="f32",
    )

    assert report.expert_bits is not None and report.loss is not None
    assert report.loss.loss <= 0.05
    tried = report.expert_bits.trials
    assert len(tried) > 3
    assert next(t for t in tried if t.bits == report.expert_bits.bits).loss == pytest.approx(report.loss.loss)
    smaller = [trial for trial in tried if trial.bits < report.expert_bits.bits]
    assert all(trial.loss > 0.05 for trial in smaller)
    assert [path.name for path in tmp_path.iterdir()] == ["m.edgert"]


def test_edgemoe_gives_the_most_important_experts_more_bits(
    source: Path, calibration: Calibration, tmp_path: Path
) -> None:
    report = convert(
        source,
        tmp_path / "m.edgert",
        calibration=calibration,
        expert_bits=3.6,
        allocation="edgemoe",
        text=TEXT,
    )

    assert report.expert_bits is not None and report.expert_bits.bits <= 3.6
    assert {row.formats for row in report.expert_bits.experts} == {("int2",) * 3, ("int4",) * 3}


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"expert_bits": 1.0},
            r"expert_bits: 1; the experts of this model take \d\.\d+ to \d\.\d+ bits a weight",
        ),
        ({"expert_bits": 16.0}, r"expert_bits: 16; the experts of this model take"),
        ({"expert_bits": float("nan")}, "expert_bits: nan"),
        ({"expert_bits": 3.0, "calibration": None}, "expert_bits: needs a calibration"),
        ({"expert_bits": 3.0, "expert_format": "int4"}, "leave out expert_format"),
        ({"expert_bits": 3.0, "expert_formats": {"0.*": "int4"}}, "leave out expert_formats"),
        ({"expert_bits": 3.0, "max_loss": 0.02}, "one or the other"),
        (
            {"expert_bits": 3.0, "allocation": "best"},
            "allocation: 'best'; allowed are knapsack, uniform, edgemoe",
        ),
        ({"expert_bits": 3.0, "expert_candidates": ["int5"]}, "expert_candidates: 'int5'; allowed are"),
        ({"expert_bits": 3.0, "expert_candidates": []}, "expert_candidates: "),
        ({"expert_bits": 3.0, "text": ""}, "text: found 0 tokens; at least 256 are needed"),
        ({"max_loss": 0.02}, "text: is needed"),
        ({"max_loss": 0.0, "text": TEXT}, "max_loss: 0; above 0"),
        ({"allocation": "uniform"}, "allocation: has an effect with expert_bits or max_loss only"),
    ],
)
def test_what_cannot_be_done_is_said(
    source: Path, calibration: Calibration, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        convert(source, tmp_path / "m.edgert", **{"calibration": calibration} | options)
    assert list(tmp_path.iterdir()) == []


def test_the_calibration_of_another_model_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", num_experts=4)
    with pytest.raises(InvalidArgumentError, match="calibration: measured on another model"):
        convert(other, tmp_path / "m.edgert", calibration=calibration, expert_bits=3.0)


def test_the_calibration_of_another_model_of_the_same_sizes_is_refused(
    calibration: Calibration, tmp_path: Path
) -> None:
    other = tiny_checkpoint(tmp_path / "other", seed=1, hidden_size=64, moe_intermediate_size=64)
    with pytest.raises(
        InvalidArgumentError, match="another model of the same sizes: .* has another checksum"
    ):
        convert(other, tmp_path / "m.edgert", calibration=calibration, expert_bits=3.0)


# --- the command line ---------------------------------------------------------------------------------


def test_the_command_writes_its_reports(
    edgert: Shell, source: Path, calibration_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text(TEXT)
    arguments = ("--calibration", calibration_file, "--text", tmp_path / "text")
    page, figures = tmp_path / "r.html", tmp_path / "r.json"
    done = edgert(
        *("convert", source, tmp_path / "m.edgert", *arguments),
        *("--max-loss", "20%", "--report", page, "--report", figures),
    )

    assert done.returncode == 0, done.stderr
    assert "bits a weight of the experts, predicted error" in done.stdout
    assert "against the unquantised model" in done.stdout
    value = json.loads(figures.read_text())
    assert value["expert_bits"]["trials"] and value["loss"]["loss"] <= 0.2
    drawn = page.read_text()
    experts = len(value["expert_bits"]["experts"])
    assert drawn.count("<rect") == 2 * experts and drawn.count("<circle") == 2 * experts + len(
        value["expert_bits"]["trials"]
    )
    assert "http" not in drawn and "<script" not in drawn


def test_the_command_names_what_is_wrong(edgert: Shell, source: Path, tmp_path: Path) -> None:
    convert_it = ("convert", source, tmp_path / "m.edgert")
    assert_fails(edgert(*convert_it, "--expert-bits", "many"), "--expert-bits: found 'many'")
    assert_fails(edgert(*convert_it, "--max-loss", "little"), "--max-loss: found 'little'")
    assert_fails(edgert(*convert_it, "--report", tmp_path / "r.pdf"), "its name ends in .html or .json")
    assert_fails(
        edgert(*convert_it, "--expert-bits", "3", "--calibration", tmp_path / "none"), "none: no such file"
    )
