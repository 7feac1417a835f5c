"""A model under disturbances: fixed settings, baselines and the fast/slow law side by side in one run.

    EDGERT_HOME=... python benchmarks/disturbances.py --json disturbances.json [--for 100]

Every setting meets every script of disturbance_scripts.py in a process and in cgroups of its own. A violation is a window whose
p95 of a token's time is above 1.3 times the median of those of undisturbed runs with all memory, with one thread or with all of
them, whichever is slower (so that no full setting breaks the bound while nothing happens); a window without a token, or after
the process was killed, is one. The best fixed setting is one for all scripts.

It may be run in parts: a script whose settings are all in the file is not run again, and none begins after --for seconds. The
settings of a script run one after another in one part, beside undisturbed runs of that part. A run during which others took
more than a twentieth of the processors is made again, whatever it showed.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
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
_CALM, _REPEATS = 0.05, 2  # of the processors may others use in a run, or it is made again, at most so often
_INTERPRETER = 96 * MIB  # of the worker, beside the budget


@dataclass(frozen=True)
class Case:
    """A model, how much it gets, and how long a script is."""

    name: str
    bundle: Path
    memory: int
    seconds: float
    window_ms: float
    calm_runs: int = 1
    high_ms: float = 1000.0


@dataclass(frozen=True)
class Setting:
    name: str
    share: float = 1.0  # of the memory
    threads: int = 2
    law: str = "none"


def thread_counts() -> list[int]:
    return sorted({1, os.cpu_count() or 1})


def grid(counts: Sequence[int]) -> list[Setting]:
    fixed = [
        Setting(f"fixed {share:.0%}, {count} thread{'s' * (count > 1)}", share, count)
        for share in (1.0, 0.7, 0.45) for count in counts
    ]  # fmt: skip
    laws = [Setting(law, 1.0, counts[-1], law) for law in ("aimd", "pi", "fast-slow")]
    return fixed + laws


def run(case: Case, script: Script, setting: Setting, log: Path | None = None) -> dict[str, Any]:
    """The windows of one run, and whether it was killed."""
    limit = round(case.memory * 1.15) + _INTERPRETER
    disk = None
    with contextlib.suppress(limiter.NoLimiterError):
        disk = limiter.disk_number(case.bundle)
    idle = _Outside()
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
        world = World(groups, worker.pid, limit, case.memory, disk, root, case.seconds)
        try:
            found = _watch(worker, world, case, script)
        finally:
            world.end()
            worker.kill()
            worker.wait()
    return {**found, "outside": idle.share()}


class _Outside:
    """What of the processors went to what is no part of the benchmark, since it was made."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy_s(), _own_s()

    def share(self) -> float:
        all_of_it = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return max(0.0, (_busy_s() - self._busy) - (_own_s() - self._own)) / all_of_it


def _busy_s() -> float:
    """Of all processors together: user, nice, system, interrupts, and what the machine's host took."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(fields[at]) for at in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


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
            Case(
                "docs-moe",
                path,
                memory_needs(Bundle.open(path))["resident_bytes"] + 4 * MIB,
                2.0,
                100,
                calm_runs=2,
            )
        )
    if "olmoe-1b-7b" in words.models:
        chosen.append(Case("olmoe-1b-7b", shape_bundle("olmoe-1b-7b"), words.memory, 4.0, 200))
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
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="add what is found to this file's, and show all of it"
    )
    parser.add_argument(
        "--for",
        type=float,
        default=math.inf,
        dest="part",
        metavar="SECONDS",
        help="no script begins after it",
    )
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the laws' records there")
    return parser.parse_args(words)


def measure(words: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of one script after another that are not all known yet."""
    ends = time.monotonic() + words.part
    settings = [setting for setting in grid(thread_counts()) if _wanted(setting.name, words.settings)]
    for case in cases(words):
        found = {(row["script"], row["setting"]) for row in known if row["model"] == case.name}
        small = case.memory < 256 * MIB
        scripts = [
            script
            for script in SCRIPTS
            if (script.small if small else script.large)
            and _wanted(script.name, words.scripts)
            and not {(script.name, setting.name) for setting in settings} <= found
        ]
        normal = math.nan
        for script in scripts:
            if time.monotonic() >= ends:
                return
            if math.isnan(normal):
                normal = usual_ms(case)
            yield [_row(case, script, setting, normal, words.logs) for setting in settings]


def calmest(case: Case, script: Script, setting: Setting, log: Path | None = None) -> dict[str, Any]:
    """run() again, where others used the processors meanwhile: whatever it showed."""
    found = run(case, script, setting, log)
    for _ in range(_REPEATS):
        if found["outside"] <= _CALM:
            break
        found = min(found, run(case, script, setting, log), key=lambda one: one["outside"])
    return found


def usual_ms(case: Case) -> float:
    """The median p95 of undisturbed runs with all memory, with the number of threads that is the slower one."""
    medians = []
    for threads in thread_counts():
        runs = [calmest(case, SCRIPTS[0], Setting("all", 1.0, threads)) for _ in range(case.calm_runs)]
        medians.append(statistics.median(float(w["p95_ms"]) for one in runs for w in one["windows"]))
    return max(medians)


def _row(case: Case, script: Script, setting: Setting, normal: float, logs: Path | None) -> dict[str, Any]:
    log = None
    if logs and setting.law != "none":
        log = logs / f"{case.name}-{re.sub('[^a-z0-9]+', '-', script.name)}-{setting.name}.jsonl"
    found = calmest(case, script, setting, log)
    row = {"model": case.name, "script": script.name, "setting": setting.name, "normal_ms": normal}
    row |= {**judge(found, case, normal), "outside": found["outside"], "series": found["windows"]}
    print(
        case.name,
        script.name,
        setting.name,
        _cell(row),
        f"{row['tokens_per_s']:.1f} tok/s",
        file=sys.stderr,
        flush=True,
    )
    return row


def _wanted(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part in name for part in parts)


def table(rows: list[dict[str, Any]]) -> str:
    """Violations by script and setting, with k where the process was killed; then the sums."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        names = list(dict.fromkeys(row["setting"] for row in own))
        normal = sorted({row["normal_ms"] for row in own})
        bound = f"{_VIOLATION} x {normal[0]:.2f}" + (f" to {normal[-1]:.2f}" if normal[1:] else "")
        lines += ["", f"{model}: windows out of bounds (k: killed), bound {bound} ms", ""]
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
        lines += ["", _summary(own)]
    return "\n".join(lines)


def _summary(rows: list[dict[str, Any]]) -> str:
    """The law beside the fixed setting with the fewest violations, one for all scripts."""
    violations, speed = Counter[str](), Counter[str]()
    for row in rows:
        violations[row["setting"]] += row["violations"]
        speed[row["setting"]] += row["tokens_per_s"]
    fixed = [name for name in violations if name.startswith("fixed")]
    if not fixed or "fast-slow" not in violations:
        return ""
    best = min(fixed, key=lambda name: (violations[name], -speed[name]))
    share = violations["fast-slow"] / max(1, violations[best])
    return (
        f"Best fixed setting: {best[6:]}. fast-slow has {share:.2f} times its violations and "
        f"{speed['fast-slow'] / speed[best]:.0%} of its tokens/s."
    )


def _cell(row: dict[str, Any]) -> str:
    return f"{row['violations']} of {row['windows']}" + (
        " k" if row["killed"] else " failed" if row["failed"] else ""
    )


def main() -> None:
    words = arguments_of()
    if words.logs:
        words.logs.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine.describe(), "rows": []}
    if words.json and words.json.exists():
        report = json.loads(words.json.read_text())
    report["date"] = datetime.date.today().isoformat()
    for rows in measure(words, report["rows"]):
        report["rows"] = merged(report["rows"], rows)
        if words.json:
            beside = words.json.with_name(words.json.name + ".part")
            beside.write_text(json.dumps(report) + "\n")
            beside.replace(words.json)
    print(table(report["rows"]))


def merged(known: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A script's rows take the place of what an earlier part found of it: its settings are compared side by side."""
    done = {(row["model"], row["script"]) for row in rows}
    return [row for row in known if (row["model"], row["script"]) not in done] + rows


if __name__ == "__main__":
    main()
