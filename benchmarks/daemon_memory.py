"""What the daemon holds beyond the memory that its model's budget counts.

    python benchmarks/daemon_memory.py docs-moe [MODEL ...] [--memory 160MiB]

Prints, in MiB a moment, the process's resident memory less used_bytes: when it is ready, after some chats, after the
first request with a schema, after a hundred different schemas, and after 32 at a time.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from daemon import daemon

_CHATS, _SCHEMAS, _AT_ONCE = 10, 100, 32


def ask(url: str, number: int | None = None) -> None:
    """A chat; with a number, in a form that is its own."""
    asked: dict[str, Any] = {"model": "model", "max_tokens": 60, "temperature": 0}
    if number is not None:
        schema = {
            "type": "object",
            "properties": {f"name{number}": {"type": "string", "maxLength": 20}, "year": {"type": "integer"}},
            "required": [f"name{number}", "year"],
            "additionalProperties": False,
        }
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    message = {"role": "user", "content": "Who wrote it, and when?"}
    httpx.post(
        f"{url}v1/chat/completions", json={**asked, "messages": [message]}, timeout=300
    ).raise_for_status()


def measured(model: str, memory: str) -> dict[str, float]:
    found = {}
    with daemon(model, memory) as url:

        def note(moment: str) -> None:
            stats = httpx.get(f"{url}stats").json()
            beyond = stats["rss_bytes"] - stats["models"][0]["statistics"]["used_bytes"]
            found[moment] = round(beyond / 2**20, 1)

        note("ready")
        for _ in range(_CHATS):
            ask(url)
        note(f"{_CHATS} chats")
        ask(url, 0)
        note("a schema")
        for number in range(_SCHEMAS):
            ask(url, number)
        note(f"{_SCHEMAS} schemas")
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda number: ask(url, number), range(_SCHEMAS, 4 * _SCHEMAS)))
        note(f"{3 * _SCHEMAS} schemas, {_AT_ONCE} at a time")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--memory", default="160MiB")
    args = parser.parse_args()
    print(json.dumps({model: measured(model, args.memory) for model in args.models}, indent=2))


if __name__ == "__main__":
    main()
