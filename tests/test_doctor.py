"""edgert doctor: each thing that a machine can lack is named, with what mends it."""

from pathlib import Path

import pytest
from machines import FakeMachine
from shell import Shell

from edgert.doctor import Finding, examine


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    made = FakeMachine(tmp_path)
    made.write("proc/swaps", "Filename Type Size Used Priority")
    made.write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")
    made.write("proc/sys/vm/overcommit_memory", "0")
    return made


def of(machine: FakeMachine, name: str) -> Finding:
    return next(finding for finding in examine(machine.root) if finding.name == name)


def test_a_whole_machine_lacks_nothing(machine: FakeMachine) -> None:
    lacking = [finding for finding in examine(machine.root) if not finding.good]
    assert {finding.name for finding in lacking} <= {"io_uring"}  # what a sandbox may forbid


def test_a_raspberry_pi_as_it_boots(machine: FakeMachine) -> None:
    machine.write("proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0")
    machine.remove("proc/pressure")
    machine.remove("sys/fs/cgroup")
    machine.write("proc/self/mountinfo", "")
    assert "cgroup_enable=memory" in of(machine, "memory cgroup").fix
    assert "cmdline.txt" in of(machine, "pressure (PSI)").fix
    assert "kernel_2712.img" in of(machine, "page size").fix


@pytest.mark.parametrize(
    ("file", "text", "name", "fix"),
    [
        ("proc/swaps", "Filename\n/swapfile file 1000 0 -2", "swap", "vm.swappiness=10"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]", "huge pages", "madvise"),
        ("sys/devices/system/cpu/cpufreq/policy0/scaling_governor", "powersave", "frequency governor", "schedutil"),
        ("proc/sys/vm/overcommit_memory", "2", "overcommit", "vm.overcommit_memory=0"),
        ("proc/meminfo", "MemTotal: 4000 kB\nMemAvailable: 100 kB", "available memory", "ps "),
        ("proc/pressure/memory", None, "pressure (PSI)", "psi=1"),
        ("sys/class/thermal", None, "temperature", "modprobe"),
    ],
)  # fmt: skip
def test_what_is_lacking_is_named_with_the_line_that_mends_it(
    machine: FakeMachine, file: str, text: str | None, name: str, fix: str
) -> None:
    assert of(machine, name).good
    if text is None:
        machine.remove(file)
    else:
        machine.write(file, text)
    found = of(machine, name)
    assert not found.good
    assert found.why
    assert fix in found.fix


def test_bundles_on_an_sd_card(machine: FakeMachine, tmp_path: Path) -> None:
    import os

    number = os.stat(tmp_path).st_dev
    disk = machine.root / "sys/block/mmcblk0"
    (disk / "device").mkdir(parents=True)
    (disk / "device/type").write_text("SD\n")
    link = machine.root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    link.parent.mkdir(parents=True)
    (disk / "mmcblk0p2").mkdir()
    (disk / "mmcblk0p2/partition").write_text("2\n")
    link.symlink_to(disk / "mmcblk0p2")
    found = next(f for f in examine(machine.root, tmp_path) if f.name == "storage of the bundles")
    assert (found.good, "EDGERT_HOME" in found.fix) == (False, True)
    (disk / "device/type").write_text("MMC\n")
    assert next(f for f in examine(machine.root, tmp_path) if f.name == "storage of the bundles").good


def test_the_command(edgert: Shell) -> None:
    done = edgert("doctor")
    assert done.returncode == 0
    assert "memory cgroup" in done.stdout
    assert {"name", "found", "why", "fix", "good"} == set(edgert.json("doctor")[0])
