"""Device profiles: those that come with edgert, what a profile may say, and which one resembles a machine."""

from pathlib import Path

import pytest

from edgert import _native
from edgert.devices import PROFILES, Machine, device_names, load_device, resemble, this_machine
from edgert.errors import InvalidArgumentError, NotFoundError

GIB = 1 << 30


def profile(directory: Path, old: str = "", new: str = "") -> Path:
    """A copy of a good profile with `old` replaced by `new`."""
    text = (PROFILES / "raspberry-pi-5.toml").read_text(encoding="utf-8")
    assert old in text
    path = directory / "raspberry-pi-5.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", device_names())
def test_profile_loads_and_gives_the_source_of_every_figure(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    assert device.memory.total_mib > (device.bundle.memory_mib or 0)
    assert device.storage.random_read_mb_per_s <= device.storage.sequential_read_mb_per_s
    assert device.bounds.temperature_high_celsius < device.thermal.throttle_celsius
    for line in (PROFILES / f"{name}.toml").read_text(encoding="utf-8").splitlines():
        if line.startswith(("sequential", "random", "bandwidth", "throttle", "critical")):
            assert "#" in line


def test_profiles_that_the_project_promises() -> None:
    promised = {"generic-x86-64", "laptop", "raspberry-pi-5", "jetson-orin-nano", "phone"}
    assert promised <= set(device_names())


def test_profile_of_ones_own_is_given_by_path(tmp_path: Path) -> None:
    assert load_device(profile(tmp_path)).cpu.cores == 4
    assert load_device(profile(tmp_path, "memory_mib = 6144", "")).bundle.memory_mib is None


@pytest.mark.parametrize("name", ["toaster", "../devices/phone", "", "a\nb"])
def test_unknown_device_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(NotFoundError, match="raspberry-pi-5"):
        load_device(name)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="mine.toml"):
        load_device(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            "total_mib = 8192",
            "total_gib = 8",
            r"memory\.total_gib is unknown; did you mean memory\.total_mib\?",
        ),
        ("[thermal]", "[thermal]\nfan = true", r"key thermal\.fan is unknown; known are throttle_celsius"),
        ("[thermal]", "[heat]", r"key heat is unknown"),
        ("cores = 4", "", r"key cpu\.cores is missing"),
        ("cores = 4", "cores = 4.5", r"key cpu\.cores: found 4\.5, allowed is a whole number from 1 to 1024"),
        ("cores = 4", "cores = true", r"key cpu\.cores: found True"),
        ("cores = 4", "cores = 0", r"key cpu\.cores: found 0"),
        ("= 17000", "= nan", r"key memory\.bandwidth_mb_per_s: found nan"),
        ("= 17000", "= '17 GB/s'", r"key memory\.bandwidth_mb_per_s: found '17 GB/s', allowed is a number"),
        (
            'arch = "aarch64"',
            'arch = "arm"',
            r"key cpu\.arch: found 'arm', allowed is one of x86_64, aarch64",
        ),
        (
            'dense_format = "int8"',
            'dense_format = "q4_k"',
            r"key bundle\.dense_format: found 'q4_k'",
        ),
        (
            'expert_format = "int4"',
            'expert_format = "int5"',
            r"key bundle\.expert_format: found 'int5'.*int4",
        ),
        ('isa = "neon"', 'isa = "auto"', r"key cpu\.isa: found 'auto'"),
        (
            "alignment_bytes = 16384",
            "alignment_bytes = 5000",
            r"bundle\.alignment_bytes: found 5000, .* power of two",
        ),
        (
            "throttle_celsius = 80",
            "throttle_celsius = 90",
            r"thermal\.throttle_celsius: found 90, .* less than 85",
        ),
        ('boards = ["Raspberry Pi 5"', 'boards = [""', r"key boards: .*a list of words"),
        ('name = "raspberry-pi-5"', 'name = "other"', r"key name: found 'other'"),
        ('name = "raspberry-pi-5"', 'name = "raspberry-pi-5', r"not TOML"),
        ("[cpu]", "cpu = 1\n[cpu2]", r"key cpu"),
        ("[cpu]", "#" * 70_000 + "\n[cpu]", r"larger than"),
    ],
)
def test_profile_that_breaks_the_rules_is_refused_with_file_and_key(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    path = profile(tmp_path, old, new)
    with pytest.raises(InvalidArgumentError, match=complaint) as refusal:
        load_device(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (Machine("aarch64", 4, 4 * GIB, "Raspberry Pi 5 Model B Rev 1.0"), "raspberry-pi-5"),
        (
            Machine("aarch64", 6, 8 * GIB, "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit"),
            "jetson-orin-nano",
        ),
        (Machine("aarch64", 8, 8 * GIB, ""), "phone"),
        (Machine("x86_64", 16, 32 * GIB, ""), "laptop"),
        (Machine("x86_64", 2, 2 * GIB, ""), "generic-x86-64"),
        (Machine("riscv64", 4, 8 * GIB, ""), "generic-x86-64"),
    ],
)
def test_machine_resembles_its_own_board_or_the_nearest_of_its_architecture(
    machine: Machine, name: str
) -> None:
    assert resemble(machine).name == name


def test_this_machine_resembles_a_profile() -> None:
    assert this_machine().cores == _native.usable_cores()
    assert this_machine().memory_bytes > 0
    assert resemble().name in device_names()
