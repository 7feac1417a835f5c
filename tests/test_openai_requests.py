"""What the OpenAI routes refuse, by name; raw streams; and clients that leave. Neighbours are unharmed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import psutil  # type: ignore[import-untyped]
import pytest
from daemons import wait_until
from serving import Daemon, served

from edgert.bundle import locate
from edgert.errors import StorageError

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with served({"docs-moe": locate(None)}, parallel=8) as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def neighbour(daemon: Daemon) -> Iterator[None]:
    """The server answers after each test as it did before it."""

    def answer() -> Any:
        return daemon.post(CHAT, HELLO).json()["choices"]

    before = answer()
    yield
    assert answer() == before


def refusal(daemon: Daemon, path: str, body: Any) -> dict[str, Any]:
    """The error object of a reply that is refused."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = daemon.http.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 2000
    return error


# --- malformed --------------------------------------------------------------------------------------

NOT_JSON = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a string": b'"chat"',
    "not UTF-8": b'{"prompt": "\xff"}',
    "depth": b'{"prompt": ' + b"[" * 100_000,
    "a key twice": b'{"prompt": "a", "prompt": "b"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "a number beyond the range": b'{"prompt": "a", "temperature": 1e999}',
    "thousands of digits": b'{"prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "a lone surrogate as a key": b'{"prompt": "a", "logit_bias": {"\\udfff": 1}}',
    "NUL": b'{"prompt": "a\\u0000b"}',
    "a raw NUL": b'{"prompt": "a\0b"}',
    "many values": b'{"prompt": [' + b"1," * 400_000 + b"1]}",
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_json_is_refused(daemon: Daemon, body: bytes) -> None:
    refusal(daemon, COMPLETION, body)


WRONG: dict[str, Any] = {
    "temperature": [-0.1, 101, "1", True, [], {}],
    "top_p": [0, 1.1, "a"],
    "top_k": [-2, 1.5, 2**31],
    "min_p": [-1, 2],
    "repetition_penalty": [0, 1000],
    "presence_penalty": [-101, 101],
    "seed": [2**63, -(2**63) - 1, 0.5, "1"],
    "n": [0, -1, 17, 10**9],
    "max_tokens": [-1, 10**9, 10**30, 1.5],
    "stop": [[""], "", ["a"] * 65, "a" * 1025, 7, [None]],
    "logit_bias": [
        [],
        {"a": 1},
        {"-1": 1},
        {"1": "x"},
        {"1": 1e9},
        {"99999999": 1},
        {str(i): 1 for i in range(1025)},
    ],
    "logprobs": [-1, 21],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": 1}, {"other": True}],
    "lora": [
        [{"id": "first", "scale": 1}, {"id": "first", "scale": 0.5}],
        [{"id": 0}],
        [{"id": 0, "scale": 1}],
        [{"id": -1, "scale": 1}],
        {"id": 0, "scale": 1},
    ],
    "model": ["", 7, "a" * 300],
    "best_of": [2],
    "suffix": ["text"],
    "prompt": [7, {}, [], [[]], [1.5], ["a", 1], [1, "a"], [-1], [10**6], [[1], [10**6]], ["a"] * 65],
    "n_predict": [1],
    "chat_template": ["{{ 1 }}"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_a_field_that_is_not_as_it_should_be_is_named(daemon: Daemon, name: str, value: Any) -> None:
    error = refusal(daemon, COMPLETION, {"prompt": "a", "max_tokens": 1, name: value})
    assert name in error["message"] or name in ("prompt", "lora")


MESSAGES: dict[str, Any] = {
    "none": [],
    "no list": "Hello",
    "no role": [{"content": "a"}],
    "an unknown role": [{"role": "oracle", "content": "a"}],
    "no content": [{"role": "user"}],
    "an unknown field": [{"role": "user", "content": "a", "weight": 1}],
    "a picture": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}]}
    ],
    "a file": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
    ],
    "sound": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}],
    "an unknown part": [{"role": "user", "content": [{"type": "smell"}]}],
    "past the context": [{"role": "user", "content": "word word " * 300}],
    "far past the context": [{"role": "user", "content": "word word " * 50_000}],
    "a function of the past": [{"role": "function", "name": "f", "content": "a"}],
}


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES.keys())
def test_messages_that_are_refused(daemon: Daemon, messages: Any) -> None:
    error = refusal(daemon, CHAT, {"messages": messages})
    assert error["param"].startswith("messages")
    long = "word word" in str(messages)
    assert (error["code"] == "context_length_exceeded") == long
    assert ("maximum context length is" in error["message"]) == long  # what clients look for


CHATS: dict[str, Any] = {
    "top_logprobs alone": {"top_logprobs": 2},
    "a template": {"chat_template": "{{ ''.__class__ }}"},
    "a template as a variable": {"chat_template_kwargs": {"chat_template": "x"}},
    "messages as a variable": {"chat_template_kwargs": {"messages": "x"}},
    "an object as a variable": {"chat_template_kwargs": {"a": {}}},
    "functions": {"functions": [{"name": "f"}]},
    "sound": {"modalities": ["text", "audio"]},
    "a tool without a name": {"tools": [{"type": "function", "function": {}}]},
    "a tool of another kind": {"tools": [{"type": "web_search"}]},
    "a choice of no tool": {"tool_choice": "required"},
    "a choice of another tool": {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": {"type": "function", "function": {"name": "g"}},
    },
    "an unknown form": {"response_format": {"type": "xml"}},
    "a form without schema": {"response_format": {"type": "json_schema"}},
    "an unknown effort": {"reasoning_effort": "heroic"},
}


@pytest.mark.parametrize("fields", CHATS.values(), ids=CHATS.keys())
def test_chats_that_are_refused(daemon: Daemon, fields: dict[str, Any]) -> None:
    refusal(daemon, CHAT, {**HELLO, **fields})


RESPONSES: dict[str, Any] = {
    "previous_response_id": "resp_1",
    "conversation": "conv_1",
    "background": True,
    "truncation": "auto",
    "tools": [{"type": "web_search"}],
    "input": [
        {"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1:1/a.png"}]}
    ],
    "include": ["file_search_call.results"],
    "max_output_tokens": 0,
}


@pytest.mark.parametrize(("name", "value"), RESPONSES.items(), ids=RESPONSES.keys())
def test_responses_that_are_refused(daemon: Daemon, name: str, value: Any) -> None:
    assert name in refusal(daemon, "/v1/responses", {"input": "Hello", name: value})["message"]


def test_other_methods_and_paths(daemon: Daemon) -> None:
    assert daemon.http.get(CHAT).status_code == 405
    assert daemon.http.post("/v1/nothing", json={}).status_code == 404


FORMS: dict[str, Any] = {
    "a reference to elsewhere": {"$ref": "http://127.0.0.1:1/schema.json"},
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "a reference to itself": {"$ref": "#"},
    "a type that there is not": {"type": "thing"},
}


@pytest.mark.parametrize("schema", FORMS.values(), ids=FORMS.keys())
def test_schemas_that_are_refused(daemon: Daemon, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert "response_format" in refusal(daemon, CHAT, {**HELLO, "response_format": form})["message"]


@pytest.mark.parametrize(
    "grammar",
    [
        "start:",
        'start: start "a" | start start',
        {"type": "regex", "value": "("},
        {"type": "choice", "value": []},
    ],
)
def test_grammars_that_are_refused_or_bounded(daemon: Daemon, grammar: Any) -> None:
    reply = daemon.post(CHAT, {**HELLO, "grammar": grammar})
    assert reply.status_code in (200, 400), reply.text


def test_a_pattern_without_end_takes_no_time(daemon: Daemon) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": "^(a+)+b$"}},
        "required": ["a"],
    }
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    reply = daemon.post(CHAT, {**HELLO, "max_tokens": 40, "response_format": form})
    assert reply.status_code in (200, 400), reply.text


def test_hundreds_of_schemas_leave_no_memory_behind(daemon: Daemon) -> None:
    def ask(number: int) -> None:
        schema = {"type": "object", "properties": {f"field{number}": {"type": "integer"}}}
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        reply = daemon.post(CHAT, {**HELLO, "max_tokens": 1, "response_format": form})
        assert reply.status_code == 200, reply.text

    for number in range(200):
        ask(number)
    before = psutil.Process().memory_info().rss
    for number in range(200, 700):
        ask(number)
    assert psutil.Process().memory_info().rss - before < 32 << 20


# --- streams ----------------------------------------------------------------------------------------


def test_a_raw_stream_is_events_and_an_end(daemon: Daemon) -> None:
    with daemon.http.stream("POST", CHAT, json={**HELLO, "stream": True}) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        text = response.read().decode()
    blocks = text.split("\n\n")
    assert blocks[-1] == "" and blocks[-2] == "data: [DONE]"
    assert all(block.startswith("data: {") and "\n" not in block for block in blocks[:-2])
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    whole = daemon.post(CHAT, HELLO).json()["choices"][0]["message"]["content"]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole


def test_what_can_be_refused_is_refused_before_a_stream_begins(daemon: Daemon) -> None:
    refusal(daemon, CHAT, {"messages": [{"role": "user", "content": "word " * 100_000}], "stream": True})
    assert daemon.post(CHAT, {**HELLO, "model": "another", "stream": True}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, HELLO), (COMPLETION, {"prompt": "a"}), ("/v1/responses", {"input": "a"})]
)
def test_what_fails_later_is_the_streams_last_event(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    daemon.post(CHAT, HELLO)
    engine = daemon.models["docs-moe"].engine
    assert engine is not None
    submit = engine.submit

    def failing(tokens: Any, sampling: Any, deliver: Any, **others: Any) -> Any:
        def once(piece: Any) -> None:
            if piece.finish_reason is not None:
                job.error = StorageError("experts-00000.bin: byte 4096: could not be read")
                piece = type(piece)("", finish_reason="error")
            deliver(piece)

        job = submit(tokens, sampling, once, **others)
        return job

    with monkeypatch.context() as patch:
        patch.setattr(engine, "submit", failing)
        *_, last = daemon.events(path, body)
        whole = daemon.post(path, body)
    if path == "/v1/responses":
        assert last["type"] == "response.failed" and "byte 4096" in last["response"]["error"]["message"]
    else:
        assert "byte 4096" in last["error"]["message"] and last["error"]["type"] == "server_error"
    assert whole.status_code == 500 and "byte 4096" in whole.json()["error"]["message"]


# --- clients that leave -----------------------------------------------------------------------------


def running(daemon: Daemon) -> int:
    engine = daemon.models["docs-moe"].engine
    assert engine is not None
    stats = engine.stats()
    return int(stats["requests_running"]) + int(stats["requests_waiting"])


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("n", [1, 12])
def test_a_client_that_leaves_ends_its_work(daemon: Daemon, streamed: bool, n: int) -> None:
    """Whether it reads a stream, waits for a whole reply, or has choices that wait their turn."""
    before = daemon.state.metrics.generated_tokens.total()
    body = json.dumps(
        {"prompt": "The", "max_tokens": 100_000, "ignore_eos": True, "n": n, "stream": streamed}
    ).encode()
    host, port = daemon.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {COMPLETION} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: running(daemon))
        if streamed:
            assert connection.recv(100)
    wait_until(lambda: not running(daemon))
    wait_until(lambda: not next(iter(daemon.state.models.entries.values())).users)
    context = daemon.models["docs-moe"].model.context
    assert daemon.state.metrics.generated_tokens.total() - before < n * (context - 10)


def test_a_client_that_leaves_while_its_prompt_is_scored(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.post(CHAT, HELLO)
    model = daemon.models["docs-moe"].model
    parts: list[int] = []

    def slowly(tokens: Any, **others: Any) -> Iterator[Any]:
        for number in range(1000):
            parts.append(number)
            time.sleep(0.01)
            yield numpy.zeros((1, model.vocab_size), numpy.float32)

    with monkeypatch.context() as patch:
        patch.setattr(model, "logits_by_parts", slowly)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                daemon.url + COMPLETION,
                json={"prompt": list(range(300)), "echo": True, "logprobs": 1, "max_tokens": 1},
                timeout=0.5,
            )
        wait_until(lambda: not next(iter(daemon.state.models.entries.values())).users)
        time.sleep(0.1)
        seen = len(parts)
        time.sleep(0.1)
        assert seen == len(parts) < 300


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    with served({"docs-moe": locate(None)}, queue=1) as daemon:
        daemon.post(CHAT, HELLO)
        engine = daemon.models["docs-moe"].engine
        assert engine is not None
        assert engine.drain(10)
        reply = daemon.post(CHAT, HELLO)
        assert reply.status_code == 503 and reply.headers["retry-after"]
        assert reply.json()["error"]["code"] == "queue_full"
