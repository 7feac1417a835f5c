"""Lossy modes: off by default, refused by `exact`, said aloud with what they cost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import MIB, contents, convert, minimum_bytes, open_model, read_manifest
from checkpoints import TINY_CONFIG, prompt_tokens
from shell import Shell, assert_fails

import edgert
from edgert import _native, lossy
from edgert.errors import BudgetError, InvalidArgumentError
from edgert.lossy import Loss
from edgert.settings import knobs

PROMPT = prompt_tokens(60, TINY_CONFIG["vocab_size"])
TEXT = "The module reads the file and writes the result to standard output. " * 4


def small(bundle: Path, **options: Any) -> Any:
    """A model with room for a third of the experts, one row a step, as when it generates."""
    plan = open_model(bundle, chunk=1).plan()
    return open_model(bundle, memory=plan["minimum_bytes"] + plan["expert_bytes"] // 3, chunk=1, **options)


def logits(model: Any) -> "np.ndarray[Any, Any]":
    return np.asarray(model.logits(model.sequence(), PROMPT))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGERT_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text("")
    return tmp_path / "config.toml"


def test_every_lossy_knob_is_off_by_default_and_may_change_while_a_model_runs() -> None:
    rows = {knob.name: knob for knob in knobs() if knob.lossy}
    assert rows.keys() >= {"cache_aware_routing", "skip_experts", "skip_absent_experts"}
    assert lossy.names() == tuple(rows)
    for knob in rows.values():
        assert (knob.kind, knob.default, knob.minimum, knob.maximum, knob.live) == ("float", 0, 0, 1, True)
        assert knob.help.startswith("Lossy: ")


def test_nothing_is_lossy_unless_asked_for(tiny_bundle: Path, config: Path) -> None:
    with edgert.load(tiny_bundle, exact=True) as model:
        assert model.lossy_modes == {}
        assert model.generate("The file", max_tokens=4).statistics["experts_skipped"] == 0


@pytest.mark.filterwarnings("ignore:.*low_precision_misses changes nothing")
@pytest.mark.parametrize(
    "name", ["cache_aware_routing", "skip_experts", "skip_absent_experts", "low_precision_misses"]
)
def test_exact_refuses_a_mode_wherever_it_comes_from(
    tiny_bundle: Path, config: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    given: dict[str, Any] = {name: 0.1}

    def refused(where: str, **given: Any) -> None:
        with pytest.raises(
            InvalidArgumentError, match=f"{where}: exact results are asked for .* {name} changes"
        ):
            edgert.load(tiny_bundle, exact=True, **given)

    refused(name, **given)
    monkeypatch.setenv(f"EDGERT_{name.upper()}", "0.2")
    refused(f"EDGERT_{name.upper()}")
    given[name] = 0
    with edgert.load(tiny_bundle, exact=True, **given) as model:
        assert model.lossy_modes == {}
    monkeypatch.delenv(f"EDGERT_{name.upper()}")
    config.write_text(f"{name} = 0.3\n")
    refused(f"config.toml: {name}")
    with edgert.load(tiny_bundle) as model:
        assert model.lossy_modes == {name: pytest.approx(0.3)}


def test_a_share_is_a_number_from_0_to_1(tiny_bundle: Path, config: Path) -> None:
    for bad in (1.5, -0.1, "much", True):
        with pytest.raises(
            InvalidArgumentError, match=r"skip_experts: found .*, allowed is a number from 0 up to 1"
        ):
            edgert.load(tiny_bundle, skip_experts=bad)


def test_the_native_model_names_the_modes_it_knows(tiny_bundle: Path) -> None:
    with pytest.raises(
        InvalidArgumentError, match="knob threads is no lossy mode; those are cache_aware_routing"
    ):
        open_model(tiny_bundle, lossy={"threads": 0.5})


def test_a_model_that_is_measured_computes_exactly(tiny_bundle: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="skip_experts: a model that is measured computes exactly"):
        open_model(tiny_bundle, moments="diagonal", lossy={"skip_experts": 0.5})


def test_skipping_by_weight_gives_the_same_bits_at_any_budget(tiny_bundle: Path) -> None:
    modes = {"skip_experts": 0.3}
    whole = open_model(tiny_bundle, lossy=modes)
    paged = small(tiny_bundle, lossy=modes)
    exact = logits(open_model(tiny_bundle))
    assert np.array_equal(logits(whole), logits(paged))
    assert not np.array_equal(logits(whole), exact)
    assert whole.statistics()["experts_skipped"] == 2 * paged.statistics()["experts_skipped"] > 0


def test_modes_change_while_it_runs_and_leave_no_trace(tiny_bundle: Path) -> None:
    model = small(tiny_bundle)
    exact = logits(model)
    model.set_lossy({"cache_aware_routing": 0.5})
    assert model.lossy() == {"cache_aware_routing": 0.5}
    assert not np.array_equal(logits(model), exact)
    assert model.statistics()["experts_replaced"] > 0
    model.set_lossy({})
    assert model.lossy() == {}
    assert np.array_equal(logits(model), exact)


# --- what is said of them -----------------------------------------------------------------------------


def test_eval_measures_the_loss_and_the_other_commands_state_it(edgert: Shell, tiny_bundle: Path) -> None:
    text = edgert.home / "text.txt"
    text.write_text(TEXT)
    mode = ("--skip-experts", 0.4, "--context", 64, "--memory", "64MiB")
    run = ("run", tiny_bundle, "-p", "The file", "--max-tokens", 2, *mode)
    before = edgert(*run)
    assert "lossy: skip_experts 0.4: loss unknown; `edgert eval tiny" in before.stderr
    assert " skipped" in before.stderr

    done = edgert("eval", tiny_bundle, "--text", text, "--reference", tiny_bundle, *mode)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("lossy: ")]
    assert "skip_experts 0.4: perplexity " in line and " of text.txt, budget " in line
    report = edgert.json("eval", tiny_bundle, "--text", text, "--reference", tiny_bundle, *mode)
    assert report["lossy"] == {"skip_experts": pytest.approx(0.4)}
    assert report["kl_mean"] > 0 and report["reference_perplexity"] != report["perplexity"]

    assert line.split("perplexity")[1] in edgert(*run).stderr
    bench = edgert("bench", tiny_bundle, "--repetitions", 1, "--decode-tokens", 4, *mode)
    assert line.split("perplexity")[1] in bench.stderr
    assert "left out" in bench.stdout


def test_a_model_against_itself_loses_nothing_without_modes(edgert: Shell, tiny_bundle: Path) -> None:
    text = edgert.home / "text.txt"
    text.write_text(TEXT)
    report = edgert.json("eval", tiny_bundle, "--text", text, "--reference", tiny_bundle, "--context", 64)
    assert report["kl_mean"] == 0 and report["top1_agreement"] == 1
    assert report["perplexity"] == report["reference_perplexity"] and report["lossy"] == {}


@pytest.mark.parametrize("command", ["run", "eval", "bench"])
def test_commands_refuse_modes_with_exact(edgert: Shell, tiny_bundle: Path, command: str) -> None:
    more = {"run": ("-p", "a"), "eval": ("--text", __file__), "bench": ()}[command]
    done = edgert(command, tiny_bundle, *more, "--exact", "--cache-aware-routing", 0.1)
    assert_fails(done, "cache_aware_routing: exact results are asked for")
    edgert.variables["EDGERT_SKIP_EXPERTS"] = "0.1"
    assert_fails(edgert(command, tiny_bundle, *more, "--exact"), "EDGERT_SKIP_EXPERTS: exact results")


def test_kept_losses_go_by_modes_and_nearest_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    modes = {"skip_experts": 0.25}
    for budget, perplexity in ((10 * MIB, 11.0), (20 * MIB, 10.5), (20 * MIB, 10.25)):
        lossy.keep("0" * 32, Loss(modes, budget, "a.txt", 100, perplexity, 10.0, 0.1, 0.9))
    found = lossy.kept("0" * 32, modes, 18 * MIB)
    assert found is not None and found.perplexity == 10.25
    assert str(found).startswith("perplexity +2.50%, KL 0.10000 nats a token, same first token 90.00%")
    assert lossy.kept("0" * 32, {"skip_experts": 0.5}, 18 * MIB) is None
    assert lossy.kept("1" * 32, modes, 18 * MIB) is None


def test_a_damaged_list_of_losses_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    path = tmp_path / "cache/losses" / f"{'0' * 32}.json"
    path.parent.mkdir(parents=True)
    for content in ("[", "{}", "3", json.dumps([{"modes": 1}]), json.dumps([3])):
        path.write_text(content)
        assert lossy.kept("0" * 32, {}, 1) is None


# --- split experts ------------------------------------------------------------------------------------


@pytest.fixture
def split_bundle(tiny_source: Path, tmp_path: Path) -> Path:
    return convert(tiny_source, tmp_path / "split.edgert", split_experts=True)


def test_a_split_bundle_computes_the_same_bits(split_bundle: Path, tiny_bundle: Path) -> None:
    expected = logits(open_model(tiny_bundle))
    assert np.array_equal(logits(open_model(split_bundle)), expected)
    assert np.array_equal(logits(small(split_bundle)), expected)
    assert _native.verify_bundle(str(split_bundle)) > 0


def test_low_precision_reads_less(split_bundle: Path) -> None:
    exact, low = small(split_bundle), small(split_bundle, lossy={"low_precision_misses": 0.5})
    assert not np.array_equal(logits(low), logits(exact))
    counts = low.statistics()
    assert counts["experts_low_precision"] > 0 and counts["expert_base_reads"] > 0
    assert counts["expert_bytes_read"] < exact.statistics()["expert_bytes_read"]
    low.set_lossy({})
    assert np.array_equal(logits(low), logits(exact))


def test_an_unsplit_bundle_says_that_low_precision_changes_nothing(
    split_bundle: Path, tiny_bundle: Path, recwarn: pytest.WarningsRecorder
) -> None:
    with edgert.load(split_bundle, memory="64MiB", low_precision_misses=0.5) as model:
        model.set_knob("low_precision_misses", 0.25)
    with edgert.load(tiny_bundle, memory="64MiB") as model:
        model.set_knob("skip_experts", 0.1)
        model.set_knob("low_precision_misses", 0)
        assert not recwarn.list
        with pytest.warns(
            RuntimeWarning, match="tiny.*low_precision_misses changes nothing.*--split-experts"
        ):
            model.set_knob("low_precision_misses", 0.5)
    with pytest.warns(RuntimeWarning, match="low_precision_misses changes nothing"):
        edgert.load(tiny_bundle, memory="64MiB", low_precision_misses=0.5).close()


def test_a_split_bundle_is_reproducible_and_says_what_it_is(
    split_bundle: Path, tiny_source: Path, tmp_path: Path
) -> None:
    again = convert(tiny_source, tmp_path / "again.edgert", split_experts=True, threads=1)
    assert contents(again) == contents(split_bundle)
    manifest = read_manifest(split_bundle)
    assert manifest["quantization"]["options"]["split_experts"] is True
    for row in manifest["experts"]:
        for _, offset, size, _, _, base, *checksums in row["extents"]:
            assert offset % 4096 == 0 and 0 < base < size and len(checksums) == 2


def test_only_formats_that_split_are_split(tiny_source: Path, tmp_path: Path) -> None:
    mixed = convert(
        tiny_source,
        tmp_path / "mixed.edgert",
        split_experts=True,
        expert_formats=lambda layer, expert: "int8" if expert % 2 else "int3",
    )
    for row in read_manifest(mixed)["experts"]:
        assert [len(extent) for extent in row["extents"]] == [5, 8] * (len(row["extents"]) // 2)
    plain = convert(
        tiny_source,
        tmp_path / "plain.edgert",
        expert_formats=lambda layer, expert: "int8" if expert % 2 else "int3",
    )
    assert np.array_equal(logits(small(mixed)), logits(open_model(plain)))
    with pytest.raises(InvalidArgumentError, match="no expert has formats that split; those are int8"):
        convert(tiny_source, tmp_path / "none.edgert", expert_format="int3", split_experts=True)


def test_the_command_line_splits(edgert: Shell, tiny_source: Path, tmp_path: Path) -> None:
    output = tmp_path / "split.edgert"
    assert (
        edgert("convert", tiny_source, output, "--split-experts", "--expert-format", "int8").returncode == 0
    )
    assert edgert.json("verify", output)["ok"] is True
    assert edgert.json("show", output)["minimum_bytes"] > 0
    done = edgert("run", output, "-p", "a", "--max-tokens", 2, "--low-precision-misses", 0.5)
    assert done.returncode == 0 and "lossy: low_precision_misses 0.5" in done.stderr


def test_the_smallest_budget_holds_what_joining_takes(split_bundle: Path) -> None:
    least = minimum_bytes(split_bundle, chunk=1)
    assert open_model(split_bundle, memory=least, chunk=1).minimum_bytes == least
    with pytest.raises(BudgetError, match=str(least)):
        open_model(split_bundle, memory=least - 1, chunk=1)
