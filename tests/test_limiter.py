"""The benchmarks' own limits on memory and disk, against made-up cgroups and devices."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import limiter
import machine
import pytest
from limiter import Limits, Parent, Setting

V1_MOUNTS = (
    "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n"
    "cgroup {mount}/memory cgroup rw,relatime,memory 0 0\n"
    "cgroup {mount}/blkio cgroup rw,relatime,blkio 0 0\n"
)
V2_MOUNTS = "proc /proc proc rw 0 0\ncgroup2 {mount} cgroup2 rw,relatime 0 0\n"
BOTH = Limits(memory=2**30, read=300_000_000, disks=frozenset({"259:0", "8:16"}))


def test_version_1_groups_are_made_below_the_own_one_of_each_controller(tmp_path: Path) -> None:
    (tmp_path / "memory" / "job" / "7").mkdir(parents=True)
    (tmp_path / "blkio").mkdir()
    memberships = "5:cpu,cpuacct:/\n4:memory:/job/7\n3:blkio:/\n0::/\n"
    assert limiter.find_parents(V1_MOUNTS.format(mount=tmp_path), memberships, ["memory", "io"]) == [
        Parent(1, tmp_path / "memory" / "job" / "7", ("memory",)),
        Parent(1, tmp_path / "blkio", ("io",)),
    ]


def test_only_the_controllers_asked_for_are_looked_for(tmp_path: Path) -> None:
    found = limiter.find_parents(V1_MOUNTS.format(mount=tmp_path), "4:memory:/\n3:blkio:/\n", ["io"])
    assert found == [Parent(1, tmp_path / "blkio", ("io",))]


def test_a_group_that_the_container_does_not_see_is_the_mount_itself(tmp_path: Path) -> None:
    found = limiter.find_parents(V1_MOUNTS.format(mount=tmp_path), "4:memory:/docker/abc\n", ["memory"])
    assert found == [Parent(1, tmp_path / "memory", ("memory",))]


def test_version_2_groups_are_made_where_every_controller_is_handed_on(tmp_path: Path) -> None:
    own = tmp_path / "user.slice" / "shell.scope"
    own.mkdir(parents=True)
    (tmp_path / "cgroup.subtree_control").write_text("cpu io memory\n")
    (own.parent / "cgroup.subtree_control").write_text("cpu memory pids\n")
    (own / "cgroup.subtree_control").write_text("\n")

    def parents(*controllers: str) -> list[Parent]:
        return limiter.find_parents(
            V2_MOUNTS.format(mount=tmp_path), "0::/user.slice/shell.scope\n", controllers
        )

    assert parents("memory") == [Parent(2, own.parent, ("memory",))]
    assert parents("memory", "io") == [Parent(2, tmp_path, ("memory", "io"))]


def test_where_only_memory_is_of_version_1_the_disk_is_held_by_version_2(tmp_path: Path) -> None:
    mounts = f"cgroup {tmp_path}/memory cgroup rw,memory 0 0\ncgroup2 {tmp_path}/unified cgroup2 rw 0 0\n"
    (tmp_path / "unified").mkdir()
    (tmp_path / "unified" / "cgroup.subtree_control").write_text("io\n")
    assert limiter.find_parents(mounts, "4:memory:/\n0::/\n", ["memory", "io"]) == [
        Parent(1, tmp_path / "memory", ("memory",)),
        Parent(2, tmp_path / "unified", ("io",)),
    ]


@pytest.mark.parametrize(
    ("mounts", "reason"),
    [
        ("proc /proc proc rw 0 0\n", "no cgroup with the controller memory or io is mounted"),
        (V2_MOUNTS, "no group from .* has memory and io in its cgroup.subtree_control"),
    ],
)
def test_where_nothing_can_be_limited_the_reason_is_told(tmp_path: Path, mounts: str, reason: str) -> None:
    with pytest.raises(limiter.NoLimiterError, match=reason):
        limiter.find_parents(mounts.format(mount=tmp_path), "0::/\n", ["memory", "io"])


def test_a_group_that_cannot_be_made_is_an_error_with_its_path(tmp_path: Path) -> None:
    parents = [Parent(2, tmp_path / "missing", ("memory",))]
    with (
        pytest.raises(limiter.NoLimiterError, match=r"missing/edgert-benchmark-\d+: No such file"),
        limiter.limited(parents, BOTH),
    ):
        pass


def test_limits_are_written_as_each_version_reads_them() -> None:
    nowhere = Path()
    assert limiter.settings(Parent(1, nowhere, ("memory",)), BOTH) == [
        Setting("memory.limit_in_bytes", "1073741824"),
        Setting("memory.memsw.limit_in_bytes", "1073741824", optional=True),
    ]
    assert limiter.settings(Parent(1, nowhere, ("io",)), BOTH) == [
        Setting("blkio.throttle.read_bps_device", "259:0 300000000"),
        Setting("blkio.throttle.read_bps_device", "8:16 300000000"),
    ]
    assert limiter.settings(Parent(2, nowhere, ("memory", "io")), BOTH) == [
        Setting("memory.max", "1073741824"),
        Setting("memory.swap.max", "0", optional=True),
        Setting("io.max", "259:0 rbps=300000000"),
        Setting("io.max", "8:16 rbps=300000000"),
    ]


def test_a_command_enters_every_group_before_it_starts(tmp_path: Path) -> None:
    paths = [tmp_path / "memory", tmp_path / "blkio"]
    for path in paths:
        path.mkdir()
    groups = limiter.Groups(tuple(paths))
    command = groups.command(["cat", *(str(path / "cgroup.procs") for path in paths)])
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    seen, _ = started.communicate()
    assert seen.split() == [str(started.pid)] * 2


# --- devices ------------------------------------------------------------------------------------------


def device(tmp_path: Path, folder: str) -> Path:
    """A made-up /sys in which `folder` is the device that tmp_path lies on."""
    path = tmp_path / "devices" / folder
    path.mkdir(parents=True)
    (tmp_path / "dev" / "block").mkdir(parents=True)
    (tmp_path / "dev" / "block" / machine.device_number(tmp_path)).symlink_to(path)
    return path


@pytest.mark.parametrize(
    ("folder", "whole"),
    [
        ("pci0000:00/block/vda", "pci0000:00/block/vda"),
        ("pci0000:00/block/vda/vda1", "pci0000:00/block/vda"),
        ("nvme/nvme0/nvme0n1/nvme0n1p3", "nvme/nvme0/nvme0n1"),
        ("virtual/block/dm-0", "virtual/block/dm-0"),
        ("virtual/block/loop7", "virtual/block/loop7"),
    ],
)
def test_reads_are_held_on_the_whole_disk(tmp_path: Path, folder: str, whole: str) -> None:
    device(tmp_path, folder)
    disk = tmp_path / "devices" / whole
    (disk / "queue").mkdir()
    (disk / "dev").write_text("254:0\n")
    assert machine.disk(tmp_path, tmp_path) == disk
    assert limiter.disk_number(tmp_path, tmp_path) == "254:0"


def test_where_there_is_no_disk_reads_cannot_be_held(tmp_path: Path) -> None:
    with pytest.raises(limiter.NoLimiterError, match=r"lies on device \d+:\d+, which is no disk \(overlay"):
        limiter.disk_number(tmp_path, tmp_path)


def test_the_read_ahead_is_that_of_the_disk_of_a_partition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = device(tmp_path, "vda/vda1")
    assert machine.read_ahead_file(tmp_path, tmp_path) is None
    queue = partition.parent / "queue"
    queue.mkdir()
    (queue / "read_ahead_kb").write_text("8192\n")
    found = machine.read_ahead_file(tmp_path, tmp_path)
    assert found is not None and found.samefile(queue / "read_ahead_kb")

    monkeypatch.setattr(machine, "read_ahead_file", lambda path: found)
    with machine.read_ahead(tmp_path, 128) as held:
        assert held == 128
    assert found.read_text() == "8192\n"


def test_a_file_system_on_several_devices_has_a_read_ahead_of_its_own(tmp_path: Path) -> None:
    own = tmp_path / "class" / "bdi" / machine.device_number(tmp_path)
    own.mkdir(parents=True)
    (own / "read_ahead_kb").write_text("4096\n")
    assert machine.read_ahead_file(tmp_path, tmp_path) == own / "read_ahead_kb"


def test_other_processes_are_counted_apart_from_the_children() -> None:
    others = machine.Others()
    subprocess.run(["sleep", "0.2"], check=True)  # many ticks of the system's clock
    assert 0 <= others.processors() <= (os.cpu_count() or 1) + 1
