"""What the daemon answers to requests that are not what they should be; those beside them are unharmed."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from daemons import Daemon, received, running, wait_until

HEAD = b"Host: localhost\r\n"
PROMPT = {"model": "docs-moe", "prompt": "The os.path module", "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Limits are short, so that the tests are."""
    limits = (
        "--max-body",
        "64KiB",
        "--header-timeout",
        "0.5",
        "--body-timeout",
        "0.5",
        "--max-connections",
        "24",
    )
    with running(tmp_path_factory.mktemp("home"), "docs-moe", "--memory", "64MiB", *limits) as one:
        yield one.ready()


@pytest.fixture(scope="module")
def alone(daemon: Daemon) -> str:
    """What a well-behaved client reads when it is alone."""
    return streamed(daemon)


@pytest.fixture
def neighbour(daemon: Daemon, alone: str) -> Iterator[None]:
    """A client that streams meanwhile gets the very same, and the daemon is as well as before."""
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(streamed, daemon)
        yield
        assert beside.result(60) == alone
    assert daemon.client.get("/health").json() == {"status": "ok"}
    assert daemon.process.poll() is None


def streamed(daemon: Daemon) -> str:
    text = []
    with daemon.client.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                text += [choice["text"] for choice in json.loads(line[6:])["choices"]]
    return "".join(text)


def error(reply: Any, status: int) -> Any:
    """The error of a reply, in the shape that clients read."""
    assert reply.status_code == status, reply.text
    found = reply.json()["error"]
    assert set(found) == {"message", "type", "param", "code"} and found["message"]
    return found


def post(daemon: Daemon, content: bytes, **headers: str) -> Any:
    return daemon.client.post(
        "/v1/completions", content=content, headers={"content-type": "application/json", **headers}
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b"\xff\xfe",
        b'{"a":' * 10_000,
        b"[" * 60_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "list", "string", "nan", "twice", "not-utf8", "deep", "deeper", "digits"],
)
@pytest.mark.usefixtures("neighbour")
def test_what_is_no_json_object_is_refused(daemon: Daemon, body: bytes) -> None:
    assert error(post(daemon, body), 400)["code"] == "invalid_json"


@pytest.mark.usefixtures("neighbour")
def test_a_body_that_is_too_large_is_refused_before_it_is_read(daemon: Daemon) -> None:
    reply = daemon.raw(b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Content-Length: 99999999\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 413 ") and b"too_large" in reply


@pytest.mark.usefixtures("neighbour")
def test_a_body_in_chunks_is_counted(daemon: Daemon) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 8192

    assert error(daemon.client.post("/v1/completions", content=chunks()), 413)["code"] == "too_large"


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: -1\r\n",
        b"Content-Length: 1e3\r\n",
        b"Content-Length: 10\r\nContent-Length: 11\r\n",
        b"Content-Length: 10\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Content-Length: " + b"9" * 4000 + b"\r\n",
        b"A: " + b"b" * 60_000 + b"\r\n",
        b"".join(b"H%d: x\r\n" % number for number in range(500)),
        b"Bad\x00Name: x\r\n",
        b"Host: localhost\r\n",
    ],
    ids=["negative", "float", "two", "both", "encoding", "digits", "long", "many", "nul", "two-hosts"],
)
@pytest.mark.usefixtures("neighbour")
def test_headers_that_lie_or_are_too_many_are_refused(daemon: Daemon, head: bytes) -> None:
    reply = daemon.raw(b"POST /v1/completions HTTP/1.1\r\n" + HEAD + head + b"\r\n0123456789")
    status = int(reply.split()[1])
    assert 400 <= status < 500 or status == 501
    assert json.loads(reply.partition(b"\r\n\r\n")[2].partition(b"HTTP/1.1")[0])["error"]["message"]


@pytest.mark.usefixtures("neighbour")
def test_headers_that_come_in_one_piece_are_bounded_too(daemon: Daemon) -> None:
    for length, status in ((30_000, 200), (33_000, 431)):
        reply = daemon.raw(b"GET /health HTTP/1.1\r\n" + HEAD + b"A: " + b"b" * length + b"\r\n\r\n")
        assert int(reply.split()[1]) == status


@pytest.mark.usefixtures("neighbour")
def test_a_body_that_is_packed_is_refused_by_the_name_of_its_encoding(daemon: Daemon) -> None:
    packed = gzip.compress(json.dumps(PROMPT).encode())
    reply = daemon.client.post("/v1/completions", content=packed, headers={"Content-Encoding": "gzip"})
    assert "'gzip'" in error(reply, 415)["message"]


def test_the_first_http_has_no_host(daemon: Daemon) -> None:
    """As balancers ask for health."""
    assert daemon.raw(b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert daemon.raw(b"GET /health HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert b" 403 " in daemon.raw(b"GET /health HTTP/1.0\r\nOrigin: http://evil.example\r\n\r\n")


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    "line", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\r\n\r\n\x00", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_http_is_refused(daemon: Daemon, line: bytes) -> None:
    assert daemon.raw(line, end=True).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 408 "))


@pytest.mark.usefixtures("neighbour")
def test_chunks_that_are_no_chunks_end_the_connection(daemon: Daemon) -> None:
    reply = daemon.raw(
        b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    )
    assert reply.startswith(b"HTTP/1.1 400 ")


@pytest.mark.usefixtures("neighbour")
def test_a_body_shorter_than_stated_is_given_up(daemon: Daemon) -> None:
    reply = daemon.raw(b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Content-Length: 100\r\n\r\n{}")
    assert reply.startswith(b"HTTP/1.1 408 ")


@pytest.mark.usefixtures("neighbour")
def test_a_client_that_leaves_within_its_body_leaves_nothing_behind(daemon: Daemon) -> None:
    for _ in range(5):
        with daemon.connect() as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Content-Length: 100\r\n\r\n{}")
    wait_until(lambda: daemon.stats()["requests_active"] <= 1)  # the neighbour


@pytest.mark.usefixtures("neighbour")
def test_heads_that_come_too_slowly_are_refused(daemon: Daemon) -> None:
    with daemon.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        answered = received(connection, 5)
    assert b"HTTP/1.1 408 " in answered


@pytest.mark.usefixtures("neighbour")
def test_a_second_head_has_no_more_time_than_the_first(daemon: Daemon) -> None:
    with daemon.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + HEAD + b"\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /he")
        answered = received(connection, 5)
    assert b"HTTP/1.1 408 " in answered


def test_connections_beyond_the_limit_are_answered_503(daemon: Daemon) -> None:
    held = [daemon.connect() for _ in range(30)]
    try:
        wait_until(lambda: any(one.recv(12) == b"HTTP/1.1 503" for one in held[-1:]))
    finally:
        for one in held:
            one.close()
    wait_until(lambda: daemon.client.get("/health").status_code == 200)


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1"]
)
@pytest.mark.usefixtures("neighbour")
def test_a_name_that_is_not_the_servers_is_refused(daemon: Daemon, host: str) -> None:
    assert error(daemon.client.get("/stats", headers={"Host": host}), 403)["code"] == "host"


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8343", "127.0.0.1", "[::1]:8343", "192.168.1.7", "a.localhost"]
)
def test_names_of_this_machine_and_addresses_are_taken(daemon: Daemon, host: str) -> None:
    assert daemon.client.get("/stats", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "file://"])
@pytest.mark.usefixtures("neighbour")
def test_pages_of_other_origins_are_refused(daemon: Daemon, origin: str) -> None:
    for reply in (
        daemon.client.post("/v1/completions", json=PROMPT, headers={"Origin": origin}),
        daemon.client.options("/stats", headers={"Origin": origin, "Access-Control-Request-Method": "GET"}),
    ):
        assert error(reply, 403)["code"] == "origin"
        assert "access-control-allow-origin" not in reply.headers


def test_the_dashboards_own_origin_is_taken(daemon: Daemon) -> None:
    origin = daemon.url.rstrip("/")
    assert daemon.client.get("/stats", headers={"Origin": origin}).status_code == 200


def test_unknown_routes_and_methods(daemon: Daemon) -> None:
    error(daemon.client.get("/v2/nothing"), 404)
    error(daemon.client.delete("/health"), 405)
    error(daemon.client.get("/../../etc/passwd"), 404)
    error(daemon.client.get("/" + "x" * 5000), 404)


def test_a_model_that_is_a_path_is_only_an_unknown_name(daemon: Daemon) -> None:
    for name in (
        "/etc/passwd",
        "../docs-moe",
        "hf:org/name:file",
        "docs-moe:nothing",
        "http://x/",
    ):
        told = error(daemon.client.post("/v1/completions", json={**PROMPT, "model": name}), 404)
        assert (told["code"], told["param"]) == ("model_not_found", "model")


@pytest.mark.usefixtures("neighbour")
def test_a_client_that_leaves_cancels_its_work(daemon: Daemon) -> None:
    endless = {**PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    before = daemon.stats()["models"][0]["statistics"]["decode_tokens"]
    with daemon.client.stream("POST", "/v1/completions", json=endless) as reply:
        next(reply.iter_lines())
    wait_until(lambda: daemon.stats()["requests_active"] <= 1)
    time.sleep(0.1)
    assert daemon.stats()["models"][0]["statistics"]["decode_tokens"] - before < 300


def test_requests_are_logged_without_what_they_say(daemon: Daemon) -> None:
    reply = daemon.client.post("/v1/completions", json={**PROMPT, "prompt": "a-secret"})
    wait_until(lambda: any(reply.headers["x-request-id"] in line for line in daemon.log("request")))
    (line,) = [line for line in daemon.log("request") if reply.headers["x-request-id"] in line]
    assert "status=200" in line and "path=/v1/completions" in line
    assert "model=docs-moe" in line and "generated_tokens=24" in line
    assert not any("a-secret" in line for line in daemon.lines)
