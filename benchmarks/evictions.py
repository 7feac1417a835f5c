"""Eviction policies on a routing: hits and bytes a token of each, beside the least that any could read.

python benchmarks/evictions.py olmoe-1b-7b --routing trace:run.jsonl
python benchmarks/evictions.py docs-moe --text notes.md --record notes.jsonl     # the model's own routing
python benchmarks/evictions.py olmoe-1b-7b --routing drifting --json result.json

MODEL is a bundle, or a shape, of which no weights are needed. A routing is uniform, zipf (some experts more likely, always the
same ones), drifting (zipf whose favourites change), trace:FILE, or that of --text. Nothing is timed: the store is simulated,
and its counts are the engine's (tests/test_eviction.py). `decode` runs the tokens one by one and counts after the first
third; `requests` cuts them into prompts and answers (--request), each prompt in chunks that read most of every layer, and
counts the answers after the first third of the requests. The bounds are 95 % of a bootstrap over blocks of tokens.
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import edgert
from edgert import eviction, routing
from edgert.cli.terminal import markdown_table
from edgert.eviction import OPTIMUM, Counts, policies, replay, total
from edgert.footprint import find
from edgert.roof import chunks

SHARES = (0.125, 0.25, 0.5, 0.75)
REQUEST = (32, 16)
_SYNTHETIC_TOKENS = 400
_BLOCK = 10  # tokens that a bootstrap draws together, for neighbours are alike
_DRAWS = 400


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--routing", help="uniform, zipf, drifting or trace:FILE")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files that the bundle is run on")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the text's routing as a trace")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES, help="of the experts' bytes")
    parser.add_argument("--request", type=int, nargs=2, default=REQUEST, metavar=("PROMPT", "ANSWER"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    subject = find(args.model)
    layers = routing.moe_layers(subject.sizes.recipe)
    if args.text:
        table = own_routing(subject.path, args.text)
    elif args.routing in ("zipf", "drifting"):
        table = drawn(layers, _SYNTHETIC_TOKENS, drift=0.3 if args.routing == "drifting" else 0)
    else:
        table = routing.imposed(args.routing or "uniform", subject.sizes.recipe, _SYNTHETIC_TOKENS)
    if args.record:
        routing.write_trace(args.record, table)
    report = {
        "model": args.model,
        "routing": args.routing or "text",
        "tokens": len(table),
        "request": list(args.request),
        "rows": measure(subject.sizes.weights.experts, table, args.shares, tuple(args.request)),
    }
    print(markdown_table(as_table(report["rows"]), right=range(2, 99)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


# --- routings -----------------------------------------------------------------------------------------


def own_routing(path: Path | None, texts: Sequence[Path]) -> routing.Table:
    """What the bundle's routers choose for each file's tokens, in sequences as long as the context."""
    table: routing.Table = []
    with edgert.load(path) as model:
        for text in texts:
            tokens = model.tokenizer.encode(text.read_text(errors="replace"))
            for first in range(0, len(tokens), model.context):
                with closing(model.native.sequence()) as sequence:
                    for token in tokens[first : first + model.context]:
                        model.native.step([(sequence, [token], None)])
                        table.append(model.native.last_experts())
    return table


def drawn(layers: Sequence[tuple[int, int]], tokens: int, *, drift: float, seed: int = 0) -> routing.Table:
    """Experts whose likelihood falls with their rank; at each token and layer two ranks change places with chance `drift`."""
    draw = random.Random(seed)
    ranks = [draw.sample(range(count), count) for count, _ in layers]
    table: routing.Table = []
    for _ in range(tokens):
        step = []
        for ranked, (count, top) in zip(ranks, layers, strict=True):
            if draw.random() < drift:
                a, b = draw.sample(range(count), 2)
                ranked[a], ranked[b] = ranked[b], ranked[a]
            # The `top` largest of weighted exponential times are a weighted draw without replacement.
            keys = sorted(range(count), key=lambda rank: draw.expovariate(1) * (rank + 1))
            step.append(sorted(ranked[rank] for rank in keys[:top]))
        table.append(step)
    return table


def requests(table: routing.Table, prompt: int, answer: int) -> tuple[list[eviction.Step], list[bool]]:
    """Steps of prompts, each in one chunk, and of the answers to them, which count after the first third."""
    steps: list[eviction.Step] = []
    counted: list[bool] = []
    for first in range(0, len(table) - prompt - answer + 1, prompt + answer):
        steps += chunks(table[first : first + prompt], prompt)
        steps += table[first + prompt : first + prompt + answer]
        counted += [False] + [3 * first >= len(table)] * answer
    return steps, counted


# --- measuring ----------------------------------------------------------------------------------------


def measure(
    sizes: Sequence[Sequence[int]],
    table: routing.Table,
    shares: Sequence[float],
    request: tuple[int, int],
) -> list[dict[str, Any]]:
    everything = sum(map(sum, sizes))
    ways: dict[str, tuple[list[eviction.Step], list[bool]]] = {
        "decode": (list(table), [3 * index >= len(table) for index in range(len(table))]),
        "requests": requests(table, *request),
    }
    rows = []
    for way, (steps, counted) in ways.items():
        if not any(counted):
            continue
        for share in shares:
            found = {
                name: replay(sizes, int(share * everything), steps, counted, name)
                for name in (*policies(), OPTIMUM)
            }
            rows.append({"way": way, "share": share, "policies": summed(found)})
    return rows


def summed(found: Mapping[str, list[Counts]]) -> dict[str, dict[str, Any]]:
    """By policy: hit rate and bytes a token, their bounds, and those of the hit rate over lru's."""
    result = {}
    for name, counts in found.items():
        rate = total(counts).hit_rate
        low, high = bounds(counts)
        gain = [
            Counts(a.hits - b.hits, a.misses + b.hits, 0) for a, b in zip(counts, found["lru"], strict=True)
        ]
        result[name] = {
            "hit_rate": rate,
            "hit_rate_bounds": [low, high],
            "over_lru_bounds": list(bounds(gain)),
            "bytes_per_token": total(counts).bytes / len(counts),
        }
    return result


def bounds(counts: Sequence[Counts]) -> tuple[float, float]:
    """Of the hit rate, by drawing blocks of neighbouring tokens again and again."""
    draw = random.Random(0)
    starts = range(max(1, len(counts) - _BLOCK + 1))
    rates = []
    for _ in range(_DRAWS):
        blocks = [draw.choice(starts) for _ in range(-(-len(counts) // _BLOCK))]
        rates.append(total([one for start in blocks for one in counts[start : start + _BLOCK]]).hit_rate)
    rates.sort()
    return rates[int(0.025 * _DRAWS)], rates[int(0.975 * _DRAWS) - 1]


def as_table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    names = list(rows[0]["policies"])
    lines = [("", "slots hold", *(f"{name}: hits, MB a token" for name in names), "over lru, points")]
    for row in rows:
        best = row["policies"]["forecast"]["over_lru_bounds"]
        lines.append(
            (
                row["way"],
                f"{row['share']:.1%}",
                *(
                    f"{row['policies'][name]['hit_rate']:.1%}, {row['policies'][name]['bytes_per_token'] / 1e6:.2f}"
                    for name in names
                ),
                f"{100 * best[0]:+.1f} to {100 * best[1]:+.1f}",
            )
        )
    return lines


if __name__ == "__main__":
    main()
