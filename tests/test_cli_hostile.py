"""What the command line gets wrong or cannot have: one line that names it, status 1, and nothing left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from bundles import contents
from shell import Shell, assert_fails

TEXT = "The module reads the file and returns the number of bytes. "

BUDGETS = [
    ("--memory", "0", "memory: found '0'"),
    ("--memory", "-1", "memory: found '-1'"),
    ("--memory", "1e30", "memory: found '1e30'"),
    ("--memory", "4GBx", "memory: found '4GBx'"),
    ("--memory", "99999999999999999999", "memory: found '99999999999999999999'"),
    ("--memory", "10KiB", "the smallest that works is"),
    ("--threads", "0", "threads: found '0', allowed is a whole number from 1"),
    ("--threads", "9999", "threads: found '9999'"),
    ("--context", "-5", "context: found '-5'"),
]


def commands(bundle: Path, text: Path) -> dict[str, tuple[object, ...]]:
    """Those that take the engine's flags."""
    return {
        "run": ("run", bundle, "-p", "x"),
        "chat": ("chat", bundle),
        "eval": ("eval", bundle, "--text", text),
        "bench": ("bench", bundle, "--repetitions", 1),
        "calibrate": ("calibrate", bundle, "--text", text, "--out", text.with_suffix(".calibration")),
        "serve": ("serve", bundle, "--port", 0),
    }


@pytest.mark.parametrize("command", ["run", "chat", "eval", "bench", "calibrate", "serve"])
def test_budgets_and_threads_out_of_range(edgert: Shell, tiny_bundle: Path, command: str) -> None:
    text = edgert.home / "text.txt"
    text.write_text(TEXT * 8)
    for flag, value, complaint in BUDGETS:
        done = edgert(*commands(tiny_bundle, text)[command], f"{flag}={value}")
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and not done.stdout and complaint in last, (flag, value, done.stderr)
        assert last.startswith("edgert: error: ") and "Traceback" not in done.stderr
    assert sorted(path.name for path in edgert.home.iterdir() if path.suffix) == ["text.txt"]


def test_an_address_that_others_reach_needs_a_key(edgert: Shell) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert_fails(
            edgert("serve", "docs-moe", "--host", host),
            "can be reached from other machines: give --api-key-file",
        )


def test_profiles_with_unknown_keys_and_units(edgert: Shell, tiny_source: Path) -> None:
    profile = edgert.home / "mine.toml"
    original = (Path(__file__).parents[1] / "devices/laptop.toml").read_text()
    for before, after, complaint in (
        ("total_mib", "total_gib", "memory.total_gib is unknown"),
        ('name = "laptop"', 'name = "mine"\ncolour = "red"', "colour is unknown"),
        ("total_mib = ", 'total_mib = "32GB" # ', "memory.total_mib"),
    ):
        profile.write_text(
            original.replace('name = "laptop"', 'name = "mine"').replace(
                before.replace("laptop", "mine"), after, 1
            )
        )
        done = edgert("convert", tiny_source, edgert.home / "out.edgert", "--device", profile)
        assert_fails(done, complaint)
        assert "mine.toml" in done.stderr and not (edgert.home / "out.edgert").exists()


def test_output_is_input(edgert: Shell, tiny_source: Path, copy: Path) -> None:
    before = contents(copy)
    assert_fails(edgert("convert", tiny_source, tiny_source), "output and source are the same directory")
    assert_fails(edgert("convert", tiny_source, tiny_source / "m.edgert"), "contain one another")
    assert_fails(edgert("adapter", "convert", copy, copy), "adapter")
    assert contents(copy) == before


def test_a_place_that_cannot_be_written(edgert: Shell, tiny_source: Path) -> None:
    assert_fails(edgert("convert", tiny_source, "/proc/m.edgert"), "/proc: cannot write here")
    assert_fails(edgert("convert", tiny_source, edgert.home / "no/such/m.edgert"), "no such directory")


def test_a_disk_that_is_full(edgert: Shell, tiny_source: Path, copy: Path) -> None:
    """Files may not grow beyond 8 blocks, which fails where a full disk does."""
    before = contents(copy)
    for output in (copy, edgert.home / "new.edgert"):
        command = edgert.command("convert", tiny_source, output, "--expert-format", "int8")
        done = subprocess.run(
            ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *command],
            capture_output=True,
            text=True,
            env=edgert.environment,
            check=False,
        )
        assert_fails(done, "File too large")
    assert contents(copy) == before
    assert sorted(path.name for path in edgert.home.iterdir()) == ["copy.edgert"]


def test_two_writers(edgert: Shell, tiny_source: Path, copy: Path) -> None:
    before = contents(copy)
    lock = copy.with_name(f".{copy.name}.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert_fails(
            edgert("convert", tiny_source, copy), "another conversion is writing this bundle; wait for it"
        )
    assert contents(copy) == before


def test_a_home_that_cannot_be_written(edgert: Shell, tiny_bundle: Path) -> None:
    """What is only remembered is not missed."""
    edgert.variables["EDGERT_HOME"] = "/proc/edgert"
    done = edgert("chat", tiny_bundle, "--max-tokens", 2, "--ignore-eos", stdin=b"file\n")
    assert done.returncode == 0 and "[2 tokens at" in done.stderr
    assert edgert("list").returncode == 0


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../m", "/", "-", "a/b", "m\n", "%s", "x" * 300, os.fsdecode(b"\xff")]
)
def test_names_that_are_none(edgert: Shell, tiny_bundle: Path, name: str) -> None:
    """None leaves the folder of bundles, and none removes a thing."""
    shutil.copytree(tiny_bundle, edgert.home / "data/m.edgert")
    (edgert.home / "data/models").mkdir()
    for arguments in (("rm", "--yes"), ("show",)):
        if arguments == ("show",) and name == "":
            continue  # the embedded one has no name to give
        done = edgert(*arguments, "--", name)
        assert done.returncode == 1 and not done.stdout, name
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("edgert: error: ")
    assert (edgert.home / "data/m.edgert/manifest.json").exists()
