"""What is sensed of a machine, and that what is gone or lies is told from what is known."""

import math
import os
from pathlib import Path

import pytest
from machines import GIB, FakeMachine

from edgert.signals import Machine, Sensors


class Ticks:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture(params=[1, 2])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path, cgroup=request.param)


def test_every_signal_of_a_whole_machine(machine: FakeMachine) -> None:
    sensors = Sensors(machine.root, Ticks())
    first = sensors.read()
    assert first.available_bytes.value == 3 * GIB  # of the group above: 4 GiB, 1 used
    assert sensors.memory.bound() == 4 * GIB
    assert (first.temperature_celsius.value, first.headroom_celsius.value) == (50, 30)
    assert (first.frequency.value, first.on_battery.value, first.charge.value) == (0.75, 0, 0.9)
    assert not first.memory_pressure.there  # a total says nothing before the second
    machine.pressure("memory", 0.25)
    machine.stat(40)
    second = sensors.read()
    assert second.memory_pressure.value == pytest.approx(0.25)
    assert second.major_faults_per_s.value == 40
    assert second.io_pressure.value == 0


def test_page_cache_that_can_go_counts_as_available(machine: FakeMachine) -> None:
    machine.group("box", 4 * GIB, 3 * GIB, cache=2 * GIB)
    assert Sensors(machine.root).read().available_bytes.value == 3 * GIB


def test_a_limit_that_is_lowered_is_seen_at_once(machine: FakeMachine) -> None:
    sensors = Sensors(machine.root)
    for limit in (3, 2):
        machine.group("box", limit * GIB, GIB)
        assert sensors.available().value == (limit - 1) * GIB
    machine.group("box/app", GIB // 2, GIB)  # below what is used
    assert sensors.available().value == 0


def test_a_machine_without_any_of_it(tmp_path: Path) -> None:
    found = Sensors(tmp_path).read()
    for name in Machine.__slots__:
        if name not in ("t", "cores"):
            reading = getattr(found, name)
            assert (reading.there, math.isnan(reading.value)) == (False, True), name
    assert found.cores >= 1


@pytest.mark.parametrize("lie", ["-5", "99999999999", "", "warm", "nan", "inf"])
def test_a_temperature_that_cannot_be_is_missing_and_the_rest_a_lower_bound(
    machine: FakeMachine, lie: str
) -> None:
    sensors = Sensors(machine.root)
    assert sensors.read().temperature_celsius.quality == "exact"
    machine.write("sys/class/thermal/thermal_zone1/temp", lie if lie != "-5" else "-50000")
    found = sensors.read().temperature_celsius
    assert (found.value, found.quality) == (50, "at-least")
    machine.remove("sys/class/thermal/thermal_zone0/temp")
    # An open file of sysfs that is gone answers with an error; a plain file does not, so it is opened anew.
    assert Sensors(machine.root).read().temperature_celsius.quality == "missing"


def test_a_temperature_that_has_moved_and_then_stands_still_is_not_believed_for_ever(
    machine: FakeMachine,
) -> None:
    sensors = Sensors(machine.root)
    sensors.read()
    for zone in (0, 1):
        machine.temperature(zone, 60)
    qualities = [sensors.read().temperature_celsius.quality for _ in range(300)]
    assert qualities[0] == "exact"
    assert qualities[-1] == "missing"
    machine.temperature(0, 61)
    assert sensors.read().temperature_celsius.value == 61


def test_totals_that_go_back_or_leap_are_missing(machine: FakeMachine) -> None:
    sensors = Sensors(machine.root, Ticks())
    seen = []
    for total in (5, 4, 4.5, 100, -3, 5):
        machine.pressure("memory", total)
        seen.append(sensors.read().memory_pressure.there)
    assert seen == [False, False, True, False, False, False]


def test_memory_of_which_a_source_has_gone_may_be_less_than_what_is_left_says(machine: FakeMachine) -> None:
    sensors = Sensors(machine.root)
    assert sensors.read().available_bytes.quality == "exact"
    machine.write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 99999999 kB")  # more than there is
    found = sensors.read().available_bytes
    assert (found.value, found.quality) == (3 * GIB, "at-least")


def test_what_changes_slowly_is_read_seldom_and_says_how_old_it_is(machine: FakeMachine) -> None:
    ticks = Ticks()
    sensors = Sensors(machine.root, ticks)
    assert (sensors.read().charge.value, sensors.read().charge.age) == (0.9, 1.0)
    machine.battery("Discharging", 40)
    ages = []
    while (found := sensors.read()).charge.value == 0.9:
        assert (found.on_battery.value, found.on_battery.age) == (0, found.charge.age)
        ages.append(found.charge.age)
    assert ages == [2.0, 3.0, 4.0]
    assert (found.on_battery.value, found.charge.value, found.charge.age) == (1, 0.4, 0)
    machine.remove("sys/class/power_supply/BAT0")
    later = Sensors(machine.root, ticks).read()
    assert not later.charge.there


@pytest.mark.parametrize(
    ("quota", "most"), [("250000 100000", 2), ("50000 100000", 1), ("max 100000", 10**6)]
)
def test_whole_cores_of_a_quota_as_it_changes(machine: FakeMachine, quota: str, most: int) -> None:
    if machine.cgroup == 1:
        machine.write("proc/self/cgroup", "4:cpu:/box/app\n")
        machine.write("proc/self/mountinfo", "30 1 0:1 / /sys/fs/cgroup rw - cgroup cgroup rw,cpu\n")

    def grant(words: str) -> None:
        of_first = words.replace("max", "-1").split()
        machine.write("sys/fs/cgroup/box/cpu.cfs_quota_us", of_first[0])
        machine.write("sys/fs/cgroup/box/cpu.cfs_period_us", of_first[1])
        machine.write("sys/fs/cgroup/box/cpu.max", words)

    grant("max 100000")
    sensors = Sensors(machine.root)
    all_of_them = sensors.read().cores
    assert all_of_them == len(os.sched_getaffinity(0))
    grant(quota)
    assert sensors.read().cores == min(all_of_them, most)
    grant("max 100000")
    assert sensors.read().cores == all_of_them


def test_a_file_that_appears_later_is_found(machine: FakeMachine) -> None:
    machine.remove("proc/meminfo")
    sensors = Sensors(machine.root)
    machine.group("box", None, GIB)
    machine.meminfo(2 * GIB)
    assert [sensors.available().there for _ in range(30)][-1]
