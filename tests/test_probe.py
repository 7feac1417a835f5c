"""Measuring the machine: what a probe returns and leaves behind, and what its file may say."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from edgert import _native, machine, probe
from edgert.cli.main import main
from edgert.errors import InvalidArgumentError, NotFoundError, StorageError
from edgert.machine import BackendSpeed, MachineProfile, ReadSpeed, load_machine, save_machine
from edgert.probe import Effort

MIB = 1 << 20
SMALL = Effort(
    memory_bytes=MIB,
    file_bytes=8 * MIB,
    read_seconds=0.001,
    passes=1,
    contests=1,
    block_bytes=(65536, MIB),
    depths=(1, 4),
)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> MachineProfile:
    return probe.probe(tmp_path_factory.mktemp("storage"), effort=SMALL)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An edgert home of its own, and little to measure."""
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(probe, "Effort", lambda: SMALL)
    return tmp_path / "home"


def made(direct: dict[tuple[int, int], float], **changes: Any) -> MachineProfile:
    """A profile of this machine that reads (KiB, depth) past the page cache at so many MB/s, and buffered at 100."""
    reads = tuple(ReadSpeed(block, depth, 100.0, speed) for (block, depth), speed in direct.items())
    backends = (BackendSpeed("io_uring", "on", 500.0, 20.0),)
    storage = machine.StorageSpeed("/", "ext4", 64, "io_uring", "on", 500.0, backends, reads)
    identity = machine.Identity(machine.fingerprint(), "x86_64", "a processor", 4, 8192)
    threads = (machine.ThreadSpeed(1, 10_000.0, 100.0), machine.ThreadSpeed(4, 20_000.0, 400.0))
    whole = MachineProfile(datetime.now(UTC), "avx2", identity, storage, machine.VERSION, threads)
    return dataclasses.replace(whole, **changes)


# --- measuring ----------------------------------------------------------------------------------------


def test_everything_is_measured_by_threads_block_and_depth(profile: MachineProfile) -> None:
    assert [row.threads for row in profile.threads] == probe.thread_counts()
    assert all(row.memory_read_mb_per_s > 0 and row.int8_gops > 0 for row in profile.threads)
    assert [(row.block_kib, row.depth) for row in profile.storage.reads] == [
        (64, 1),
        (64, 4),
        (1024, 1),
        (1024, 4),
    ]
    assert all(row.buffered_mb_per_s > 0 for row in profile.storage.reads)
    ways = {(row.io_backend, row.direct_io) for row in profile.storage.backends}
    assert {backend for backend, _ in ways} == set(_native.usable_io_backends())
    assert (profile.storage.io_backend, profile.storage.direct_io) in ways
    assert profile.storage.sequential_mb_per_s > 0 and profile.storage.file_mib == 8
    assert profile.is_this_machine and profile.describe_age() == "today"
    assert profile.isa in _native.runnable_isas()


def test_threads_are_the_powers_of_two_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, counts in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        monkeypatch.setattr(_native, "usable_cores", lambda cores=cores: cores)
        assert probe.thread_counts() == counts


def test_the_file_that_is_read_never_has_a_name_while_it_holds_anything(tmp_path: Path) -> None:
    with probe.temporary_file(tmp_path, SMALL) as (reads, size):
        assert size == SMALL.file_bytes
        assert os.listdir(tmp_path) == []
        assert (
            reads.measure(
                span_bytes=size,
                block_bytes=MIB,
                depth=2,
                random=True,
                direct=False,
                io_backend="auto",
                seconds=0,
            )
            > 0
        )
    assert os.listdir(tmp_path) == []


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever was inherited
from pathlib import Path
from edgert import probe
from edgert.__main__ import main
write = probe._write
def interrupted(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGINT)
probe._write = interrupted
sys.exit(main())
"""


def test_ctrl_c_leaves_neither_the_file_nor_a_profile(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "devices", "probe", "--path", str(storage)],
        env={**os.environ, "EDGERT_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "edgert: interrupted\n")
    assert os.listdir(storage) == [] and not (tmp_path / "home").exists()


def test_a_directory_that_cannot_be_measured_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="absent: no such directory"):
        probe.probe(tmp_path / "absent", effort=SMALL)
    endless = dataclasses.replace(SMALL, file_bytes=1 << 62, block_bytes=(1 << 58,))
    with pytest.raises(StorageError, match=r"are free, and the probe needs .*--path"):
        probe.probe(tmp_path, effort=endless)


def test_what_cannot_be_read_back_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise StorageError(f"{name}: cannot be opened: Too many open files")

    monkeypatch.setattr(_native, "ReadProbe", refuse)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(StorageError, match="cannot be opened: Too many open files"):
        probe.probe(tmp_path, effort=SMALL)
    assert os.listdir(tmp_path) == [] and set(os.listdir("/proc/self/fd")) == before


def test_an_instruction_set_that_is_not_here_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise InvalidArgumentError("instruction set 'wrong' is unknown")

    monkeypatch.setattr(_native, "Runtime", refuse)
    steps: list[int] = []
    with pytest.raises(InvalidArgumentError, match="instruction set 'wrong'"):
        probe.probe(tmp_path, effort=SMALL, progress=lambda done, total: steps.append(done))
    assert steps == []


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    probe.probe(tmp_path, effort=SMALL, progress=lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert {total for _, total in steps} == {len(steps)}


# --- what follows from it -----------------------------------------------------------------------------


def test_speeds_between_those_measured_lie_between_them() -> None:
    storage = made({(64, 1): 100.0, (64, 4): 400.0, (1024, 1): 200.0, (1024, 4): 800.0}).storage
    assert storage.read_mb_per_s(64 << 10, 1) == 100
    assert storage.read_mb_per_s(256 << 10, 1) == pytest.approx(200**0.5 * 100**0.5)
    assert storage.read_mb_per_s(1 << 20, 2) == pytest.approx(400)
    assert storage.read_mb_per_s(1 << 30, 64) == 800
    assert storage.read_mb_per_s(1, 1) == 100


def test_the_fewest_reads_in_flight_that_are_as_fast_as_any_are_taken(tmp_path: Path) -> None:
    profile = made({(1024, 1): 500.0, (1024, 4): 985.0, (1024, 16): 1000.0})
    here = dataclasses.replace(profile.storage, path=str(tmp_path))
    assert dataclasses.replace(profile, storage=here).knobs(tmp_path)["io_threads"] == 4
    other = dataclasses.replace(here, direct_io="off", io_backend="pread")
    assert dataclasses.replace(profile, storage=other).knobs(tmp_path) == {
        "io_threads": 1,
        "direct_io": "off",
        "io_backend": "pread",
    }


def test_settings_are_for_bundles_on_the_storage_that_was_measured(tmp_path: Path) -> None:
    profile = made({(1024, 1): 500.0})
    gone = dataclasses.replace(profile.storage, path=str(tmp_path / "gone"))
    assert dataclasses.replace(profile, storage=gone).knobs(tmp_path) == {}
    elsewhere = dataclasses.replace(profile.storage, path="/proc")
    assert dataclasses.replace(profile, storage=elsewhere).knobs(tmp_path) == {}


@pytest.mark.parametrize(
    ("speeds", "won"),
    [
        ((100, 100, 100, 100), ("pread", "on")),
        ((102, 99, 100, 101), ("pread", "on")),  # chance
        ((110, 100, 100, 100), ("pread", "off")),
        ((100, 100, 100, 110), ("io_uring", "on")),
        ((100, 90, 110, 109), ("io_uring", "on")),
        ((100, None, 120, None), ("io_uring", "off")),  # a file system without direct reads
        ((100, None, 104, None), ("pread", "off")),
    ],
)
def test_what_is_faster_wins_and_at_equal_speed_direct_reads_by_pread(
    speeds: tuple[float | None, ...], won: tuple[str, str]
) -> None:
    ways = [(backend, direct) for backend in ("pread", "io_uring") for direct in ("off", "on")]
    rows = [BackendSpeed(*way, speed, 1.0) for way, speed in zip(ways, speeds, strict=True) if speed]
    best = machine.winner(rows)
    assert (best.io_backend, best.direct_io) == won


def test_loading_a_model_takes_what_was_found(
    home: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import edgert

    asked: list[dict[str, object]] = []
    runtime = _native.Runtime

    def recorded(**options: Any) -> _native.Runtime:
        asked.append(options)
        return runtime(**options)

    monkeypatch.setattr(_native, "Runtime", recorded)
    profile = made({(1024, 1): 500.0, (1024, 16): 1000.0})
    here = dataclasses.replace(profile.storage, path=str(tiny_bundle), direct_io="off", io_backend="pread")
    save_machine(dataclasses.replace(profile, storage=here), home / "machine.toml")
    choices: tuple[dict[str, Any], ...] = ({}, {"io_backend": "auto", "direct_io": "auto"})
    for knobs in choices:
        with edgert.load(tiny_bundle, **knobs) as model:
            assert model.stats()["io_backend"] == "pread"
    last = _native.usable_io_backends()[-1]
    with edgert.load(tiny_bundle, io_threads=3, io_backend=last) as model:
        assert model.stats()["io_backend"] == last
    assert [options["io_threads"] for options in asked] == [1, 1, 3]
    assert [options["direct_io"] for options in asked] == ["off"] * 3


def test_without_a_profile_reads_are_those_that_win_at_equal_speed(home: Path, tiny_bundle: Path) -> None:
    import edgert

    equal = [BackendSpeed(backend, "on", 100.0, 1.0) for backend in ("io_uring", "pread")]
    with edgert.load(tiny_bundle) as model:
        assert model.stats()["io_backend"] == machine.winner(equal).io_backend


@pytest.mark.parametrize(("measured", "expected"), [("here", True), ("/proc", False)])
def test_a_roof_is_that_of_the_storage_that_the_bundle_lies_on(
    home: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str], measured: str, expected: bool
) -> None:
    profile = made({(1024, 1): 500.0})
    place = str(tiny_bundle) if measured == "here" else measured
    here = dataclasses.replace(profile.storage, path=place)
    save_machine(dataclasses.replace(profile, storage=here), home / "machine.toml")
    lengths = ["--prompt-tokens", "2", "--decode-tokens", "2", "--repetitions", "1"]
    assert main(["bench", str(tiny_bundle), *lengths, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [("roof_tokens_per_s" in row) for row in report["results"]] == [expected] * 2


def test_what_was_measured_may_not_be_had_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may forbid what won outside of it: no profile makes loading fail."""
    storage = dataclasses.replace(made({(1024, 1): 500.0}).storage, path=str(tmp_path))
    assert (storage.io_backend, storage.direct_io) == ("io_uring", "on")
    profile = made({(1024, 1): 500.0}, storage=storage)
    for usable, expected in ((["pread", "io_uring"], "io_uring"), (["pread"], None)):
        monkeypatch.setattr(_native, "usable_io_backends", lambda usable=usable: usable)
        assert profile.knobs(tmp_path).get("io_backend") == expected
        assert "direct_io" not in profile.knobs(tmp_path)


# --- its file -----------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(profile: MachineProfile, tmp_path: Path) -> None:
    file = tmp_path / "new" / "machine.toml"
    save_machine(profile, file)
    loaded = load_machine(file)
    assert loaded is not None
    assert loaded.storage.path == profile.storage.path and loaded.probed == profile.probed
    for ours, theirs in zip(loaded.storage.reads, profile.storage.reads, strict=True):
        assert dataclasses.astuple(ours) == pytest.approx(dataclasses.astuple(theirs), rel=1e-4)
    assert os.listdir(file.parent) == ["machine.toml"]


def test_texts_survive_the_file(tmp_path: Path) -> None:
    profile = made({(64, 1): 1.0})
    odd = dataclasses.replace(profile.machine, cpu='a "quoted" \\ prozessor\tº 💾')
    save_machine(dataclasses.replace(profile, machine=odd), tmp_path / "machine.toml")
    loaded = load_machine(tmp_path / "machine.toml")
    assert loaded is not None and loaded.machine.cpu == odd.cpu


def test_there_may_be_no_file(tmp_path: Path) -> None:
    assert load_machine(tmp_path / "machine.toml") is None


def test_a_file_from_another_machine_is_noticed(home: Path) -> None:
    profile = made({(1024, 1): 500.0})
    copied = dataclasses.replace(
        profile, machine=dataclasses.replace(profile.machine, fingerprint="0123456789abcdef")
    )
    save_machine(copied, home / "machine.toml")
    assert load_machine() == load_machine(home / "machine.toml") and machine.measured() is None


def test_a_file_that_cannot_be_read_is_told_once_and_keeps_no_model_from_running(
    home: Path, tiny_bundle: Path
) -> None:
    save_machine(made({(1024, 1): 500.0}), home / "machine.toml")
    file = home / "machine.toml"
    file.write_text(file.read_text().replace(f"version = {machine.VERSION}", "version = 9"))
    done = subprocess.run(
        [sys.executable, "-m", "edgert", "run", str(tiny_bundle), "-p", "x", "--max-tokens", "1"],
        env={**os.environ, "EDGERT_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [line for line in done.stderr.splitlines() if "machine.toml" in line]
    assert line.startswith("edgert: warning: this machine counts as not measured: ")
    assert "key version: found 9" in line and "`edgert devices probe` writes the file anew" in line


def test_age_is_counted_in_days() -> None:
    now = datetime.now(UTC)
    for days, words in ((0, "today"), (1, "yesterday"), (40, "40 days ago"), (-3, "today")):
        assert made({(64, 1): 1.0}, probed=now - timedelta(days=days)).describe_age() == words


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("version = 2", "version = 1", r"key version: found 1, allowed is a whole number from 2 to 2"),
        ("version = 2", "", r"key version is missing"),
        ('isa = "avx2"', "isa = 7", r"key isa: found 7, allowed is a text"),
        ("probed = ", "probed = 7 #", r"key probed: found 7, allowed is a date and time with its zone"),
        ("Z\n", "\n", r"key probed: found .*, allowed is a date and time with its zone"),
        ("fingerprint", "fingerprnt", r"machine\.fingerprnt is unknown; did you mean machine\.fingerprint"),
        ('direct_io = "on"', 'direct_io = "auto"', r"storage\.direct_io: found 'auto'.*on, off"),
        ("direct_mb_per_s = 500.0\n", "", r"storage\.direct_io: found 'on', allowed is off"),
        (
            "buffered_mb_per_s = 100.0",
            "buffered_mb_per_s = nan",
            r"storage\.reads\[0\]\.buffered_mb_per_s: found nan",
        ),
        ("depth = 4", "depth = 1", r"key storage\.reads: found '2 tables'"),
        ("depth = 4", "depth = 0", r"key storage\.reads\[1\]\.depth: found 0"),
        ("threads = 4", "threads = 1", r"key threads: found \[1, 1\], allowed is .* rising"),
        ("[[threads]]", "[[thread]]", r"key thread is unknown"),
        ("[machine]", "machine = 1\n[x]", r"key"),
        ('"avx2"', '"avx2', r"not TOML"),
        ("version", "#" * 70_000 + "\nversion", r"larger than"),
    ],
)
def test_a_file_that_breaks_the_rules_is_refused_with_the_key_and_what_to_do(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    file = tmp_path / "machine.toml"
    save_machine(made({(1024, 1): 500.0, (1024, 4): 600.0}), file)
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=complaint) as refusal:
        load_machine(file)
    assert str(file) in str(refusal.value) and "edgert devices probe" in str(refusal.value)


# --- the command --------------------------------------------------------------------------------------


def test_the_command_measures_writes_and_shows(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices"]) == 0
    assert "not measured yet" in capsys.readouterr().out
    assert main(["devices", "probe", "--path", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "MEMORY READ" in shown and "DEPTH 4" in shown and str(home / "machine.toml") in shown
    assert main(["devices"]) == 0
    shown = capsys.readouterr().out
    assert "(measured)" in shown and "measured today" in shown
    assert main(["devices", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)["this_machine"]["measured"]
    assert value["is_this_machine"] is True and len(value["storage"]["reads"]) == 4


def test_the_command_writes_elsewhere_where_it_is_told(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.toml"
    assert main(["devices", "probe", "--path", str(tmp_path), "--output", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(file)
    assert load_machine(file) is not None and load_machine() is None


def test_a_profile_that_cannot_be_written_is_refused_before_anything_is_measured(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "probe", lambda *arguments, **options: pytest.fail("it was measured"))
    (tmp_path / "file").touch()
    for output in ("/proc/machine.toml", tmp_path, tmp_path / "file/machine.toml"):
        assert main(["devices", "probe", "--path", str(tmp_path), "--output", str(output)]) == 1
        assert f"{output}: cannot be written: " in capsys.readouterr().err
