"""What to expect of a model: sizes without weights, tokens a second by hand, the command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgert import plan, roof
from edgert.benchmark import DECODE_TOKENS, PROMPT_TOKENS
from edgert.bundle import Bundle
from edgert.cli.main import main
from edgert.devices import load_device
from edgert.errors import BudgetError, InvalidArgumentError, NotFoundError, UnsupportedError
from edgert.footprint import ModelSizes, find, memory_needs, sizes_of_bundle, sizes_of_config
from edgert.plan import EFFICIENCY, Speeds, budget_ladder, expect_of_plan
from edgert.shapes import SHAPES

MIB, GIB = 1 << 20, 1 << 30

# One MoE layer of 8 experts, 2 a token; 4 KiB each.
RECIPE = {
    "blocks": [{"ffn": {"kind": "moe", "num_experts": 8, "num_experts_per_tok": 2}}],
    "layers": [0],
}
WEIGHTS = roof.Footprint(
    dense_bytes=1000, dense_weights=500, output_bytes=200, output_weights=100,
    experts=[[4096] * 8], expert_weights=[4000], per_token=[2],
)  # fmt: skip
MODEL = ModelSizes("model", RECIPE, WEIGHTS, 0, "int8", [[4096] * 8], 0)


def speeds(memory: float = 1e6, storage: float = 1e6, arithmetic: float = 1e12) -> Speeds:
    return Speeds("by hand", True, 1, 4, memory, arithmetic, lambda size, depth: storage)


def divided(slots: int, *, chunk: int = 128, kv_bytes: int = 0) -> dict[str, int]:
    """A plan of the engine's with so many slots."""
    return {
        "slots_bytes": slots * 4096,
        "expert_bytes": 8 * 4096,
        "chunk": chunk,
        "kv_bytes": kv_bytes,
        "state_bytes": 0,
        "context": 100,
    }


def expectation(machine: Speeds, memory_plan: dict[str, int]) -> plan.Expectation:
    return expect_of_plan(MODEL, machine, 0, memory_plan)


# --- the arithmetic -----------------------------------------------------------------------------------


def test_with_everything_in_memory_decode_reads_weights_and_kv_at_memory_speed() -> None:
    found = expectation(speeds(), divided(8, kv_bytes=100 * 10))
    kv = 10 * (PROMPT_TOKENS + DECODE_TOKENS / 2)
    assert found.decode_tokens_per_s == pytest.approx(EFFICIENCY.memory * 1e6 / (1200 + 2 * 4096 + kv))
    assert (found.resident, found.hit_rate, found.bytes_read_per_token, found.limit) == (
        True,
        1.0,
        0.0,
        "memory",
    )


def test_with_two_slots_every_token_reads_its_experts_at_storage_speed() -> None:
    found = expectation(speeds(), divided(2))
    # Uniform routing: of 2 experts among 8, on average half a one was the last token's too.
    assert found.bytes_read_per_token == pytest.approx(1.5 * 4096, rel=0.1)
    assert found.hit_rate == pytest.approx(0.25, abs=0.1)
    slow = expectation(speeds(storage=1e4), divided(2))
    in_memory = 1 / expectation(speeds(), divided(8)).decode_tokens_per_s  # which comes on top
    in_storage = slow.bytes_read_per_token * (1 / (EFFICIENCY.storage * 1e4) + 1 / (EFFICIENCY.arrival * 1e6))
    assert slow.decode_tokens_per_s == pytest.approx(1 / (in_memory + in_storage))
    assert (slow.resident, slow.limit) == (False, "storage")


def test_storage_is_as_fast_as_reads_of_an_expert_that_are_missing_at_a_time() -> None:
    asked: list[tuple[float, float]] = []

    def read(size: float, depth: float) -> float:
        asked.append((size, depth))
        return 1e6

    found = expectation(dataclasses.replace(speeds(), read=read), divided(2))
    decode, prefill = asked
    assert decode[0] == prefill[0] == 4096
    assert decode[1] == pytest.approx(2 * (1 - found.hit_rate))
    assert prefill[1] == 4


def test_prefill_is_arithmetic_where_that_is_slow_and_else_reads_each_expert_once_a_chunk() -> None:
    tokens = PROMPT_TOKENS
    operations = 2 * (tokens * (500 + 2 * 4000) + 100) / tokens
    slow = expectation(speeds(arithmetic=1e6), divided(8))
    assert slow.prefill_tokens_per_s == pytest.approx(EFFICIENCY.arithmetic * 1e6 / operations)
    whole = expectation(speeds(), divided(8))
    assert whole.prefill_tokens_per_s == pytest.approx(EFFICIENCY.memory * 1e6 * tokens / (1200 + 8 * 4096))
    halves = expectation(speeds(), divided(8, chunk=tokens // 2))
    assert halves.prefill_tokens_per_s == pytest.approx(
        EFFICIENCY.memory * 1e6 * tokens / (2 * (1000 + 8 * 4096) + 200)
    )


def test_more_memory_is_never_slower() -> None:
    rows = [expectation(speeds(storage=1e5), divided(slots)) for slots in range(2, 9)]
    assert [row.decode_tokens_per_s for row in rows] == sorted(row.decode_tokens_per_s for row in rows)
    assert [row.hit_rate for row in rows] == sorted(row.hit_rate for row in rows)


def test_the_ladder_doubles_from_the_smallest_to_everything() -> None:
    assert budget_ladder(3 * GIB, 17 * GIB) == [3 * GIB, 4 * GIB, 8 * GIB, 16 * GIB, 17 * GIB]
    assert budget_ladder(7 * GIB, 8 * GIB) == [7 * GIB, 8 * GIB]
    assert budget_ladder(5 * MIB, 5 * MIB) == [5 * MIB]


# --- sizes --------------------------------------------------------------------------------------------


def config_of(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return config


def test_a_configuration_weighs_what_its_bundle_does(tiny_source: Path, tiny_bundle: Path) -> None:
    """All but the assets, which a configuration says nothing of."""
    bundle = Bundle.open(tiny_bundle)
    before, after = sizes_of_config("tiny", config_of(tiny_source), "config.json"), sizes_of_bundle(bundle)
    assets = sum(asset["bytes"] for asset in bundle.manifest["assets"])
    expected = dataclasses.replace(after, disk_bytes=after.disk_bytes - assets)
    assert dataclasses.replace(before, checkpoint_bytes=None) == expected
    source = (tiny_source / "model.safetensors").stat().st_size
    assert before.checkpoint_bytes == pytest.approx(source, rel=0.05)


def test_formats_and_device_are_those_of_a_conversion(tiny_source: Path) -> None:
    config = config_of(tiny_source)
    usual = sizes_of_config("tiny", config, "")
    smaller = sizes_of_config("tiny", config, "", expert_format="int2")
    assert smaller.extent_bytes < usual.extent_bytes and smaller.dense_bytes == usual.dense_bytes
    assert sizes_of_config("tiny", config, "", device="phone").dense_bytes < usual.dense_bytes


def test_the_budgets_are_the_engine_s(tiny_bundle: Path) -> None:
    subject = find(str(tiny_bundle))
    needs = subject.sizes.needs(threads=1)
    smallest, resident = needs["minimum_bytes"], needs["resident_bytes"]
    assert memory_needs(Bundle.open(tiny_bundle)) == subject.sizes.needs()
    assert plan.expect(subject.sizes, speeds(), resident).resident
    assert not plan.expect(subject.sizes, speeds(), smallest).resident
    assert subject.sizes.plan(resident, threads=1)["slots_bytes"] == sum(
        map(sum, subject.sizes.weights.experts)
    )
    with pytest.raises(BudgetError, match=f"smallest that works is {smallest} bytes"):
        plan.expect(subject.sizes, speeds(), smallest - 1)
    assert plan.expect_all(subject.sizes, speeds(), [smallest - 1, resident])[0] is None


@pytest.mark.parametrize("name", ["olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b"])
def test_shapes_weigh_about_their_names(name: str) -> None:
    sizes = find(name).sizes
    weights = {"olmoe-1b-7b": 6.9e9, "qwen3-30b-a3b": 30.5e9, "mixtral-8x7b": 46.7e9}[name]
    assert sizes.checkpoint_bytes == pytest.approx(2 * weights, rel=0.01)
    assert sizes.disk_bytes == pytest.approx(4.4 / 8 * weights, rel=0.02)


# --- finding ------------------------------------------------------------------------------------------


def test_what_is_named_is_found(tiny_source: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_source / "config.json", tmp_path)
    kinds = {
        str(tiny_bundle): "bundle",
        "docs-moe": "bundle",
        str(tiny_source): "checkpoint",
        str(tiny_source / "config.json"): "checkpoint",
        str(tmp_path): "config",
        str(tmp_path / "config.json"): "config",
        "tiny": "shape",
    }
    assert {text: find(text).kind for text in kinds} == kinds


def test_what_is_not_there_is_said_with_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(
        NotFoundError, match=r"no bundle of this name.*config\.json, a GGUF file or a shape \(olmoe-1b-7b"
    ):
        find("nosuchmodel")
    with pytest.raises(NotFoundError, match="no manifest"):
        find(str(tmp_path))


def test_what_cannot_be_converted_is_refused(tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPES["tiny"], "model_type": "novel"}))
    with pytest.raises(UnsupportedError, match=r"config\.json: model_type 'novel'"):
        find(str(tmp_path))
    with pytest.raises(InvalidArgumentError, match="formats are chosen already"):
        find(str(tiny_bundle), expert_format="int2")


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No machine has been measured here."""
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def test_the_object_of_plan(home: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = planned(capsys, tiny_bundle)
    assert (value["model"], value["kind"], value["next"]) == ("tiny", "bundle", f"edgert run {tiny_bundle}")
    assert value["machine"]["measured"] is False and "device profile" in value["machine"]["source"]
    first, *_, last = value["budgets"]
    assert (first["memory_bytes"], last["memory_bytes"]) == (value["minimum_bytes"], value["resident_bytes"])
    assert last["resident"] and not first["resident"]
    assert last["decode_tokens_per_s"] > first["decode_tokens_per_s"] > 0
    assert last["prefill_tokens_per_s"] >= first["prefill_tokens_per_s"] > 0


def test_budgets_can_be_named(home: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = planned(
        capsys, tiny_bundle, "--memory", "1KiB", "--memory", "2MiB", "--threads", 1, "--context", 64
    )
    assert [(row["memory_bytes"], row["fits"]) for row in value["budgets"]] == [
        (1024, False),
        (2 * MIB, True),
    ]
    assert value["next"] == f"edgert run {tiny_bundle} --memory 2MiB"
    assert value["machine"]["threads"] == 1


def test_the_next_command_is_the_one_that_gets_there(
    home: Path, tiny_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = tiny_source.name
    assert planned(capsys, tiny_source)["next"] == f"edgert convert {tiny_source} {name}.edgert"
    chosen = planned(capsys, tiny_source, "--expert-format", "int2", "--device", "phone")
    assert chosen["next"] == f"edgert convert {tiny_source} {name}.edgert --expert-format int2 --device phone"
    assert planned(capsys, "tiny", "--memory", "1MiB")["next"] == "edgert bench --shape tiny --memory 1MiB"
    assert planned(capsys, "tiny", "--memory", "1KiB")["next"] is None


def test_a_device_stands_for_the_machine_that_is_not_here(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = planned(capsys, "olmoe-1b-7b", "--device", "raspberry-pi-5", "--memory", "2GiB")
    (row,) = value["budgets"]
    board = load_device("raspberry-pi-5")
    bound = board.storage.random_read_mb_per_s * 1e6 / row["bytes_read_per_token"]
    assert 0.6 * bound < row["decode_tokens_per_s"] < EFFICIENCY.storage * bound  # memory comes on top
    assert value["machine"]["available_bytes"] == board.memory.total_mib * MIB * 7 // 8


def test_threads_beyond_a_device_s_cores_take_memory_and_give_no_speed() -> None:
    device = load_device("phone")
    usual, many = (plan.assumed_speeds(device, threads=n) for n in (0, 64))
    assert (usual.threads, many.threads) == (device.cpu.cores, 64)
    assert many.int8_operations_per_s == usual.int8_operations_per_s
    assert many.memory_bytes_per_s == usual.memory_bytes_per_s


def test_for_people_there_is_a_table_and_a_warning_where_nothing_was_measured(
    home: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny_bundle)]) == 0
    shown = capsys.readouterr()
    assert "DECODE TOK/S" in shown.out and "smallest budget" in shown.out and "next: edgert run" in shown.out
    assert "edgert devices probe" in shown.err
    assert main(["plan", str(tiny_bundle), "--memory", "1KiB"]) == 0
    refused = capsys.readouterr().out
    assert "too small" in refused and "are there; a budget between the two works" in refused


def test_room_is_counted_where_the_next_command_writes(
    home: Path,
    tiny_source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    asked: list[Path] = []
    usage = shutil.disk_usage

    def recorded(place: Path) -> Any:
        asked.append(place)
        return usage(place)

    monkeypatch.setattr(shutil, "disk_usage", recorded)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    home.mkdir()
    for subject in (tiny_source, "tiny"):
        assert main(["plan", str(subject)]) == 0
    assert asked == [work, home]


def test_run_warns_where_few_tokens_a_second_are_to_be_expected(
    home: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["run", str(tiny_bundle), "-p", "x", "--max-tokens", "1"]
    assert main(arguments) == 0
    assert "slow" not in capsys.readouterr().err
    monkeypatch.setattr(plan, "speeds_here", lambda *, threads: speeds(memory=1e5, storage=1e3))
    assert main(arguments) == 0
    assert "this will be slow: about" in capsys.readouterr().err
    assert main([*arguments, "--memory", "1200KiB"]) == 0
    assert "from storage (by hand); `edgert plan" in capsys.readouterr().err
