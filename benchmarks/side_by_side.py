"""The same shape in edgert and in llama.cpp, measured in turns in one run.

    pip install llama-cpp-python gguf        # built from source, for the processor it runs on
    python benchmarks/side_by_side.py olmoe-1b-7b [--share 0.5 --share 0.25] [--json FILE]

Each round runs each peer once, in a process of its own that warms up with one prompt and its decode and measures a
second; a figure is the median of the rounds, its spread (largest - smallest) / median. The first rows have all memory.
Each --share adds rows whose memory is held to that share of llama.cpp's file by a cgroup: llama.cpp maps its file,
edgert gets a --memory that leaves room for the interpreter. Rows that cannot be measured say why.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import limiter
import machine

from edgert import settings
from edgert.shapes import SHAPES, shape_bundle

HERE = Path(__file__).parent
LLAMA_SHAPES = ("olmoe-1b-7b", "qwen3-30b-a3b", "tiny")
FAIR_READ_AHEAD_KB = 128
INTERPRETER_BYTES = 96 << 20  # of Python and its libraries, which edgert's --memory does not count
PHASES = ("prefill", "decode")


class PeerError(Exception):
    """A peer's process failed; the message is its last line, or how it ended."""


@dataclass(frozen=True)
class Job:
    """What both peers are asked for."""

    shape: str
    bundle: Path
    gguf: Path
    prompt_tokens: int
    decode_tokens: int
    threads: int
    llama_python: str

    def edgert(self, memory: int | None) -> list[str]:
        command = [sys.executable, "-m", "edgert", "bench", "--json", "--repetitions", "1"]
        command += ["--shape", self.shape, "--threads", str(self.threads)]
        command += ["--prompt-tokens", str(self.prompt_tokens), "--decode-tokens", str(self.decode_tokens)]
        return command if memory is None else [*command, "--memory", str(memory)]

    def llama(self, memory: int | None) -> list[str]:
        options = {
            "model": str(self.gguf),
            "prompt_tokens": self.prompt_tokens,
            "decode_tokens": self.decode_tokens,
            "threads": self.threads,
            "mmap": memory is not None,
        }
        return [self.llama_python, str(HERE / "llama_run.py"), json.dumps(options)]


def run(command: Sequence[str]) -> dict[str, Any]:
    """The JSON that `command` prints. Raises PeerError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise PeerError("killed by the memory limit" if done.returncode == -9 else lines[-1])
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def rounds(job: Job, share: float | None, count: int, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row a peer, measured in turns. Raises limiter.NoLimiterError."""
    limit = None if share is None else int(share * job.gguf.stat().st_size)
    budget = None if limit is None else limit - INTERPRETER_BYTES
    peers = {"llama.cpp": job.llama(limit), "edgert": job.edgert(budget)}
    found: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    failed: dict[str, str] = {}
    for index in range(count):
        for peer, command in peers.items():
            if peer in failed:
                continue
            others = machine.Others()
            try:
                report = run_limited(job, command, limit)
            except PeerError as error:
                failed[peer] = str(error)
                continue
            report["others_busy"] = others.processors()
            found[peer].append(report if peer == "llama.cpp" else edgert_phases(report))
            speeds = ", ".join(f"{phase} {found[peer][-1][phase]['tokens_per_s']:.2f}" for phase in PHASES)
            note(f"{'all' if share is None else share}, round {index + 1} of {count}: {peer} {speeds} tok/s")
    return [
        {"peer": peer, "share": share, "failed": failed[peer]}
        if peer in failed
        else row(peer, share, found[peer])
        for peer in peers
    ]


def run_limited(job: Job, command: Sequence[str], limit: int | None) -> dict[str, Any]:
    if limit is None:
        return run(command)
    mounts, memberships = (Path("/proc/self", name).read_text() for name in ("mounts", "cgroup"))
    # Pages in the cache count for whoever read them first: without this they would be memory beyond the limit.
    machine.drop_from_page_cache([job.gguf, *job.bundle.glob("*.bin")])
    with limiter.limited(limiter.find_parent(mounts, memberships), limit) as group:
        return run(group.command(command))


def edgert_phases(report: dict[str, Any]) -> dict[str, Any]:
    """The report of `edgert bench` with a key a phase, as llama_run.py has it."""
    return {**report, **{result["phase"]: result for result in report["results"]}}


def row(peer: str, share: float | None, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of one peer's rounds."""
    result: dict[str, Any] = {"peer": peer, "share": share, "rounds": len(reports)}
    for phase in PHASES:
        speeds = [report[phase]["tokens_per_s"] for report in reports]
        median = statistics.median(speeds)
        result[phase] = {
            "tokens_per_s": median,
            "spread": (max(speeds) - min(speeds)) / median,
            "bytes_read_per_token": statistics.median(
                report[phase]["bytes_read_per_token"] for report in reports
            ),
        }
    result["others_busy"] = [report["others_busy"] for report in reports]
    known = ("version", "features", "isa", "budget_bytes", "resident", "bits_per_weight", "expert_overlap")
    result["about"] = {name: reports[0][name] for name in known if name in reports[0]}
    return result


def markdown(rows: Sequence[dict[str, Any]], prompt_tokens: int, decode_tokens: int) -> str:
    """A table of `rows`; the last column divides edgert's speeds by those of the row above it."""
    lines = [
        f"| memory | | prefill {prompt_tokens}, tok/s | spread | decode {decode_tokens}, tok/s | spread "
        "| MB read a decoded token | times llama.cpp, prefill / decode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    other: dict[str, Any] = {}
    for current in rows:
        memory = "all" if current["share"] is None else f"{current['share']:.0%}"
        if "failed" in current:
            lines.append(f"| {memory} | {current['peer']} | {current['failed']} | | | | | |")
            continue
        cells = [f"{current[phase]['tokens_per_s']:.2f} | {current[phase]['spread']:.1%}" for phase in PHASES]
        ratio = ""
        if current["peer"] == "edgert" and other.get("share") == current["share"] and "decode" in other:
            ratio = " / ".join(
                f"{current[phase]['tokens_per_s'] / other[phase]['tokens_per_s']:.2f}" for phase in PHASES
            )
        read = current["decode"]["bytes_read_per_token"] / 1e6
        lines.append(f"| {memory} | {current['peer']} | {' | '.join(cells)} | {read:.0f} | {ratio} |")
        other = current
    return "\n".join(lines)


def prepare(arguments: argparse.Namespace) -> Job:
    """Both peers' files, written where they are not there yet."""
    gguf = settings.cache() / "gguf" / f"{arguments.shape}-q4_0.gguf"
    if not gguf.exists():
        gguf.parent.mkdir(parents=True, exist_ok=True)
        config = json.dumps(SHAPES[arguments.shape])
        subprocess.run([arguments.llama_python, HERE / "gguf_shape.py", config, gguf], check=True)
    return Job(
        arguments.shape,
        shape_bundle(arguments.shape),
        gguf,
        arguments.prompt_tokens,
        arguments.decode_tokens,
        arguments.threads or int(machine.describe()["cores"]),
        arguments.llama_python,
    )


def measure(job: Job, shares: Sequence[float | None], count: int) -> dict[str, Any]:
    """All rows, and what they depend on."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        ahead = stack.enter_context(machine.read_ahead(job.gguf, FAIR_READ_AHEAD_KB)) if any(shares) else None
        for share in shares:
            try:
                rows += rounds(job, share, count, lambda line: print(line, file=sys.stderr, flush=True))
            except limiter.NoLimiterError as error:
                rows += [{"peer": "both", "share": share, "failed": f"not measured: {error}"}]
    return {
        "shape": job.shape,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "threads": job.threads,
        "edgert": version("edgert"),
        "read_ahead_kb": ahead,
        "rounds": count,
        "rows": rows,
    }


def describe(report: dict[str, Any]) -> str:
    """One line a reader needs beside the table."""
    busy = [value for row in report["rows"] for value in row.get("others_busy", ())]
    about = {row["peer"]: row["about"] for row in report["rows"] if "about" in row}
    parts = [
        f"{report['shape']}: {report['machine']['cpu']}, {report['threads']} threads",
        f"{report['machine']['memory_bytes'] / 2**30:.0f} GiB",
        f"edgert {report['edgert']} ({about.get('edgert', {}).get('isa', '-')})",
        f"llama-cpp-python {about.get('llama.cpp', {}).get('version', '-')}",
        f"median of {report['rounds']}, {report['date']}",
        f"other processes kept {max(busy, default=0.0):.1f} processors busy in the worst round",
    ]
    if report["read_ahead_kb"] is not None:
        parts.append(f"read_ahead_kb {report['read_ahead_kb']}")
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=LLAMA_SHAPES)
    parser.add_argument(
        "--share", type=float, action="append", default=[], help="of the model, as memory limit"
    )
    parser.add_argument("--only-shares", action="store_true", help="leave the rows with all memory out")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of both peers (all cores)")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter with llama_cpp and gguf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    arguments = parser.parse_args()
    job = prepare(arguments)
    shares = [*([] if arguments.only_shares else [None]), *arguments.share]
    report = measure(job, shares, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report["rows"], job.prompt_tokens, job.decode_tokens))
    print(f"\n{describe(report)}")


if __name__ == "__main__":
    main()
