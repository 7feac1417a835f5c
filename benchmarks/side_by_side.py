"""The same shape in edgert and in llama.cpp, measured in turns in one run: one command for the whole table.

    pip install llama-cpp-python gguf        # built from source, for the processor it runs on
    python benchmarks/side_by_side.py olmoe-1b-7b --json result.json --plot result.svg

Each round runs each peer once, in a process of its own that warms up with one prompt and its decode and measures a
second; a figure is the median of the rounds, its spread (largest - smallest) / median. The parts:

    resident  all memory
    shares    memory held to each --share of llama.cpp's file by a cgroup: llama.cpp maps its file, edgert gets a --memory
              that leaves room for the interpreter
    held      the same with reads from the disk held to each --disk
    cold      time to the first token after a short prompt with nothing in the page cache, at full speed and at each --disk

Rows that cannot be measured say why. docs/benchmarks.md explains the columns.
"""

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import limiter
import machine
import peers
import plot
import rows
import table
from rows import Setting

from edgert import settings
from edgert.shapes import SHAPES, shape_bundle
from edgert.units import parse_bytes

PARTS = ("resident", "shares", "held", "cold")
SHARES, DISKS = (0.75, 0.5, 0.25), (300_000_000,)
FAIR_READ_AHEAD_KB = 128


def settings_of(parts: Sequence[str], shares: Sequence[float], disks: Sequence[int]) -> Iterator[Setting]:
    """Of the parts that measure prefill and decode, in order."""
    if "resident" in parts:
        yield Setting()
    if "shares" in parts:
        yield from (Setting(share) for share in shares)
    if "held" in parts:
        yield from (Setting(share, disk) for disk in disks for share in shares)


def prepare(arguments: argparse.Namespace) -> peers.Job:
    """All peers' files, written where they are not there yet."""
    gguf = settings.cache() / "gguf" / f"{arguments.shape}-q4_0.gguf"
    if not gguf.exists():
        gguf.parent.mkdir(parents=True, exist_ok=True)
        config = json.dumps(SHAPES[arguments.shape])
        subprocess.run([arguments.llama_python, peers.HERE / "gguf_shape.py", config, gguf], check=True)
    return peers.Job(
        arguments.shape,
        shape_bundle(arguments.shape),
        gguf,
        arguments.prompt_tokens,
        arguments.decode_tokens,
        arguments.threads or int(machine.describe()["cores"]),
        arguments.llama_python,
    )


def measure(job: peers.Job, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The report as it grows, after each setting."""
    report: dict[str, Any] = {
        "shape": job.shape,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "threads": job.threads,
        "edgert": version("edgert"),
        "rounds": arguments.rounds,
        "prompt_tokens": job.prompt_tokens,
        "decode_tokens": job.decode_tokens,
        "cold_prompt_tokens": peers.COLD_PROMPT_TOKENS,
        "rows": [],
        "cold": [],
    }
    work = [
        ("rows", rows.warm, setting)
        for setting in settings_of(arguments.parts, arguments.share, arguments.disk)
    ]
    if "cold" in arguments.parts:
        work += [("cold", rows.cold, Setting(None, read)) for read in (None, *arguments.disk)]
    with machine.read_ahead(job.gguf, FAIR_READ_AHEAD_KB) as ahead:
        report["read_ahead_kb"] = ahead
        for kind, run, setting in work:
            try:
                report[kind] += run(job, setting, arguments.rounds, note)
            except limiter.NoLimiterError as error:
                place = {"peer": "all", "share": setting.share, "read_bytes_per_s": setting.read}
                report[kind].append({**place, "failed": f"not measured: {error}"})
            yield report


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the table (all)")
    parser.add_argument(
        "--share", type=float, nargs="+", default=SHARES, help="of the model, as memory limit"
    )
    parser.add_argument("--disk", type=parse_bytes, nargs="+", default=DISKS, help="bytes a second, as 300MB")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of all peers (all cores)")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter with llama_cpp and gguf")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything there too, after each setting"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw decode speed by memory there (needs matplotlib)"
    )
    return parser.parse_args(words)


def main() -> None:
    arguments = arguments_of()
    job = prepare(arguments)
    report: dict[str, Any] = {}
    for report in measure(job, arguments):
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table.markdown(report))
    if arguments.plot:
        plot.draw(report, arguments.plot)


if __name__ == "__main__":
    main()
