"""A model under disturbances: fixed settings, baselines and the fast/slow law side by side in one run.

    EDGERT_HOME=... python benchmarks/disturbances.py --json disturbances.json

Every setting meets every script of disturbance_scripts.py in a process and in cgroups of its own. A violation is a window whose
p95 of a token's time is above 1.3 times the median of those of the undisturbed run with all memory and all cores; a window
without a token, or after the process was killed, is one. The best fixed setting is one for all scripts.
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import limiter
import machine
from disturbance_scripts import MIB, SCRIPTS, Script, World

from edgert.bundle import locate
from edgert.footprint import memory_needs
from edgert.shapes import shape_bundle
from edgert.units import parse_bytes

_WORKER = Path(__file__).with_name("disturbed.py")
_VIOLATION = 1.3
_INTERPRETER = 96 * MIB  # of the worker, beside the budget


@dataclass(frozen=True)
class Case:
    """A model, how much it gets, and how long a script is."""

    name: str
    bundle: Path
    memory: int
    seconds: float
    window_ms: float
    high_ms: float = 1000.0


@dataclass(frozen=True)
class Setting:
    name: str
    share: float = 1.0  # of the memory
    threads: int = 2
    law: str = "none"


def grid(threads: int) -> list[Setting]:
    counts = sorted({1, threads})
    fixed = [
        Setting(f"fixed {share:.0%}, {count} thread{'s' * (count > 1)}", share, count)
        for share in (1.0, 0.7, 0.45) for count in counts
    ]  # fmt: skip
    laws = [Setting(law, 1.0, threads, law) for law in ("aimd", "pi", "fast-slow")]
    return fixed + laws


def run(case: Case, script: Script, setting: Setting, log: Path | None = None) -> dict[str, Any]:
    """The windows of one run, and whether it was killed."""
    limit = round(case.memory * 1.15) + _INTERPRETER
    disk = None
    with contextlib.suppress(limiter.NoLimiterError):
        disk = limiter.disk_number(case.bundle)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_root(root)
        groups = stack.enter_context(_groups(limit))
        command = [
            sys.executable, str(_WORKER), str(case.bundle), "--memory", str(round(case.memory * setting.share)),
            "--threads", str(setting.threads), "--law", setting.law, "--seconds", str(case.seconds),
            "--window-ms", str(case.window_ms), "--high-ms", str(case.high_ms), "--root", str(root),
            *(["--log", str(log)] if log else []),
        ]  # fmt: skip
        worker = subprocess.Popen(groups.command(command), stdout=subprocess.PIPE, text=True)
        world = World(groups, worker.pid, limit, case.memory, disk, root)
        try:
            return _watch(worker, world, case, script)
        finally:
            world.end()
            worker.kill()
            worker.wait()


def _watch(worker: "subprocess.Popen[str]", world: World, case: Case, script: Script) -> dict[str, Any]:
    assert worker.stdout is not None
    if not worker.stdout.readline():
        return {"windows": [], "killed": worker.wait() == -9, "failed": True}
    began = time.monotonic()

    def play() -> None:
        for at, act in sorted(script.acts, key=lambda act: act[0]):
            if world.ended.wait(max(0.0, began + at * case.seconds - time.monotonic())):
                return
            act(world)

    acts = threading.Thread(target=play)
    acts.start()
    windows = [json.loads(line) for line in worker.stdout]
    status = worker.wait()
    world.ended.set()
    acts.join()
    return {"windows": windows, "killed": status == -9, "failed": status not in (0, -9)}


@contextlib.contextmanager
def _groups(limit: int) -> Iterator[limiter.Groups]:
    """Cgroups with the memory limit and, where it can be had, controllers for the disk and the cores."""
    mounts, memberships = Path("/proc/self/mounts").read_text(), Path("/proc/self/cgroup").read_text()
    parents = limiter.find_parents(mounts, memberships, ["memory"])
    with limiter.limited(parents, limiter.Limits(memory=limit)) as groups:
        made = list(groups.paths)
        try:
            for controller in ("blkio", "cpu"):
                path = Path("/sys/fs/cgroup") / controller / f"edgert-benchmark-{os.getpid()}"
                if parents[0].version == limiter.CGROUP_VERSION_1 and path.parent.is_dir():
                    path.mkdir(exist_ok=True)
                    made.append(path)
            yield limiter.Groups(tuple(made))
        finally:
            for path in made[len(groups.paths) :]:
                limiter.remove(path)


def make_root(root: Path) -> None:
    """The machine's own /proc and cgroups, with a thermal zone that the scripts can write."""
    (root / "sys/fs").mkdir(parents=True)
    (root / "proc").symlink_to("/proc")
    (root / "sys/fs/cgroup").symlink_to("/sys/fs/cgroup")
    zone = root / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    for name, text in (
        ("type", "cpu"), ("temp", "55000"), ("trip_point_0_type", "passive"), ("trip_point_0_temp", "80000"),
    ):  # fmt: skip
        (zone / name).write_text(text + "\n")


def judge(found: dict[str, Any], case: Case, normal_ms: float) -> dict[str, Any]:
    windows = found["windows"]
    bad = [w for w in windows if not w["tokens"] or w["p95_ms"] > _VIOLATION * normal_ms]
    # A window ends with its last token, so slow ones are fewer and longer: what counts is their time.
    length = case.window_ms / 1000
    over = sum(max(1, round(w["seconds"] / length)) for w in bad)
    ran = windows[-1]["t"] + windows[-1]["seconds"] if windows else 0.0
    lost = max(0, round((case.seconds - ran) / length)) if found["killed"] or found["failed"] else 0
    stores = [w["store"] for w in windows]
    return {
        "violations": min(over + lost, max(1, round(case.seconds / length))),
        "windows": max(1, round(case.seconds / length)),
        "tokens_per_s": sum(w["tokens"] for w in windows) / case.seconds,
        "slow_moves": sum(a != b for a, b in pairwise(stores)),
        "killed": found["killed"],
        "failed": found["failed"],
    }


def cases(words: argparse.Namespace) -> list[Case]:
    chosen = []
    if "docs-moe" in words.models:
        path = Path(locate(None))
        from edgert.bundle import Bundle

        chosen.append(
            Case("docs-moe", path, memory_needs(Bundle.open(path))["resident_bytes"] + 4 * MIB, 2.4, 100)
        )
    if "olmoe-1b-7b" in words.models:
        chosen.append(Case("olmoe-1b-7b", shape_bundle("olmoe-1b-7b"), words.memory, 5.0, 250))
    return [replace(case, seconds=words.seconds or case.seconds) for case in chosen]


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=("docs-moe", "olmoe-1b-7b"), default=("docs-moe", "olmoe-1b-7b")
    )
    parser.add_argument("--scripts", nargs="+", default=(), help="parts of their names (all)")
    parser.add_argument("--settings", nargs="+", default=(), help="parts of their names (all)")
    parser.add_argument("--memory", type=parse_bytes, default=2 << 30, help="of the larger model (2GiB)")
    parser.add_argument("--seconds", type=float, help="of a script")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the laws' records there")
    return parser.parse_args(words)


def measure(words: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in cases(words):
        small = case.memory < 256 * MIB
        scripts = [s for s in SCRIPTS if (s.small if small else s.large) and _wanted(s.name, words.scripts)]
        chosen = [s for s in grid(os.cpu_count() or 1) if _wanted(s.name, words.settings)]
        first = grid(os.cpu_count() or 1)[1 if (os.cpu_count() or 1) > 1 else 0]
        calm = run(case, SCRIPTS[0], first)["windows"]
        normal = statistics.median(window["p95_ms"] for window in calm)
        for script in scripts:
            for setting in chosen:
                log = None
                if words.logs and setting.law != "none":
                    log = (
                        words.logs
                        / f"{case.name}-{script.name.replace(' ', '-').replace('/', '')}-{setting.name}.jsonl"
                    )
                found = run(case, script, setting, log)
                row = {
                    "model": case.name,
                    "script": script.name,
                    "setting": setting.name,
                    "normal_ms": normal,
                }
                yield {**row, **judge(found, case, normal), "series": found["windows"]}


def _wanted(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part in name for part in parts)


def table(rows: list[dict[str, Any]]) -> str:
    """Violations by script and setting, with k where the process was killed; then the sums."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        names = list(dict.fromkeys(row["setting"] for row in own))
        lines += [
            "",
            f"{model}: windows out of bounds (k: killed), bound {_VIOLATION} x {own[0]['normal_ms']:.2f} ms",
            "",
        ]
        lines += [f"| script | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
        for script in dict.fromkeys(row["script"] for row in own):
            cells = [_cell(row) for row in own if row["script"] == script]
            lines.append(f"| {script} | {' | '.join(cells)} |")
        for title, key, form in (
            ("**violations**", "violations", "{:.0f}"), ("**killed**", "killed", "{:.0f}"),
            ("**slow moves**", "slow_moves", "{:.0f}"), ("**tokens/s, mean**", "tokens_per_s", "{:.1f}"),
        ):  # fmt: skip
            sums = [[row[key] for row in own if row["setting"] == name] for name in names]
            cells = [form.format(statistics.mean(s) if key == "tokens_per_s" else sum(s)) for s in sums]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['violations']} of {row['windows']}" + (
        " k" if row["killed"] else " failed" if row["failed"] else ""
    )


def main() -> None:
    words = arguments_of()
    if words.logs:
        shutil.rmtree(words.logs, ignore_errors=True)
        words.logs.mkdir(parents=True)
    rows = []
    for row in measure(words):
        rows.append(row)
        print(
            row["model"],
            row["script"],
            row["setting"],
            _cell(row),
            f"{row['tokens_per_s']:.1f} tok/s",
            file=sys.stderr,
            flush=True,
        )
    report = {"date": datetime.date.today().isoformat(), "machine": machine.describe(), "rows": rows}
    if words.json:
        words.json.write_text(json.dumps(report) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
