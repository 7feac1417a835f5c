"""The programs that are measured: their commands, run under limits, and what they report in one form."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import limiter

from edgert.benchmark import drop_from_page_cache

HERE = Path(__file__).parent
COLD_PROMPT_TOKENS = 16


class PeerError(Exception):
    """A peer's process failed; the message is its last line, or how it ended."""


@dataclass(frozen=True)
class Job:
    """What all peers are asked for."""

    shape: str
    bundle: Path
    gguf: Path
    prompt_tokens: int
    decode_tokens: int
    threads: int
    llama_python: str

    @property
    def files(self) -> list[Path]:
        """Those that are read."""
        return [self.gguf, *self.bundle.glob("*.bin")]


Command = list[str]


def warm(job: Job, memory: int | None, budget: int | None) -> dict[str, Command]:
    """Prefill and decode. With a limit on `memory`, llama.cpp maps its file and edgert gets `budget`."""
    lengths = ["--prompt-tokens", str(job.prompt_tokens), "--decode-tokens", str(job.decode_tokens)]
    limit = [] if budget is None else ["--memory", str(budget)]
    return {
        "llama.cpp": _llama(job, mmap=memory is not None),
        "edgert": [*_edgert(job), *lengths, *limit],
    }


def cold(job: Job) -> dict[str, Command]:
    """From loading to the first token after a short prompt, with all memory."""
    options = {"cold": True, "prompt_tokens": COLD_PROMPT_TOKENS, "decode_tokens": 1}
    return {
        "llama.cpp": _llama(job, mmap=False, **options),
        "llama.cpp, mmap": _llama(job, mmap=True, **options),
        "edgert": [*_edgert(job), "--cold", "--prompt-tokens", str(COLD_PROMPT_TOKENS)],
    }


def _edgert(job: Job) -> Command:
    command = [sys.executable, "-m", "edgert", "bench", "--json", "--repetitions", "1"]
    return [*command, "--shape", job.shape, "--threads", str(job.threads)]


def _llama(job: Job, **options: Any) -> Command:
    settings = {
        "model": str(job.gguf),
        "prompt_tokens": job.prompt_tokens,
        "decode_tokens": job.decode_tokens,
        "threads": job.threads,
        **options,
    }
    return [job.llama_python, str(HERE / "llama_run.py"), json.dumps(settings)]


def limits(job: Job, memory: int | None, read: int | None) -> limiter.Limits:
    """Raises limiter.NoLimiterError where reads are to be held and a file lies on no disk."""
    disks = set() if read is None else {limiter.disk_number(file) for file in job.files}
    return limiter.Limits(memory, read, frozenset(disks))


def run(command: Sequence[str], held: limiter.Limits, files: Sequence[Path]) -> dict[str, Any]:
    """What `command` reports, with nothing of `files` in the page cache where memory is limited: pages there count for
    whoever read them first, and would be memory beyond the limit. Raises PeerError and limiter.NoLimiterError."""
    if not held.controllers:
        return report(command)
    mounts, memberships = (Path("/proc/self", name).read_text() for name in ("mounts", "cgroup"))
    if held.memory is not None:
        drop_from_page_cache(files)
    with limiter.limited(limiter.find_parents(mounts, memberships, held.controllers), held) as groups:
        return report(groups.command(command))


def report(command: Sequence[str]) -> dict[str, Any]:
    """The JSON that `command` prints, with a key a phase. Raises PeerError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise PeerError("killed by the memory limit" if done.returncode == -9 else lines[-1])
    return by_phase(json.loads(done.stdout))


def by_phase(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report of `edgert bench` in the form of llama_run.py, which is left as it is: a key for each of the phases prefill
    and decode, and the figures of a cold start at the top."""
    phases = {row["phase"]: row for row in report.get("results", ())}
    return {**report, **phases.pop("cold start", {}), **phases}
