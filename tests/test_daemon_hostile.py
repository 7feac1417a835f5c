"""Requests that are well-formed HTTP and mean harm: each is refused with a reason, or bounded, and whoever streams
beside them reads the very same as alone. What is no HTTP or no JSON is in test_daemon_http.py."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
from daemons import Daemon, running, wait_until

CHAT, COMPLETION, RESPONSES, EMBEDDINGS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
)
HELLO = {"model": "docs-moe", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
TEXT = {"model": "docs-moe", "prompt": "The os.path module", "max_tokens": 8}
EXTRA_BYTES = 64 << 20


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("home"), "docs-moe", "--memory", "64MiB") as one:
        yield one.ready()


class Neighbour(threading.Thread):
    """A client that streams one reply after the other."""

    def __init__(self, url: str, model: str = "docs-moe") -> None:
        super().__init__()
        self.url, self.model = url, model
        self.texts: list[str] = []
        self.failure: BaseException | None = None
        self.enough = threading.Event()

    def run(self) -> None:
        try:
            with httpx.Client(base_url=self.url, timeout=60) as client:
                while not self.enough.is_set() or not self.texts:
                    self.texts.append(streamed(client, self.model))
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.failure = error

    def same_as(self, alone: str) -> bool:
        """Whether all that it has read until now is what it would have read alone."""
        self.enough.set()
        self.join(60)
        if self.failure is not None:
            raise self.failure
        return set(self.texts) == {alone}


def streamed(client: httpx.Client, model: str = "docs-moe") -> str:
    asked = {**TEXT, "model": model, "max_tokens": 48, "temperature": 0, "stream": True, "ignore_eos": True}
    text = []
    with client.stream("POST", COMPLETION, json=asked) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                text += [choice["text"] for choice in json.loads(line[6:])["choices"]]
    return "".join(text)


@pytest.fixture(scope="module")
def alone(daemon: Daemon) -> str:
    return streamed(daemon.client)


@pytest.fixture(autouse=True)
def neighbour(daemon: Daemon, alone: str) -> Iterator[None]:
    """It streams meanwhile; and the daemon is as well as before, without much more memory."""
    before = psutil.Process(daemon.process.pid).memory_info().rss
    beside = Neighbour(daemon.url)
    beside.start()
    yield
    assert beside.same_as(alone)
    assert daemon.process.poll() is None
    assert daemon.client.get("/health").json() == {"status": "ok"}
    assert psutil.Process(daemon.process.pid).memory_info().rss - before < EXTRA_BYTES


def refusal(daemon: Daemon, route: str, body: Any) -> dict[str, Any]:
    """The error of a request that is refused, within 2 s where the machine is idle."""
    begun = time.monotonic()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = daemon.client.post(route, content=content, headers={"content-type": "application/json"})
    assert 400 <= reply.status_code < 500, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) < 2000
    assert time.monotonic() - begun < 20
    return error


# --- numbers and texts -------------------------------------------------------------------------------

ABSURD = [
    ("n", 10**9),
    ("n", 10**40),
    ("n", -1),
    ("n", 2.5),
    ("max_tokens", 10**9),
    ("max_tokens", 10**40),
    ("max_tokens", -1),
    ("max_tokens", True),
    ("temperature", -1),
    ("temperature", 1e300),
    ("temperature", "nan"),
    ("top_p", -0.5),
    ("top_p", 2),
    ("min_p", 7),
    ("top_k", 10**20),
    ("repetition_penalty", 0),
    ("frequency_penalty", 1e30),
    ("seed", 10**30),
    ("logit_bias", {"1": 1e300}),
    ("logit_bias", {"4294967296": 1}),
    ("stop", ["a"] * 10_000),
]


@pytest.mark.parametrize(("name", "value"), ABSURD)
def test_absurd_numbers_are_refused_by_name(daemon: Daemon, name: str, value: Any) -> None:
    for route, body in ((CHAT, HELLO), (COMPLETION, TEXT)):
        error = refusal(daemon, route, {**body, name: value})
        assert name in error["message"]


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_sampling_that_is_no_number_is_refused(daemon: Daemon, name: str, value: str) -> None:
    """JSON has no such numbers, and Python's reader takes them."""
    body = json.dumps({**TEXT, name: 0}).replace(f'"{name}": 0', f'"{name}": {value}')
    assert refusal(daemon, COMPLETION, body.encode())["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (COMPLETION, {**TEXT, "prompt": "word " * 3000}),
        (COMPLETION, {**TEXT, "prompt": "word " * 600_000}),
        (COMPLETION, {**TEXT, "prompt": [1] * 5000}),
        (CHAT, {**HELLO, "messages": [{"role": "user", "content": "word " * 3000}]}),
        (CHAT, {**HELLO, "messages": [{"role": "user", "content": "Hello"}] * 3000}),
        (RESPONSES, {"model": "docs-moe", "input": "word " * 3000}),
    ],
    ids=["text", "long text", "tokens", "message", "messages", "response"],
)
def test_a_prompt_past_the_context_is_refused(daemon: Daemon, route: str, body: Any) -> None:
    assert refusal(daemon, route, body)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("text", ["a\x00b", "\ud800", "a\udfff"], ids=["NUL", "high", "low"])
def test_texts_that_are_none_are_refused(daemon: Daemon, text: str) -> None:
    refusal(daemon, COMPLETION, {**TEXT, "prompt": text})
    refusal(daemon, CHAT, {**HELLO, "messages": [{"role": "user", "content": text}]})


# --- what would be executed, opened or fetched ---------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
        {"chat_template": "{% for a in range(10**9) %}{% endfor %}"},
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"chat_template_kwargs": {"messages": "x"}},
        {"chat_template_kwargs": {"a": {"__class__": {}}}},
    ],
)
def test_a_template_in_a_request_is_refused(daemon: Daemon, fields: dict[str, Any]) -> None:
    assert "template" in refusal(daemon, CHAT, {**HELLO, **fields})["message"]


@pytest.fixture
def trap() -> Iterator[tuple[str, list[object]]]:
    """The URL of a server, and who has come to it."""
    visitors: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                try:
                    connection, address = listening.accept()
                except TimeoutError:
                    continue
                visitors.append(address)
                connection.close()

        watching = threading.Thread(target=watch)
        watching.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/", visitors
        over.set()
        watching.join()


def media(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "file", "file": {"file_data": url}},
        {"type": "video_url", "video_url": {"url": url}},
    ]
    for part in parts:
        yield CHAT, {**HELLO, "messages": [{"role": "user", "content": [part]}]}
    image = {"type": "input_image", "image_url": url}
    yield RESPONSES, {"model": "docs-moe", "input": [{"role": "user", "content": [image]}]}


def test_media_are_neither_fetched_nor_opened(daemon: Daemon, trap: tuple[str, list[object]]) -> None:
    url, visitors = trap
    for address in (url + "a.png", "file:///etc/passwd", "data:image/png;base64,AAAA"):
        for route, body in media(address):
            assert "root:" not in str(refusal(daemon, route, body))
    assert not visitors


def test_references_are_not_fetched(daemon: Daemon, trap: tuple[str, list[object]]) -> None:
    url, visitors = trap
    for address in (
        url + "schema.json",
        url + "s#/a",
        "file:///etc/passwd",
        "other.json#/a",
        "//127.0.0.1/a",
    ):
        for key in ("$ref", "$dynamicRef"):
            for schema in (
                {key: address},
                {"type": "object", "properties": {"a": {"$id": url, "items": {key: address}}}},
            ):
                assert "nothing is fetched" in refusal(daemon, CHAT, {**HELLO, **held(schema)})["message"]
    assert not visitors


# --- forms -------------------------------------------------------------------------------------------


def held(schema: Any) -> dict[str, Any]:
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": schema, "strict": True},
        }
    }


LINKS = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(2000)}
REFUSED_SCHEMAS: dict[str, Any] = {
    "itself": {"$ref": "#"},
    "each other": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "a chain": {"$ref": "#/$defs/d0", "$defs": {**LINKS, "d2000": {"type": "null"}}},
    "nowhere": {"$ref": "#/$defs/none"},
    "a pattern that is none": {"type": "string", "pattern": "("},
    "a pattern too long": {"type": "string", "pattern": "a" * 5000},
    "a look-behind": {"type": "string", "pattern": "(?<=a)b"},
    "a schema too large": {"enum": [f"value {i}" for i in range(20_000)]},
    "nothing follows": {"type": "string", "minLength": 3, "maxLength": 1},
}


@pytest.mark.parametrize("name", REFUSED_SCHEMAS)
def test_schemas_that_cannot_be_held_are_refused(daemon: Daemon, name: str) -> None:
    assert "response_format" in refusal(daemon, CHAT, {**HELLO, **held(REFUSED_SCHEMAS[name])})["message"]


BOUNDED = {
    "(a+)+b": held({"type": "string", "pattern": "^(a+)+b$"}),
    "(a|a)*b": held({"type": "string", "pattern": "^(a|a)*b$"}),
    "counted": held({"type": "string", "pattern": "^(.{0,99}a){99}b$"}),
    "recursion": held({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
    "a million items": held({"type": "array", "items": {"type": "null"}, "minItems": 10**6}),
    "left recursion": {"grammar": 'start: start "a" | "a"'},
    "hidden left recursion": {"grammar": 'start: empty start "a" | "b"\nempty: "x"?'},
    "all recursion": {"grammar": 'start: start start | "a" |'},
    "no end": {"grammar": "start: start"},
    "counted in a grammar": {"grammar": 'start: (("a"{1,1000}){1,1000}){1,1000}'},
}


@pytest.mark.parametrize("name", BOUNDED)
def test_forms_of_much_work_are_bounded(daemon: Daemon, name: str) -> None:
    """They may be refused, or hold the reply, or end it; all in bounded time."""
    begun = time.monotonic()
    reply = daemon.client.post(CHAT, json={**HELLO, "max_tokens": 24, "temperature": 1, **BOUNDED[name]})
    assert reply.status_code == 200 or 400 <= reply.status_code < 500, reply.text
    if reply.status_code != 200:
        assert reply.json()["error"]["type"] == "invalid_request_error"
    assert time.monotonic() - begun < 20


def test_thousands_of_distinct_schemas(daemon: Daemon) -> None:
    """None is remembered for long: the fixture looks at the memory."""

    def ask(number: int) -> int:
        schema = {"type": "object", "properties": {f"field{number}": {"type": "integer"}}}
        with httpx.Client(base_url=daemon.url, timeout=60) as client:
            return sum(
                client.post(
                    CHAT, json={**HELLO, "max_tokens": 1, **held({**schema, "title": str(index)})}
                ).status_code
                for index in range(125)
            )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(16))) == [200 * 125] * 16


# --- at the same time --------------------------------------------------------------------------------


def test_clients_that_leave_within_a_stream(daemon: Daemon) -> None:
    asked = json.dumps({**TEXT, "max_tokens": 400, "stream": True, "ignore_eos": True, "n": 4}).encode()
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    for _ in range(10):
        with daemon.connect() as connection:
            connection.sendall(head % (COMPLETION.encode(), len(asked)) + asked)
            assert connection.recv(64).startswith(b"HTTP/1.1 200 ")
    wait_until(lambda: daemon.stats()["requests_active"] <= 1)  # the neighbour


def test_unloading_races_requests(tmp_path: Path, alone: str) -> None:
    """Of two models only one has room: every request loads its own anew, while the other's are under way."""
    two = ("docs-moe,name=a,memory=24MiB", "docs-moe,name=b,memory=24MiB")
    with running(tmp_path, *two, "--memory", "32MiB", "--keep-alive", "0.01") as daemon:
        daemon.ready()

        def ask(number: int) -> str:
            with httpx.Client(base_url=daemon.url, timeout=60) as client:
                return streamed(client, "ab"[number % 2])

        with ThreadPoolExecutor(6) as pool:
            assert set(pool.map(ask, range(24))) == {alone}
        loaded = [model["state"] for model in daemon.stats()["models"]]
        assert len(loaded) == 2
        assert daemon.stop() == 0
