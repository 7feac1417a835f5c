"""edgert ps: what a daemon tells, and which processes run edgert."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from shell import Shell, assert_fails

from edgert.processes import edgert_command

STATS = {
    "state": "ready",
    "uptime_s": 7500,
    "budget_bytes": 3 << 30,
    "requests_active": 2,
    "models": [
        {"name": "mine", "state": "ready", "users": 2, "pinned": True, "budget_bytes": 1 << 30,
         "statistics": {"used_bytes": 1 << 20}},
        {"name": "other", "state": "unloaded", "users": 0, "pinned": False},
    ],
}  # fmt: skip


@contextmanager
def daemon(content: bytes, key: str | None = None) -> Iterator[int]:
    """The port of what answers /stats with `content`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = key is None or self.headers["Authorization"] == f"Bearer {key}"
            self.send_response(200 if allowed and self.path == "/stats" else 401)
            self.end_headers()
            self.wfile.write(content if allowed else b"{}")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_the_models_of_a_daemon(edgert: Shell) -> None:
    with daemon(json.dumps(STATS).encode()) as port:
        lines = edgert("ps", "--port", port).stdout.splitlines()
        assert edgert.json("ps", "--port", port)["daemon"] == STATS
    assert lines[0] == f"daemon at 127.0.0.1:{port}: ready, 2 requests at work, budget 3.0 GiB, up 2 h 5 min"
    assert [line.split() for line in lines[3:5]] == [
        ["mine", "ready", "2", "1.0", "GiB", "1.0", "MiB", "yes"],
        ["other", "unloaded", "0"],
    ]


def test_a_daemon_with_a_key(edgert: Shell) -> None:
    keys = edgert.home / "keys"
    keys.write_text("# mine\nopen-sesame\n")
    with daemon(json.dumps(STATS).encode(), "open-sesame") as port:
        assert_fails(edgert("ps", "--port", port), "wants its key; say --api-key-file")
        assert edgert.json("ps", "--port", port, "--api-key-file", keys)["daemon"] == STATS


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'{"state": "ready"}', b"[" * 100_000])
def test_something_else_at_the_port(edgert: Shell, content: bytes) -> None:
    with daemon(content) as port:
        assert_fails(edgert("ps", "--port", port), "something else than edgert's daemon answers")


def test_no_daemon_is_no_error(edgert: Shell) -> None:
    with daemon(b"") as port:
        pass
    assert edgert("ps", "--port", port).stdout.startswith(f"no daemon at 127.0.0.1:{port}\n")
    assert_fails(edgert("ps", "--port", "70000"), "port: found '70000'")


def test_processes_are_found(edgert: Shell, tiny_bundle: Path) -> None:
    talking = subprocess.Popen(
        edgert.command("chat", tiny_bundle), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=edgert.environment,
    )  # fmt: skip
    assert talking.stderr
    talking.stderr.readline()  # it is loaded
    (found,) = [one for one in edgert.json("ps")["processes"] if one["pid"] == talking.pid]
    talking.communicate()
    assert found["command"] == f"chat {tiny_bundle}" and found["rss_bytes"] > 1 << 20
    assert talking.pid not in [one["pid"] for one in edgert.json("ps")["processes"]]


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["/usr/bin/python3", "/usr/local/bin/edgert", "serve", "mine"], ["serve", "mine"]),
        (["python3", "-m", "edgert", "run", "mine"], ["run", "mine"]),
        (["python3", "-m", "edgert", "ps"], []),
        (["vi", "edgert"], []),
        (["edgert"], []),
        ([], []),
    ],
)
def test_what_counts_as_a_process_of_edgert(words: list[str], command: list[str]) -> None:
    assert edgert_command(words) == command
