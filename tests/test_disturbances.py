"""The disturbance benchmark's own parts: how it judges, and a real competitor in a cgroup where one can be made."""

import contextlib
import errno
from argparse import Namespace
from pathlib import Path

import disturbances
import limiter
import pytest
from disturbance_scripts import MIB, SCRIPTS, World
from disturbances import Case, Setting

CASE = Case("m", Path("bundle"), 1 << 30, 4.0, 250)


def window(
    t: float, p95_ms: float, tokens: int = 5, seconds: float = 0.25, store: int = 7
) -> dict[str, float]:
    return {"t": t, "tokens": tokens, "p95_ms": p95_ms, "seconds": seconds, "store": store, "threads": 2}


def test_windows_over_the_bound_count_by_their_length_and_those_after_a_kill_too() -> None:
    windows = [
        window(0, 10),
        window(0.25, 14),
        window(0.5, 900, tokens=1, seconds=0.9),
        window(1.4, 12, store=5),
    ]
    calm = disturbances.judge({"windows": windows, "killed": False, "failed": False}, CASE, 10.0)
    assert (calm["violations"], calm["windows"], calm["slow_moves"]) == (1 + 4, 16, 1)
    killed = disturbances.judge({"windows": windows[:2], "killed": True, "failed": False}, CASE, 10.0)
    assert killed["violations"] == 1 + 14
    nothing = disturbances.judge({"windows": [], "killed": True, "failed": True}, CASE, 10.0)
    assert nothing["violations"] == 16


def test_the_table_has_every_setting_and_says_who_was_killed() -> None:
    rows = [
        {"model": "m", "script": script.name, "setting": setting.name, "normal_ms": 10.0, "violations": 3, "windows": 16,
         "tokens_per_s": 9.5, "slow_moves": 2, "killed": setting.law == "none", "failed": False}
        for script in SCRIPTS for setting in disturbances.grid([1, 2])
    ]  # fmt: skip
    text = disturbances.table(rows)
    assert "3 of 16 k" in text
    assert (
        "Best fixed setting: 100%, 1 thread. fast-slow has 1.00 times its violations and 100% of its" in text
    )
    assert f"| **violations** | {' | '.join([str(3 * len(SCRIPTS))] * 9)} |" in text


def test_there_are_scripts_enough_for_each_model() -> None:
    assert len({script.name for script in SCRIPTS}) == len(SCRIPTS) >= 20
    assert sum(script.large for script in SCRIPTS) >= 20
    assert all(0 <= at < 1 for script in SCRIPTS for at, _ in script.acts)
    assert len(disturbances.arguments_of(["--models", "docs-moe"]).models) == 1


def test_sensors_of_a_script_can_be_written(tmp_path: Path) -> None:
    disturbances.make_root(tmp_path)
    world = World(limiter.Groups(()), 0, 0, 0, None, tmp_path)
    world.temperature(71.5)
    assert (tmp_path / "sys/class/thermal/thermal_zone0/temp").read_text() == "71500\n"
    world.lose_sensors()
    assert (tmp_path / "sys/class/thermal/thermal_zone0/temp").read_text() == ""


def test_a_limit_that_the_kernel_refuses_is_held_by_a_competitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.limit_in_bytes"
    limit.write_text(str(1000 * MIB))
    write, taken = Path.write_text, list[int]()

    def refuse(path: Path, text: str) -> int:
        if path == limit and int(text) < 900 * MIB:  # what is in use
            raise OSError(errno.EBUSY, "Device or resource busy")
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(World, "take", lambda self, mib, pieces: taken.append(mib))
    world = World(limiter.Groups((tmp_path,)), 0, 0, 0, None, tmp_path)
    for mib in (800, 600, 1000, 700):
        world.memory_limit(mib * MIB)
    assert taken == [200, 200, 300]  # and after the third it ended
    assert limit.read_text() == str(1000 * MIB)


def test_beside_a_competitor_in_the_same_cgroup_nothing_is_killed() -> None:
    """On a kernel and with rights that let a cgroup be made. How far the store shrinks depends on what the interpreters take
    there; that it does is shown with files in place of a kernel, in test_controlling."""
    (case,) = disturbances.cases(Namespace(models=["docs-moe"], seconds=2.0, memory=None))
    script = next(s for s in SCRIPTS if s.name == "memory: a third of the budget, and back")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(disturbances._groups(256 * MIB))
        except (limiter.NoLimiterError, OSError) as error:
            pytest.skip(f"no cgroup can be made here: {error}")
    found = disturbances.run(case, script, Setting("fast-slow", 1.0, 2, "fast-slow"))
    assert (found["killed"], found["failed"]) == (False, False)
    assert found["windows"]
