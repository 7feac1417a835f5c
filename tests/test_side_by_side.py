"""The side-by-side with llama.cpp, as far as it needs no llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_shape
import limiter
import machine
import numpy as np
import peers
import plot
import pytest
import rows
import side_by_side
import table
from peers import Job
from rows import Setting

from edgert import _native
from edgert.benchmark import percentiles
from edgert.converters.synthetic import synthetic_decoder
from edgert.roof import Bandwidths
from edgert.shapes import SHAPES, shape_bundle

LLAMA_REPORT = {
    "prefill": {"tokens_per_s": 50.0, "bytes_read_per_token": 0.0},
    "decode": {"tokens_per_s": 5.0, "bytes_read_per_token": 3e6, "token_ms": [200.0] * 4},
    "version": "9.9",
}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Of the tiny shape, with a script in place of llama.cpp's interpreter that prints LLAMA_REPORT."""
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(bytes(1000))
    llama = tmp_path / "python"
    llama.write_text(f"#!/bin/sh\necho '{json.dumps(LLAMA_REPORT)}'\n")
    llama.chmod(0o755)
    return Job("tiny", shape_bundle("tiny"), gguf, 8, 4, 1, str(llama))


# --- peers --------------------------------------------------------------------------------------------


def options_of_llama(command: list[str]) -> Any:
    return json.loads(command[2])


def test_with_a_memory_limit_llama_maps_its_file_and_edgert_gets_a_budget(job: Job) -> None:
    whole, limited = peers.warm(job, None, None), peers.warm(job, 2**30, 2**29)
    assert not options_of_llama(whole["llama.cpp"])["mmap"] and options_of_llama(limited["llama.cpp"])["mmap"]
    assert "--memory" not in whole["edgert"]
    assert limited["edgert"][-2:] == ["--memory", str(2**29)]


def test_every_peer_starts_cold_with_the_same_prompt(job: Job) -> None:
    commands = peers.cold(job)
    assert {options_of_llama(commands[name])["prompt_tokens"] for name in commands if "llama" in name} == {16}
    assert options_of_llama(commands["llama.cpp, mmap"])["mmap"]
    assert commands["edgert"][-3:] == ["--cold", "--prompt-tokens", "16"]


def test_a_peer_that_fails_is_quoted() -> None:
    with pytest.raises(peers.PeerError, match=r"^cannot load it$"):
        peers.report(["sh", "-c", "echo first >&2; echo cannot load it >&2; exit 1"])
    with pytest.raises(peers.PeerError, match=r"^killed by the memory limit$"):
        peers.report(["sh", "-c", "kill -9 $$"])


def test_reads_are_held_on_the_disks_of_both_files(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter, "disk_number", lambda path: "8:0" if path == job.gguf else "8:16")
    assert peers.limits(job, 1000, 3).disks == {"8:0", "8:16"}
    assert peers.limits(job, 1000, None) == limiter.Limits(memory=1000)


# --- rows ---------------------------------------------------------------------------------------------


def test_both_peers_are_measured_in_turns(job: Job) -> None:
    notes: list[str] = []
    llama, edgert = rows.warm(job, Setting(), 2, notes.append)
    order = [
        "round 1 of 2: llama.cpp",
        "round 1 of 2: edgert",
        "round 2 of 2: llama.cpp",
        "round 2 of 2: edgert",
    ]
    assert [note.removeprefix("all memory, ").split(" prefill")[0] for note in notes] == order
    assert (llama["peer"], llama["rounds"], llama["about"]) == ("llama.cpp", 2, {"version": "9.9"})
    assert llama["decode"]["tokens_per_s"] == 5 and llama["decode"]["p99_over_p50"] == 1
    assert edgert["peer"] == "edgert" and edgert["decode"]["tokens_per_s"] > 0
    assert edgert["decode"]["token_ms_p50"] <= edgert["decode"]["token_ms_p99"]
    assert edgert["decode"]["roof_tokens_per_s"] > 0 and "roof_tokens_per_s" not in llama["decode"]
    assert len(edgert["speeds"]) == 2 and not llama["speeds"]


def test_a_cold_start_has_what_it_needs_beside_it(job: Job) -> None:
    Path(job.llama_python).write_text(
        '#!/bin/sh\necho \'{"load_s": 1, "first_token_s": 2, "bytes_read": 3}\'\n'
    )
    llama, mapped, edgert = rows.cold(job, Setting(), 1, lambda line: None)
    assert llama["first_token_s"] == mapped["first_token_s"] == 2 and "needed_bytes" not in llama
    assert edgert["times_ideal"] > 0
    assert edgert["first_token_s"] > edgert["load_s"] and edgert["bytes_read"] >= edgert["needed_bytes"] > 0


def test_a_peer_that_failed_is_not_asked_again(job: Job) -> None:
    Path(job.llama_python).write_text("#!/bin/sh\necho no room >&2; exit 1\n")
    notes: list[str] = []
    llama, edgert = rows.warm(job, Setting(), 2, notes.append)
    assert llama == {"peer": "llama.cpp", "share": None, "read_bytes_per_s": None, "failed": "no room"}
    assert edgert["rounds"] == 2
    assert sum("llama" in note for note in notes) == 1


def report(prefill: float, decode: float, **of_each: Any) -> dict[str, Any]:
    """Of one round."""
    speeds = {"prefill": prefill, "decode": decode}
    found: dict[str, Any] = {
        phase: {"tokens_per_s": speed, "bytes_read_per_token": 3e6, **of_each}
        for phase, speed in speeds.items()
    }
    found["decode"]["token_ms"] = [1000 / decode]
    return {**found, "others_busy": 0.0, "budget_bytes": 2**30}


def test_a_row_is_the_median_of_its_rounds(job: Job) -> None:
    row = rows.warm_row(job, [report(10, 1), report(30, 5), report(20, 4)])
    assert row["prefill"]["tokens_per_s"] == 20
    assert (row["decode"]["tokens_per_s"], row["decode"]["spread"]) == (4, 1.0)
    assert row["decode"]["token_ms_p50"] == 250 and row["decode"]["p99_over_p50"] == 4


def test_percentiles_are_of_all_tokens() -> None:
    found = percentiles([*[10.0] * 198, 30.0, 90.0])
    assert found == {"token_ms_p50": 10, "token_ms_p99": 30, "p99_over_p50": 3}


def speeds(storage: float) -> Bandwidths:
    """Ten thousand bytes of memory, and so many of storage; no bound on arithmetic."""
    return Bandwidths(10_000, storage)


def test_every_round_has_the_roof_of_its_moment(job: Job) -> None:
    work = {"memory_bytes": 1000.0, "storage_bytes": 100.0, "operations": 0.0}
    rounds = [
        {**report(1, speed, work=work), "speeds": speeds(storage)}
        for speed, storage in ((8, 10_000), (2, 400), (5, 10_000))
    ]
    decode = rows.warm_row(job, rounds)["decode"]
    assert decode["roof_tokens_per_s"] == 10  # of 10, 4 and 10
    assert decode["roof_fraction"] == 0.5  # of 0.8, 0.5 and 0.5


@pytest.mark.parametrize(("read", "expected"), [(None, 2e9), (3e8, 3e8), (5e9, 2e9)])
def test_the_speed_of_a_disk_is_that_at_which_it_is_held(
    job: Job, monkeypatch: pytest.MonkeyPatch, read: int | None, expected: float
) -> None:
    monkeypatch.setattr(machine, "speeds", lambda *arguments: speeds(2e9))
    assert rows.speeds(job, Setting(None, read)).storage_bytes_per_s == expected


def test_the_ideal_start_is_reading_and_then_computing() -> None:
    work = {"memory_bytes": 500.0, "storage_bytes": 0.0, "operations": 0.0}
    found = {"first_token_s": 4.0, "load_s": 1.0, "bytes_read": 1e4, "needed_bytes": 1e4, "tokens": 10}
    row = rows.cold_row([{**found, "work": work, "speeds": speeds(1e4), "others_busy": 0.0}])
    assert (row["ideal_s"], row["times_ideal"]) == (1.5, 4 / 1.5)


def test_the_plan_stands_beside_what_was_measured(job: Job) -> None:
    def of_round(storage: float, budget: int) -> dict[str, Any]:
        work = {"memory_bytes": 1000.0, "storage_bytes": 0.0, "operations": 0.0}
        found = report(1, 1000.0, work=work)
        return {**found, "speeds": Bandwidths(1e9, storage, 1e12), "budget_bytes": budget}

    decode = rows.warm_row(job, [of_round(1e8, 2**30)])["decode"]
    assert decode["plan_deviation"] == pytest.approx(decode["plan_tokens_per_s"] / 1000 - 1)
    paged = rows.planned_speeds(job, [of_round(1e8, 1_200_000)])["decode"]
    slow = rows.planned_speeds(job, [of_round(1e6, 1_200_000)])["decode"]
    assert paged / 100 <= slow < paged / 50  # storage takes nearly all of the time, or most of it
    assert rows.planned_speeds(job, [of_round(1e8, 1000)]) == {}


# --- what is made of them -----------------------------------------------------------------------------


@pytest.fixture
def result(job: Job, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What side_by_side.py writes, of made-up speeds."""
    planned = {"prefill": 300.0, "decode": 12.0}
    monkeypatch.setattr(rows, "planned_speeds", lambda job, reports: planned)

    def row(peer: str, setting: Setting, speed: float, **of_each: Any) -> rows.Row:
        of_round = report(10 * speed, speed, **of_each)
        found = rows.warm_row(job, [{**of_round, "speeds": speeds(1)} if of_each else of_round])
        return {"peer": peer, "share": setting.share, "read_bytes_per_s": setting.read, **found}

    half, held = Setting(0.5), Setting(0.5, 300_000_000)
    work = {"memory_bytes": 125.0, "storage_bytes": 0.0, "operations": 0.0}  # at most 80 tokens a second
    roof = {"work": work, "simulated_bytes_per_token": 2e6}
    failed = {"peer": "llama.cpp", "share": 0.25, "read_bytes_per_s": None, "failed": "killed"}
    start = {"share": None, "read_bytes_per_s": None, "spread": 0.1, "load_s": 1.0, "bytes_read": 2e9}
    return {
        "shape": "tiny", "date": "2026-01-02", "machine": {"cpu": "a CPU", "memory_bytes": 2**31}, "threads": 2,
        "edgert": "1.0", "rounds": 3, "prompt_tokens": 8, "decode_tokens": 4,
        "cold_prompt_tokens": 16, "read_ahead_kb": 128,
        "rows": [
            row("llama.cpp", Setting(), 50),
            row("edgert", Setting(), 60, **roof),
            row("llama.cpp", half, 4),
            row("edgert", half, 10, **roof),
            row("edgert", held, 5, **roof),
            failed,
        ],
        "cold": [
            {"peer": "llama.cpp", **start, "first_token_s": 3.0},
            {"peer": "edgert", **start, "first_token_s": 1.5, "needed_bytes": 1e9, "ideal_s": 1.2, "times_ideal": 1.25},
        ],
    }  # fmt: skip


def test_a_table_divides_by_the_peer_of_the_same_place_and_says_what_failed(result: dict[str, Any]) -> None:
    assert table.warm(result["rows"], "decode").splitlines() == [
        "| memory | disk |  | tok/s | spread | p99/p50 | MB read a token | simulated | roof | of roof | plan | plan is off "
        "| times llama.cpp |",
        "| " + " | ".join(["---"] * 13) + " |",
        "| all | full | llama.cpp | 50.0 | 0.0% | 1.00 | 3.0 |  |  |  |  |  |  |",
        "| all | full | edgert | 60.0 | 0.0% | 1.00 | 3.0 | 2.0 | 80.0 | 75.0% | 12.0 | -80.0% | 1.20 |",
        "| 50% | full | llama.cpp | 4.00 | 0.0% | 1.00 | 3.0 |  |  |  |  |  |  |",
        "| 50% | full | edgert | 10.0 | 0.0% | 1.00 | 3.0 | 2.0 | 80.0 | 12.5% | 12.0 | +20.0% | 2.50 |",
        "| 50% | 300 MB/s | edgert | 5.00 | 0.0% | 1.00 | 3.0 | 2.0 | 80.0 | 6.2% | 12.0 | +140.0% |  |",
        "| 25% | full | llama.cpp | killed |  |  |  |  |  |  |  |  |  |",
    ]


def test_cold_starts_have_a_table_of_their_own(result: dict[str, Any]) -> None:
    assert table.cold(result["cold"]).splitlines()[2:] == [
        "| full | llama.cpp | 3.000 | 10.0% | 1.000 | 2000 |  |  |  |",
        "| full | edgert | 1.500 | 10.0% | 1.000 | 2000 | 1000 | 1.200 | 1.25 |",
    ]


def test_the_report_says_what_its_figures_depend_on(result: dict[str, Any]) -> None:
    text = table.markdown(json.loads(json.dumps(result)))
    assert [line for line in text.splitlines() if line.endswith(":")] == [
        "Prefill, 8 tokens:",
        "Decode, 4 tokens:",
        "Cold start, prompt of 16 tokens:",
    ]
    assert text.splitlines()[-1].startswith(
        "tiny: a CPU, 2 threads; 2 GiB; edgert 1.0 (-); llama-cpp-python -; "
    )
    of_round = {"memory_bytes_per_s": 5e10, "storage_bytes_per_s": 2e9, "int8_operations_per_s": 1e12}
    for row in result["rows"]:
        row.pop("speeds", None)
    assert table.about(result).endswith("read_ahead_kb 128")
    result["rows"][1]["speeds"] = [of_round, of_round | {"storage_bytes_per_s": 3e9}]
    assert table.about(result).endswith(
        "speeds from round to round: memory 50.0 to 50.0 GB/s, reads of an expert 2.0 to 3.0 GB/s, int8 1,000.0 to 1,000.0 GOPS"
    )


def test_the_plot_has_a_line_a_peer_and_disk(result: dict[str, Any]) -> None:
    held = 300_000_000
    assert plot.series(result) == {
        ("edgert", None): [(0.5, 10.0), (1.0, 60.0)],
        ("edgert", held): [(0.5, 5.0), (1.0, 60.0)],
        ("llama.cpp", None): [(0.5, 4.0)],
        ("roof", None): [(0.5, 80.0), (1.0, 80.0)],
        ("roof", held): [(0.5, 80.0), (1.0, 80.0)],
    }


# --- the command --------------------------------------------------------------------------------------


def test_one_command_measures_everything_in_order() -> None:
    arguments = side_by_side.arguments_of(["olmoe-1b-7b"])
    found = side_by_side.settings_of(arguments.parts, arguments.share, arguments.disk)
    shares = (0.75, 0.5, 0.25)
    full, held = [Setting(share) for share in shares], [Setting(share, 300_000_000) for share in shares]
    assert list(found) == [Setting(), *full, *held]
    assert [str(setting) for setting in (Setting(), held[0])] == ["all memory", "75% memory, 300 MB/s"]


def test_parts_shares_and_disks_can_be_chosen() -> None:
    words = ["tiny", "--parts", "held", "--share", "0.5", "0.25", "--disk", "100MB", "1GB"]
    arguments = side_by_side.arguments_of(words)
    found = side_by_side.settings_of(arguments.parts, arguments.share, arguments.disk)
    assert list(found) == [Setting(share, disk) for disk in (10**8, 10**9) for share in (0.5, 0.25)]


def test_a_part_that_cannot_be_limited_says_why_and_the_others_go_on(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise limiter.NoLimiterError("no disk")

    monkeypatch.setattr(limiter, "disk_number", refuse)
    words = ["tiny", "--parts", "resident", "held", "--share", "0.5", "--rounds", "1"]
    *_, report = side_by_side.measure(job, side_by_side.arguments_of(words))
    assert [row.get("failed") for row in report["rows"]] == [None, None, "not measured: no disk"]
    assert "| 50% | 300 MB/s | all | not measured: no disk |" in table.markdown(report)


# --- llama.cpp's file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_peer_has_as_many_weights_as_the_shape(shape: str) -> None:
    found = sum(int(np.prod(size)) for _, size in gguf_shape.matrices(SHAPES[shape]))
    decoder = synthetic_decoder(shape, SHAPES[shape])
    sources = [tensor.source for tensor in decoder.dense]
    for expert in decoder.experts:
        sources += [*expert.sources, *expert.biases]
    assert found == sum(source.rows * source.cols for source in sources)


@pytest.mark.parametrize("name", gguf_shape.TYPES)
def test_random_blocks_have_the_deviation_asked_for_and_no_mean(name: str) -> None:
    packed = gguf_shape.random_blocks(256, 512, gguf_shape.TYPES[name], 0.02, np.random.default_rng(0))
    values = np.frombuffer(_native.dequantize(name, packed.tobytes(), 256, 512), np.float32)
    # A scale of mxfp4 is a power of two.
    assert values.std() == pytest.approx(0.02, rel=0.4 if name == "MXFP4" else 0.02)
    assert abs(values.mean()) < 0.0005


def test_a_large_matrix_is_written_in_slabs_of_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_shape, "SLAB_BYTES", 1000)
    kind = gguf_shape.TYPES["Q4_0"]
    slabs = list(gguf_shape.slabs("blk.0.ffn_up_exps.weight", (4, 7, 64), kind, np.random.default_rng(0)))
    row = 64 // kind.elements * kind.bytes
    assert [slab.nbytes for slab in slabs] == [27 * row, row]
