"""Too much at once, and faults while running: what can be answered is, the rest is said, nothing ends the daemon."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemons import Daemon, running, wait_until
from shell import Shell

ASK = {"prompt": "The os.path module", "max_tokens": 48, "temperature": 0, "ignore_eos": True}


def complete(daemon: Daemon, **asked: Any) -> httpx.Response:
    return daemon.client.post("/v1/completions", json={**ASK, **asked})


def text(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def bursts(daemon: Daemon, count: int, **asked: Any) -> tuple[list[httpx.Response], list[httpx.Response]]:
    """Replies to `count` requests at once, repeated until some met a full queue: those that were taken, and those."""
    replies: list[httpx.Response] = []

    def met_a_full_queue() -> bool:
        with ThreadPoolExecutor(count) as pool:
            replies.extend(pool.map(lambda _: complete(daemon, **asked), range(count)))
        return any(reply.status_code == 503 for reply in replies)

    wait_until(met_a_full_queue)
    full = [reply for reply in replies if reply.status_code == 503]
    taken = [reply for reply in replies if reply.status_code == 200]
    assert taken and len(taken) + len(full) == len(replies)
    return taken, full


def test_a_full_queue_is_answered_503_and_the_others_as_ever(tmp_path: Path) -> None:
    with running(tmp_path, "docs-moe", "--memory", "64MiB", "--queue", "1", "--parallel", "1") as daemon:
        alone = text(complete(daemon.ready(), max_tokens=400))
        taken, full = bursts(daemon, 40, max_tokens=400)
        assert {text(reply) for reply in taken} == {alone}
        for reply in full:
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["code"] == "queue_full"
        assert text(complete(daemon, max_tokens=400)) == alone


def test_a_request_for_many_choices_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    with running(tmp_path, "docs-moe", "--memory", "64MiB", "--queue", "1", "--parallel", "1") as daemon:
        alone = text(complete(daemon.ready()))
        taken, full = bursts(daemon, 12, n=8)
        for reply in taken:
            assert [choice["text"] for choice in reply.json()["choices"]] == [alone] * 8
        assert {reply.json()["error"]["code"] for reply in full} == {"queue_full"}
        engine = daemon.stats()["models"][0]["engine"]
        assert engine["requests_running"] == engine["requests_waiting"] == 0


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[tuple[Daemon, Path]]:
    """A daemon of docs-moe and of a copy that reads experts from storage all along."""
    from edgert.bundle import embedded

    packaged = embedded()
    assert packaged is not None
    bundle = Path(shutil.copytree(packaged, tmp_path / "copy.edgert"))
    with running(
        tmp_path, f"{bundle},memory=12MiB", "docs-moe,memory=32MiB,pin", "--memory", "48MiB"
    ) as daemon:
        yield daemon.ready(), bundle


def test_an_expert_that_cannot_be_read_fails_its_requests_alone(damaged: tuple[Daemon, Path]) -> None:
    daemon, bundle = damaged
    healthy = text(complete(daemon, model="copy"))
    beside = text(complete(daemon, model="docs-moe"))
    (experts,) = bundle.glob("experts*")
    content = experts.read_bytes()
    with experts.open("r+b") as file:  # in place: it is open
        file.truncate(4096)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(complete, daemon, model="docs-moe")
        failed = complete(daemon, model="copy", prompt="import asyncio", max_tokens=100)
        assert text(other.result()) == beside
    assert failed.status_code == 500
    error = failed.json()["error"]
    assert error["type"] == "server_error" and "experts" in error["message"]
    with experts.open("r+b") as file:
        file.write(content)
    assert text(complete(daemon, model="copy")) == healthy
    assert daemon.client.get("/health").status_code == 200


def test_a_stream_that_fails_midway_says_so_in_its_last_event(damaged: tuple[Daemon, Path]) -> None:
    daemon, bundle = damaged
    (experts,) = bundle.glob("experts*")
    asked = {**ASK, "model": "copy", "stream": True, "max_tokens": 400}
    with daemon.client.stream("POST", "/v1/completions", json=asked) as reply:
        lines = (line for line in reply.iter_lines() if line)
        next(lines)
        with experts.open("r+b") as file:
            file.truncate(4096)
        rest = list(lines)
    events = [json.loads(line[6:]) for line in rest if line.startswith("data: {")]
    assert events[-1]["error"]["type"] == "server_error"
    assert text(complete(daemon, model="docs-moe"))


def test_a_client_that_does_not_read_is_let_go(tmp_path: Path) -> None:
    with running(tmp_path, "docs-moe", "--memory", "64MiB", "--send-timeout", "0.3") as daemon:
        daemon.ready()
        many = json.dumps(
            {"model": "docs-moe", **ASK, "max_tokens": 400, "n": 16, "stream": True, "logprobs": 5}
        )
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(many)}\r\n\r\n"
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", daemon.port))
            deaf.sendall((head + many).encode())
            wait_until(lambda: daemon.stats()["requests_active"] == 1)
            wait_until(lambda: daemon.stats()["requests_active"] == 0)
        assert text(complete(daemon))


def test_it_outlives_a_lack_of_file_descriptors(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    limited = ["bash", "-c", 'ulimit -n 48; exec "$@"', "bash"]
    process = subprocess.Popen(
        limited + shell.command("serve", "docs-moe", "--port", 0, "--memory", "64MiB"),
        env=shell.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        daemon = Daemon(process).ready()
        held = [daemon.connect() for _ in range(80)]
        time.sleep(0.2)
        for one in held:
            one.close()
        assert text(complete(daemon))
        assert daemon.stop() == 0
    finally:
        process.kill()
        process.wait()
