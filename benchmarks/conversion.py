"""How fast a model is converted, beside a copy of the same file or files on the same disk.

    python benchmarks/conversion.py SOURCE... --scratch DIRECTORY [--rounds 3] [--json OUT.json]

A SOURCE is a GGUF file or a checkpoint directory. Each round copies it and converts it by turns, both from a dropped page
cache where that is allowed (root), both ending with what they wrote on the disk. Options after `--` go to `edgert
convert`. Medians count; memory is the largest resident set of the converting process.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PIECE = 8 << 20


def files_of(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    return sorted(path for path in source.iterdir() if path.suffix == ".safetensors")


def copy(source: Path, scratch: Path) -> None:
    """A plain copy, piece by piece, synced."""
    target = scratch / "made"
    target.mkdir()
    for path in files_of(source):
        with path.open("rb", buffering=0) as read, (target / path.name).open("wb", buffering=0) as write:
            while piece := read.read(_PIECE):
                write.write(piece)
            os.fsync(write.fileno())


def convert(source: Path, scratch: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "edgert", "convert", str(source), str(scratch / "made"), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def seconds(work: Callable[[Path], None], scratch: Path) -> float:
    """Of `work`, which makes scratch/made; to remove that takes its time as well, and is not counted."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        print("the page cache stays: only root can drop it", file=sys.stderr)
    start = time.perf_counter()
    try:
        work(scratch)
        return time.perf_counter() - start
    finally:
        shutil.rmtree(scratch / "made", ignore_errors=True)


def measure(source: Path, scratch: Path, rounds: int, options: list[str]) -> dict[str, Any]:
    copies, conversions = [], []
    for _ in range(rounds):
        copies.append(seconds(lambda place: copy(source, place), scratch))
        conversions.append(seconds(lambda place: convert(source, place, options), scratch))
    size = sum(path.stat().st_size for path in files_of(source))
    taken = statistics.median(conversions)
    return {
        "source": source.name,
        "bytes": size,
        "copy_mb_per_s": size / 1e6 / statistics.median(copies),
        "convert_mb_per_s": size / 1e6 / taken,
        "of_copy": statistics.median(copies) / taken,
        "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6,  # of all so far
        "copy_s": copies,
        "convert_s": conversions,
    }


def main() -> None:
    words = sys.argv[1:]
    own, options = (
        (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--scratch", type=Path, required=True, help="where copies and bundles are written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(own)
    rows = [measure(source, arguments.scratch, arguments.rounds, options) for source in arguments.sources]
    print("| source | GB | copy MB/s | convert MB/s | of a copy | peak MB |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['source']} | {row['bytes'] / 1e9:.1f} | {row['copy_mb_per_s']:.0f} | {row['convert_mb_per_s']:.0f} "
            f"| {row['of_copy']:.2f} | {row['peak_mb']:.0f} |"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
