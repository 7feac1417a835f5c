"""What lossy modes give and cost (docs/lossy.md): speed, bytes a token and distance from the exact model, by mode.

python benchmarks/lossy.py MODEL --text notes.txt --share 0.25 --disk 300MB
python benchmarks/lossy.py MODEL --text notes.txt --modes "skip_experts=0.2" "low_precision_misses=0.5 skip_experts=0.1"

MODEL is a bundle; its memory holds --share of the experts' bytes. The text runs through it token by token, as in generating;
a split bundle (edgert convert --split-experts) has the low precision too. Losses are over --tokens against the same model
computing exactly. Speeds are medians of --rounds, the modes by turns, each over the first --timed tokens after a warm-up
of as many; with --disk also in a cgroup whose reads are held to that many bytes a second (needs root).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import limiter

import edgert
from edgert.bundle import Bundle, locate
from edgert.cli.terminal import markdown_table
from edgert.evaluate import encode_text, evaluate
from edgert.footprint import sizes_of_bundle
from edgert.units import format_bytes, parse_bytes

Modes = dict[str, float]
EVERY = (
    "",
    "cache_aware_routing=0.1",
    "skip_experts=0.1",
    "skip_experts=0.2",
    "skip_absent_experts=0.3",
    "low_precision_misses=0.5",
    "low_precision_misses=0.5 skip_experts=0.1",
)
CONTEXT = 512


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.25, help="of the experts' bytes, in memory (0.25)")
    parser.add_argument("--modes", nargs="*", default=EVERY, help="knob=share knob=share, one argument a row")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--timed", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--disk", type=parse_bytes, nargs="*", default=[])
    parser.add_argument("--no-speed", action="store_true", help="losses and bytes only")
    parser.add_argument("--no-loss", action="store_true", help="speeds only")
    parser.add_argument("--speeds-only-here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    modes = [modes_of(row) for row in args.modes]
    if args.speeds_only_here:
        print(json.dumps(speeds(args, modes)))
        return
    columns: dict[str, list[str]] = {"": [row or "exact" for row in args.modes]}
    if not args.no_loss:
        columns |= losses(args, modes)
    if not args.no_speed:
        columns["tokens/s"] = shown(speeds(args, modes))
        for disk in args.disk:
            columns[f"tokens/s at {disk // 10**6} MB/s"] = shown(held_speeds(args, disk))
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    print(markdown_table(rows, right=range(1, len(columns))))


def modes_of(text: str) -> Modes:
    return {name: float(share) for name, share in (word.split("=") for word in text.split())}


def load(args: argparse.Namespace, modes: Modes) -> edgert.Model:
    """With memory for the share of experts; one token a step needs least for the rest."""
    bundle = Bundle.open(locate(args.model))
    knobs: dict[str, Any] = {"threads": args.threads or None, "context": CONTEXT, "chunk": 1}
    needs = sizes_of_bundle(bundle).needs(threads=args.threads, context=CONTEXT)
    with edgert.load(bundle.path, memory=2 * needs["resident_bytes"], **knobs) as model:
        plan = model.native.plan()
        rest = model.stats()["used_bytes"] - plan["slots_bytes"]
    memory = rest + int(args.share * plan["expert_bytes"])
    knobs |= {"memory": memory, **modes}
    return edgert.load(bundle.path, **knobs)


def losses(args: argparse.Namespace, rows: list[Modes]) -> dict[str, list[str]]:
    names = ("perplexity", "KL", "top-1", "hits", "read a token")
    columns: dict[str, list[str]] = {name: [] for name in names}
    with edgert.load(locate(args.model), context=CONTEXT) as exact:
        tokens = encode_text(exact, args.text.read_text(), args.tokens)
        for modes in rows:
            with load(args, modes) as model:
                found = evaluate(model, tokens, reference=exact, stride=CONTEXT - 1)
                stats = model.stats()
            assert found.reference_perplexity is not None
            looked_up = sum(stats[f"expert_{kind}"] for kind in ("hits", "prefetch_hits", "misses"))
            change = found.perplexity / found.reference_perplexity - 1
            values = (
                f"{found.perplexity:.3f} ({change:+.2%})",
                f"{found.kl_mean:.5f}",
                f"{found.top1_agreement:.1%}",
                f"{stats['expert_hits'] / looked_up:.1%}",
                format_bytes(stats["expert_bytes_read"] / len(tokens)),
            )
            for name, value in zip(names, values, strict=True):
                columns[name].append(value)
    return columns


def speeds(args: argparse.Namespace, rows: list[Modes]) -> list[float]:
    """Tokens a second."""
    found: list[list[float]] = [[] for _ in rows]
    for _ in range(args.rounds):
        for modes, taken in zip(rows, found, strict=True):
            with load(args, modes) as model:
                tokens = encode_text(model, args.text.read_text(), 2 * args.timed)
                run(model, tokens[: args.timed])
                taken.append(args.timed / run(model, tokens[args.timed :]))
    return [statistics.median(taken) for taken in found]


def run(model: edgert.Model, tokens: Sequence[int]) -> float:
    """Seconds of a step a token."""
    start = time.perf_counter()
    with closing(model.native.sequence()) as sequence:
        for position, token in enumerate(tokens):
            if position % (CONTEXT - 1) == 0:
                sequence.rewind(0)
            model.native.step([(sequence, [token], None)])
    return time.perf_counter() - start


def held_speeds(args: argparse.Namespace, read: int) -> list[float]:
    """The same in a process whose reads are held."""
    disks = {limiter.disk_number(path) for path in locate(args.model).glob("*.bin")}
    limits = limiter.Limits(read=read, disks=frozenset(disks))
    mounts, groups = Path("/proc/self/mounts").read_text(), Path("/proc/self/cgroup").read_text()
    flags = [f"--{name}={getattr(args, name)}" for name in ("text", "share", "timed", "rounds", "threads")]
    command = [sys.executable, __file__, args.model, *flags, "--speeds-only-here", "--modes", *args.modes]
    with limiter.limited(limiter.find_parents(mounts, groups, limits.controllers), limits) as made:
        done = subprocess.run(made.command(command), stdout=subprocess.PIPE, check=True)
    result: list[float] = json.loads(done.stdout)
    return result


def shown(values: list[float]) -> list[str]:
    return [f"{value:.1f}" for value in values]


if __name__ == "__main__":
    main()
