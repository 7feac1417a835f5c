"""Where a bundle is written: never half of one in the place of a whole one, and nothing else is harmed."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import bundle_id, contents
from checkpoints import tiny_checkpoint

from edgert import _native
from edgert.converters import output as places
from edgert.converters import pack
from edgert.converters.checkpoint import open_checkpoint
from edgert.converters.convert import convert
from edgert.converters.formats import Defaults, choose_formats
from edgert.converters.layout import plan_layout
from edgert.converters.registry import read_decoder
from edgert.errors import (
    CancelledError,
    EdgertError,
    InvalidArgumentError,
    NotFoundError,
    StorageError,
)


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_directory_of_mine(path: Path) -> None:
    path.mkdir()
    (path / "diary.txt").write_text("mine")


def a_bundle_with_something_of_mine(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"checksum":"0123456789abcdef",\n')
    (path / "diary.txt").write_text("mine")


@pytest.mark.parametrize(
    "make",
    [
        a_file,
        a_directory_of_mine,
        a_bundle_with_something_of_mine,
        Path.mkdir,
        lambda p: p.symlink_to("nowhere"),
    ],
)
def test_only_a_bundle_is_replaced(tiny_source: Path, tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "m.edgert")
    before = [(path.name, path.is_file() and path.read_bytes()) for path in sorted(tmp_path.rglob("*"))]
    with pytest.raises(InvalidArgumentError, match="only a bundle is replaced"):
        convert(tiny_source, tmp_path / "m.edgert")
    assert [
        (path.name, path.is_file() and path.read_bytes()) for path in sorted(tmp_path.rglob("*"))
    ] == before


def test_what_comes_there_during_the_conversion_is_left_alone(tiny_source: Path, tmp_path: Path) -> None:
    place = tmp_path / "m.edgert"
    convert(tiny_source, place)

    def meanwhile(done: int, total: int) -> None:
        (place / "diary.txt").write_text("mine")

    with pytest.raises(InvalidArgumentError, match="only a bundle is replaced"):
        convert(tiny_source, place, progress=meanwhile)
    assert (place / "diary.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["m.edgert"]


def test_output_is_not_the_source(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "c")
    (tmp_path / "link").symlink_to(source)
    for output in (source, tmp_path / "link", source / "m.edgert", tmp_path):
        with pytest.raises(InvalidArgumentError, match="output and source"):
            convert(source, output)
    with pytest.raises(NotFoundError, match="no such directory"):
        convert(source, tmp_path / "missing" / "m.edgert")


def test_replacing_a_bundle(tiny_source: Path, tmp_path: Path) -> None:
    first = convert(tiny_source, tmp_path / "m.edgert")
    second = convert(tiny_source, tmp_path / "m.edgert", expert_format="int8", remainders=True)
    assert first.bundle_id != second.bundle_id == bundle_id(tmp_path / "m.edgert")
    assert os.listdir(tmp_path) == ["m.edgert"]
    assert _native.verify_bundle(str(tmp_path / "m.edgert")) > 0


def test_a_second_writer_is_refused(tiny_source: Path, tmp_path: Path) -> None:
    refused: list[EdgertError] = []

    def second(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(StorageError, match="another conversion") as raised:
                convert(tiny_source, tmp_path / "m.edgert")
            refused.append(raised.value)

    report = convert(tiny_source, tmp_path / "m.edgert", progress=second)
    assert refused and bundle_id(tmp_path / "m.edgert") == report.bundle_id
    assert os.listdir(tmp_path) == ["m.edgert"]


def test_a_lock_that_its_owner_left_is_taken_over(tiny_source: Path, tmp_path: Path) -> None:
    lock = tmp_path / ".m.edgert.lock"
    lock.touch()
    convert(tiny_source, tmp_path / "m.edgert")
    assert os.listdir(tmp_path) == ["m.edgert"]
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another conversion"):
            convert(tiny_source, tmp_path / "m.edgert")


def test_leftovers_of_a_killed_conversion_are_removed(tiny_source: Path, tmp_path: Path) -> None:
    (tmp_path / ".m.edgert.new").mkdir()
    (tmp_path / ".m.edgert.new" / "dense.bin").write_bytes(bytes(1000))
    convert(tiny_source, tmp_path / "m.edgert")
    assert os.listdir(tmp_path) == ["m.edgert"]


def test_no_space(
    tiny_source: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "m.edgert")

    class Full:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(StorageError, match="but only 4096 are free"):
        convert(tiny_source, tmp_path / "m.edgert", expert_format="int8")
    assert os.listdir(tmp_path) == ["m.edgert"] and bundle_id(tmp_path / "m.edgert") == bundle_id(tiny_bundle)


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync"])
def test_disk_that_fills_up_midway(
    tiny_source: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "m.edgert")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match="No space left"):
        convert(tiny_source, tmp_path / "m.edgert", expert_format="int8")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["m.edgert"] and contents(tmp_path / "m.edgert") == contents(tiny_bundle)


def test_limit_on_file_size(tiny_source: Path, tmp_path: Path) -> None:
    """A refusal by the system itself, not a simulated one."""
    script = "import sys; from edgert.converters.convert import convert; convert(sys.argv[1], sys.argv[2])"
    result = subprocess.run(
        [sys.executable, "-c", script, tiny_source, tmp_path / "m.edgert"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        check=False,
        capture_output=True,
        text=True,
    )
    assert "StorageError" in result.stderr and "File too large" in result.stderr
    assert os.listdir(tmp_path) == []


def test_interrupt_cleans_up(tiny_source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny_source, tmp_path / "m.edgert", progress=interrupt)
    assert os.listdir(tmp_path) == []


def test_packing_stops_between_slabs(tiny_source: Path, tmp_path: Path) -> None:
    decoder = read_decoder(open_checkpoint(tiny_source))
    formats = choose_formats(None, None, None, None, None, Defaults(), tied=False)
    extent = plan_layout(decoder, formats, alignment=4096, remainders=False).dense[0]
    stop = threading.Event()
    stop.set()
    with (tmp_path / "x").open("wb") as file, pytest.raises(CancelledError):
        pack.pack_extent(extent.parts, file.fileno(), 0, None, lambda done: None, stop)


# --- killed -------------------------------------------------------------------------------------------


def die(source: Path, directory: Path, old: Path | None, exchange: bool, moments: list[int]) -> str:
    """Convert to `directory`/moment/m.edgert for each moment, over a copy of `old`; what the script prints."""
    for moment in moments:
        (directory / str(moment)).mkdir()
        if old is not None:
            shutil.copytree(old, directory / str(moment) / "m.edgert")
    script = Path(__file__).parent / "killed_conversion.py"
    words = [str(word) for word in (script, source, directory, "int4", int(exchange), *moments)]
    return subprocess.check_output([sys.executable, *words], text=True)


@pytest.mark.parametrize(
    ("old", "exchange"),
    [(True, True), (True, False), (False, True)],
    ids=["replace", "replace by renames", "new"],
)
def test_killed_at_any_moment(tmp_path: Path, old: bool, exchange: bool) -> None:
    """What stands is the complete old bundle or the complete new one; the next conversion finds its way."""
    source = tiny_checkpoint(tmp_path / "c", num_hidden_layers=1, num_experts=2)
    before = convert(source, tmp_path / "old.edgert", expert_format="int8").bundle_id
    after = convert(source, tmp_path / "new.edgert", expert_format="int4").bundle_id
    replaced = tmp_path / "old.edgert" if old else None
    calls = int(die(source, tmp_path, replaced, exchange, [10**6]))
    # Every moment of the last steps, where the swap is; before them, all is alike.
    moments = [*range(0, calls - 30, 5), *range(calls - 30, calls)]
    assert die(source, tmp_path, replaced, exchange, moments) == ""

    found = []
    for moment in moments:
        place = tmp_path / str(moment) / "m.edgert"
        if not exchange and not place.exists():  # the instant between two renames
            place = place.with_name(".m.edgert.old")
        if place.exists():
            assert _native.verify_bundle(str(place)) > 0
        found.append(bundle_id(place) if place.exists() else None)
        convert(source, tmp_path / str(moment) / "m.edgert", expert_format="int2")
        assert os.listdir(tmp_path / str(moment)) == ["m.edgert"]
    switch = found.index(after)
    assert found == [before if old else None] * switch + [after] * (len(found) - switch)


def test_an_old_bundle_that_was_moved_aside_comes_back(
    tiny_source: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Killed between the two renames; and the next conversion fails as well."""
    shutil.copytree(tiny_bundle, tmp_path / ".m.edgert.old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            places.BundleOutput,
            "require_space",
            lambda self, needed: (_ for _ in ()).throw(StorageError("full")),
        )
        with pytest.raises(StorageError, match="full"):
            convert(tiny_source, tmp_path / "m.edgert", expert_format="int8")
    assert os.listdir(tmp_path) == ["m.edgert"] and contents(tmp_path / "m.edgert") == contents(tiny_bundle)
