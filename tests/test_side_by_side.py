"""The side-by-side with llama.cpp, as far as it needs no llama.cpp."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import gguf_shape
import limiter
import machine
import numpy as np
import pytest
import side_by_side

from edgert.shapes import SHAPES

V1_MOUNTS = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup {mount} cgroup rw,relatime,memory 0 0\n"
V2_MOUNTS = "proc /proc proc rw 0 0\ncgroup2 {mount} cgroup2 rw,relatime 0 0\n"


def test_version_1_groups_are_made_below_the_own_one(tmp_path: Path) -> None:
    (tmp_path / "job" / "7").mkdir(parents=True)
    parent = limiter.find_parent(V1_MOUNTS.format(mount=tmp_path), "5:cpu,cpuacct:/\n4:memory:/job/7\n0::/\n")
    assert parent == limiter.Parent(1, tmp_path / "job" / "7")


def test_a_group_that_the_container_does_not_see_is_the_mount_itself(tmp_path: Path) -> None:
    parent = limiter.find_parent(V1_MOUNTS.format(mount=tmp_path), "4:memory:/docker/abc\n")
    assert parent == limiter.Parent(1, tmp_path)


def test_version_2_groups_are_made_where_memory_is_handed_on(tmp_path: Path) -> None:
    own = tmp_path / "user.slice" / "shell.scope"
    own.mkdir(parents=True)
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    (own.parent / "cgroup.subtree_control").write_text("cpu memory pids\n")
    (own / "cgroup.subtree_control").write_text("\n")
    memberships = "0::/user.slice/shell.scope\n"
    assert limiter.find_parent(V2_MOUNTS.format(mount=tmp_path), memberships) == limiter.Parent(2, own.parent)


@pytest.mark.parametrize("mounts", ["proc /proc proc rw 0 0\n", V2_MOUNTS])
def test_where_memory_cannot_be_limited_the_reason_is_told(tmp_path: Path, mounts: str) -> None:
    with pytest.raises(limiter.NoLimiterError, match=r"no cgroup|no group from .* has memory"):
        limiter.find_parent(mounts.format(mount=tmp_path), "0::/\n")


def test_a_group_that_cannot_be_made_is_an_error_with_its_path(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with (
        pytest.raises(limiter.NoLimiterError, match=r"missing/edgert-benchmark-\d+: No such file"),
        limiter.limited(limiter.Parent(2, missing), 2**30),
    ):
        pass


def test_the_read_ahead_is_that_of_the_disk_of_a_partition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    partition = tmp_path / "devices" / "vda" / "vda1"
    partition.mkdir(parents=True)
    (tmp_path / "dev" / "block").mkdir(parents=True)
    (tmp_path / "dev" / "block" / name).symlink_to(partition)
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


@pytest.mark.parametrize("shape", side_by_side.LLAMA_SHAPES)
def test_the_peer_has_as_many_weights_as_the_shape(shape: str) -> None:
    config = SHAPES[shape]
    experts = sum(
        int(np.prod(dimensions)) for name, dimensions in gguf_shape.matrices(config) if "_exps" in name
    )
    width = gguf_shape.expert_width(config)
    layers = config["num_hidden_layers"] * config["num_experts"]
    assert experts == 3 * layers * width * config["hidden_size"]


def test_random_q4_0_has_the_deviation_asked_for_and_no_mean() -> None:
    packed = gguf_shape.random_q4_0(256, 512, 0.02, np.random.default_rng(0)).reshape(
        -1, gguf_shape.BLOCK_BYTES
    )
    scales = packed[:, :2].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([packed[:, 2:] & 15, packed[:, 2:] >> 4], axis=1).astype(np.float32) - 8
    values = scales * codes
    assert values.std() == pytest.approx(0.02, rel=0.01)
    assert abs(values.mean()) < 0.0005


def measured(prefill: float, decode: float) -> dict[str, Any]:
    phases = {"prefill": prefill, "decode": decode}
    return {
        phase: {"tokens_per_s": speed, "bytes_read_per_token": 3e6} for phase, speed in phases.items()
    } | {"others_busy": 0.0}


def test_a_row_is_the_median_of_its_rounds() -> None:
    row = side_by_side.row("edgert", None, [measured(10, 1), measured(30, 5), measured(20, 4)])
    assert row["prefill"]["tokens_per_s"] == 20
    assert row["decode"] == {"tokens_per_s": 4, "spread": 1.0, "bytes_read_per_token": 3e6}


def test_the_table_divides_by_the_peer_of_the_same_memory_and_says_what_was_not_measured() -> None:
    table = side_by_side.markdown(
        [
            side_by_side.row("llama.cpp", None, [measured(100, 50)]),
            side_by_side.row("edgert", None, [measured(350, 60)]),
            {"peer": "llama.cpp", "share": 0.5, "failed": "killed by the memory limit"},
            side_by_side.row("edgert", 0.5, [measured(80, 10)]),
        ],
        512,
        64,
    ).splitlines()[2:]
    assert table == [
        "| all | llama.cpp | 100.00 | 0.0% | 50.00 | 0.0% | 3 |  |",
        "| all | edgert | 350.00 | 0.0% | 60.00 | 0.0% | 3 | 3.50 / 1.20 |",
        "| 50% | llama.cpp | killed by the memory limit | | | | | |",
        "| 50% | edgert | 80.00 | 0.0% | 10.00 | 0.0% | 3 |  |",
    ]


def test_other_processes_are_counted_apart_from_the_children() -> None:
    others = machine.Others()
    side_by_side.run([sys.executable, "-c", "print('{}')"])
    assert 0 <= others.processors() <= (os.cpu_count() or 1) + 1


def test_a_peer_that_fails_is_quoted() -> None:
    with pytest.raises(side_by_side.PeerError, match=r"^cannot load it$"):
        side_by_side.run(["sh", "-c", "echo first >&2; echo cannot load it >&2; exit 1"])
