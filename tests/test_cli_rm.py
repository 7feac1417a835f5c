"""edgert rm: only bundles go, whole, and not while they are used."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest
from ggufs import QWEN3_MOE, gguf_arrays, metadata, qwen3_moe_arrays, write_gguf
from shell import Shell, assert_fails, on_a_terminal


@pytest.fixture
def bundle(edgert: Shell, tiny_bundle: Path) -> Path:
    """A bundle that is found by its name."""
    return Path(shutil.copytree(tiny_bundle, edgert.home / "data/models/mine.edgert"))


def test_a_bundle_goes_and_what_it_took_is_said(edgert: Shell, bundle: Path) -> None:
    other = Path(shutil.copytree(bundle, edgert.home / "other.edgert"))
    taken = sum(file.stat().st_blocks * 512 for file in bundle.iterdir())
    removed = edgert.json("rm", "mine", other, "--yes")["removed"]
    assert removed == [{"path": str(path), "bytes": taken} for path in (bundle, other)]
    assert not bundle.exists() and not other.exists() and list(bundle.parent.iterdir()) == []


def test_it_asks_first(edgert: Shell, bundle: Path) -> None:
    assert_fails(edgert("rm", "mine", stdin=b"y\n"), "nobody can be asked whether to remove this; say --yes")
    on_a_terminal(edgert.command("rm", "mine"), edgert.environment, ["n\n"], prompt="[y/N] ", status=1)
    assert bundle.exists()
    shown = on_a_terminal(edgert.command("rm", "mine"), edgert.environment, ["y\n"], prompt="[y/N] ")
    assert f"removed {bundle}, " in shown and not bundle.exists()


def test_nothing_but_a_bundle_goes(edgert: Shell, bundle: Path, tiny_source: Path) -> None:
    assert_fails(edgert("rm", "nosuch", "--yes"), "nosuch: no such path")
    assert_fails(edgert("rm", tiny_source, "--yes"), "no bundle (there is no manifest.json)")
    assert_fails(edgert("rm", "docs-moe", "--yes"), "comes with the package")
    link = edgert.home / "link.edgert"
    link.symlink_to(bundle)
    assert_fails(edgert("rm", link, "--yes"), "is a link")
    (bundle / "diary.txt").write_text("mine")
    assert_fails(
        edgert("rm", "mine", "--yes"),
        "holds 'diary.txt', which is not part of a bundle; only a bundle is removed",
    )
    assert (bundle / "manifest.json").exists() and tiny_source.exists()


def test_one_that_may_not_go_keeps_the_others(edgert: Shell, bundle: Path) -> None:
    assert edgert("rm", "mine", "nosuch", "--yes").returncode == 1
    assert bundle.exists()


def test_what_is_in_use_stays(edgert: Shell, bundle: Path) -> None:
    with (bundle / "dense.bin").open("rb"):
        assert_fails(edgert("rm", "mine", "--yes"), "uses it; end that first")
    with (bundle.parent / ".mine.edgert.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert_fails(edgert("rm", "mine", "--yes"), "another conversion")
    assert bundle.exists()


def test_a_running_model_is_in_use(edgert: Shell, bundle: Path) -> None:
    lowest = edgert.json("show", "mine")["minimum_bytes"]
    talking = subprocess.Popen(
        edgert.command("chat", "mine", "--memory", lowest, "--max-tokens", 1),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=edgert.environment,
    )  # fmt: skip
    assert talking.stdin and talking.stdout
    talking.stdin.write(b"file\n")
    talking.stdin.flush()
    talking.stdout.readline()  # it is loaded
    assert_fails(edgert("rm", "mine", "--yes"), f"process {talking.pid} uses it")
    talking.communicate()
    assert edgert("rm", "mine", "--yes").returncode == 0


def test_of_a_gguf_file_what_was_made_of_it_goes(edgert: Shell) -> None:
    file = write_gguf(
        edgert.home / "small.gguf", metadata("qwen3moe", QWEN3_MOE), gguf_arrays(qwen3_moe_arrays())
    )
    assert_fails(edgert("rm", file, "--yes"), "no bundle was made of it")
    assert edgert("verify", file).returncode == 0
    (removed,) = edgert.json("rm", file, "--yes")["removed"]
    assert not Path(removed["path"]).parent.exists() and file.exists()
