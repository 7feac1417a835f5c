"""The daemon under load: clients that stream side by side, against what each reads alone.

    python benchmarks/daemon.py docs-moe --memory 16MiB --clients 32 --seconds 600

Starts `edgert serve`, reads every prompt's reply once alone (greedily), then lets CLIENTS ask for random ones until the
time is over, while another asks for /health. Prints one JSON object: requests, failures, replies that differ, tokens a
second alone and together, /health's percentiles in ms, and the process's memory on the way.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

PROMPTS = (
    "The os.path module",
    "A list comprehension",
    "import asyncio\n",
    "The following functions are",
    "class Foo:\n    def __init__(self",
    "Raises an exception if",
    "json.dumps(",
    "Deprecated since version",
)
LENGTHS = (8, 24, 64, 128)
PROCESSES = 4  # of the clients


@dataclass
class Asked:
    """What one client saw."""

    requests: int = 0
    failures: int = 0
    different: int = 0
    tokens: int = 0


def ask(client: httpx.Client, prompt: str, length: int) -> str:
    asked = {"model": "model", "prompt": prompt, "max_tokens": length, "temperature": 0, "stream": True}
    text = []
    with client.stream("POST", "/v1/completions", json={**asked, "ignore_eos": True}) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                text += [choice["text"] for choice in json.loads(line[6:])["choices"]]
    return "".join(text)


def ask_alone(url: str) -> tuple[dict[tuple[str, int], str], float]:
    """Every reply that will be asked for; tokens a second."""
    begun = time.monotonic()
    with httpx.Client(base_url=url, timeout=300) as client:
        alone = {(prompt, length): ask(client, prompt, length) for prompt in PROMPTS for length in LENGTHS}
    return alone, len(PROMPTS) * sum(LENGTHS) / (time.monotonic() - begun)


def keep_asking(url: str, seconds: float, number: int, alone: dict[tuple[str, int], str]) -> Asked:
    choose, seen, end = random.Random(number), Asked(), time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=300) as client:
        while time.monotonic() < end:
            prompt, length = choose.choice(PROMPTS), choose.choice(LENGTHS)
            seen.requests += 1
            try:
                seen.different += ask(client, prompt, length) != alone[prompt, length]
                seen.tokens += length
            except (httpx.HTTPError, json.JSONDecodeError):
                seen.failures += 1
    return seen


def clients(url: str, seconds: float, numbers: list[int], alone: dict[tuple[str, int], str]) -> list[Asked]:
    """Some of the clients, in a process of their own."""
    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(lambda number: keep_asking(url, seconds, number, alone), numbers))


def watch(url: str, seconds: float) -> tuple[list[float], list[int]]:
    """/health's times in ms; the process's memory at ten moments."""
    times: list[float] = []
    memory: list[int] = []
    begun = time.monotonic()
    with httpx.Client(base_url=url, timeout=300) as client:
        while (gone := time.monotonic() - begun) < seconds:
            client.get("/health").raise_for_status()
            times.append(1e3 * (time.monotonic() - begun - gone))
            if gone >= seconds * len(memory) / 10:
                memory.append(client.get("/stats").json()["rss_bytes"])
            time.sleep(0.02)
    return times, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "edgert",
        "serve",
        f"{args.model},name=model",
        "--port",
        "0",
        "--memory",
        args.memory,
    ]
    begun = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            url = line.split()[-1] if "listening:" in line else url
            if line.startswith("edgert: ready"):
                break
        ready_s = time.monotonic() - begun
        threading.Thread(target=process.stderr.read, daemon=True).start()
        print(json.dumps({"ready_s": ready_s, **measured(url, args.clients, args.seconds)}, indent=2))
    finally:
        process.terminate()
        process.wait()


def measured(url: str, count: int, seconds: float) -> dict[str, Any]:
    alone, speed = ask_alone(url)
    before = httpx.get(f"{url}stats").json()
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        parts = [list(range(first, count, PROCESSES)) for first in range(min(PROCESSES, count))]
        begun = time.monotonic()
        asked = [pool.submit(clients, url, seconds, part, alone) for part in parts]
        times, memory = watch(url, seconds)
        health = statistics.quantiles(times, n=1000)
        seen = [one for part in asked for one in part.result()]
        seconds = time.monotonic() - begun
    after = httpx.get(f"{url}stats").json()
    return {
        "clients": count,
        "seconds": seconds,
        "requests": sum(one.requests for one in seen),
        "failures": sum(one.failures for one in seen),
        "different": sum(one.different for one in seen),
        "tokens_per_s_alone": speed,
        "tokens_per_s_together": sum(one.tokens for one in seen) / seconds,
        "health_p50_ms": health[499],
        "health_p99_ms": health[989],
        "health_p999_ms": health[998],
        "rss_bytes": [before["rss_bytes"], *memory, after["rss_bytes"]],
        "used_bytes": [stats["models"][0]["statistics"]["used_bytes"] for stats in (before, after)],
        "experts": {
            name: after["models"][0]["statistics"][name]
            for name in ("experts_resident", "experts_total", "expert_hits", "expert_misses", "stall_s")
        },
    }


if __name__ == "__main__":
    main()
