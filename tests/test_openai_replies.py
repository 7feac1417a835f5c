"""What replies are made of: log-probabilities of parts of characters, reasoning and calls, items and their events."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from peft_directories import lora
from serving import Daemon, served

from edgert.bundle import locate
from edgert.chat import ChatTemplate
from edgert.generation import Piece
from edgert.loading import load
from edgert.model import Model
from edgert.sampling import Sampling
from edgert.server.metrics import Metrics
from edgert.server.openai_chat import Answer
from edgert.server.openai_logprobs import CompletionLogprobs, entry
from edgert.server.openai_requests import RESPONSE
from edgert.server.openai_response_events import ResponseEvents
from edgert.server.openai_responses import as_chat
from edgert.server.openai_work import Jobs, Work
from edgert.structured import Delta, ReplyParser


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load(memory="64MiB", threads=1) as loaded:
        yield loaded


# --- log-probabilities ------------------------------------------------------------------------------


def test_a_part_of_a_character_has_its_bytes(model: Model) -> None:
    tokens = model.tokenizer.encode("x√é", add_special_tokens=False)
    pieces = [Piece("", token, -0.5, [(token, -0.5), (tokens[0], -1.0)]) for token in tokens]
    entries = [entry(model.tokenizer, piece) for piece in pieces]
    assert bytes(byte for one in entries for byte in one["bytes"]).decode() == "x√é"
    parts = [one for one in entries if "\ufffd" in one["token"]]
    assert parts, "the vocabulary has the sign whole: choose another"
    lists = CompletionLogprobs(model.tokenizer)
    for piece in pieces:
        lists.add(cast(int, piece.token), (-0.5, [(tokens[0], -1.0)]))
    names = lists.take()["tokens"]
    for one, name in zip(entries, names, strict=True):
        spelt = "bytes:" + "".join(f"\\x{byte:02x}" for byte in one["bytes"])
        assert name == (spelt if one in parts else one["token"])
    assert lists.take()["tokens"] == []


def test_a_special_token_is_named_and_infinity_is_a_number(model: Model) -> None:
    (token,) = (number for number in model.eos_token_ids if number == 2)
    one = entry(model.tokenizer, Piece("", token, float("-inf"), [(token, float("-inf"))]))
    assert one["token"] == "<|im_end|>" and one["logprob"] == -9999.0
    assert bytes(one["bytes"]) == b"<|im_end|>"


# --- parts of an answer -----------------------------------------------------------------------------


class _Parser:
    """Gives out what it is told to, a piece at a time."""

    def __init__(self, *deltas: list[Delta]) -> None:
        self._deltas = list(deltas)

    def push(self, text: str, token: int | None = None) -> list[Delta]:
        return self._deltas.pop(0)

    def finish(self) -> list[Delta]:
        return self._deltas.pop(0) if self._deltas else []


def answer(*deltas: list[Delta]) -> Answer:
    model = cast(Model, SimpleNamespace(eos_token_ids=frozenset({2})))
    return Answer(model, cast(ReplyParser, _Parser(*deltas)), wants_logprobs=False)


REASONED = (
    [Delta("reasoning", "It is ")],
    [Delta("reasoning", "raining."), Delta("content", "Rain")],
    [Delta("content", ".")],
    [Delta("tool_call", '{"a": 1}', 0, "f", "one"), Delta("tool_call", "{}", 1, "g", None)],
)
PIECES = [Piece("", 5), Piece("", 6), Piece("", 7), Piece("", 2, finish_reason="stop")]


def test_an_answer_is_taken_apart() -> None:
    one = answer(*REASONED)
    for piece in PIECES:
        one.push(piece)
    message = one.message()
    assert message["reasoning_content"] == "It is raining." and message["content"] == "Rain."
    first, second = message["tool_calls"]
    assert first == {"id": "one", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert second["id"].startswith("call_") and second["function"]["name"] == "g"
    assert one.finish_reason == "tool_calls" and one.reasoning_tokens == 2


def test_an_answer_that_only_calls_has_no_content() -> None:
    one = answer([Delta("tool_call", "{}", 0, "f", "one")])
    one.push(PIECES[-1])
    assert one.message()["content"] is None
    cut = answer([Delta("tool_call", "{}", 0, "f", "one")])
    cut.push(Piece("", 5, finish_reason="length"))
    assert cut.finish_reason == "length"


def test_items_open_and_close_in_order() -> None:
    one = answer(*REASONED)
    events = ResponseEvents({"output": [], "status": "in_progress"})
    told = events.begin()
    for piece in PIECES:
        told += events.push(*one.push(piece))
    told += events.end(one.finish_reason, {})
    assert [event["type"].removeprefix("response.") for event in told] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        *["output_item.added", "function_call_arguments.delta"],
        *["function_call_arguments.done", "output_item.done"],
        *["output_item.added", "function_call_arguments.delta"],
        *["function_call_arguments.done", "output_item.done"],
        "completed",
    ]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert [event["output_index"] for event in told if "output_index" in event] == [0] * 7 + [1] * 7 + [
        2
    ] * 4 + [3] * 4
    assert [item["type"] for item in events.response["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert told[0]["response"]["output"] == [], "an event stays as it was told"


THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{{ m.reasoning_content }}<|im_end|>
{% endfor %}<|im_start|>assistant
<think>
{% if enable_thinking is defined and not enable_thinking %}
</think>

{% endif %}"""


def test_reasoning_comes_apart_from_content() -> None:
    """By a template that opens it, unless it is told not to."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    }
    with served({"docs-moe": locate(None)}) as daemon:
        daemon.post("/v1/chat/completions", body)
        daemon.models["docs-moe"].model.tokenizer.chat_template = ChatTemplate(THINKING)
        reply = daemon.post("/v1/chat/completions", body).json()
        message = reply["choices"][0]["message"]
        assert message["reasoning_content"] and not message["content"]
        assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
        deltas = [e["choices"][0]["delta"] for e in daemon.events("/v1/chat/completions", body) if e]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
        for plain in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
            message = daemon.post("/v1/chat/completions", {**body, **plain}).json()["choices"][0]["message"]
            assert "reasoning_content" not in message and message["content"]
        output = daemon.post(
            "/v1/responses", {"input": "Hello", "max_output_tokens": 8, "ignore_eos": True}
        ).json()
        assert [item["type"] for item in output["output"]] == ["reasoning"]
        back = [{"role": "user", "content": "Hello"}, *output["output"], {"role": "user", "content": "And?"}]
        assert daemon.post("/v1/responses", {"input": back, "max_output_tokens": 1}).status_code == 200


def test_items_of_one_answer_are_one_message() -> None:
    items = [
        {"role": "user", "content": "Rain?"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "no"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "No."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Sure?"}]},
    ]
    fields = RESPONSE.check({"input": items, "instructions": "Be brief."}, "")
    system, user, call, told, answered, again = as_chat(fields)["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user == {"role": "user", "content": "Rain?"}
    assert call["reasoning_content"] == "Look." and call["tool_calls"][0]["function"]["name"] == "weather"
    assert told == {"role": "tool", "tool_call_id": "c1", "content": "no"}
    assert answered == {"role": "assistant", "content": "No."}
    assert again == {"role": "user", "content": "Sure?"}


# --- adapters ---------------------------------------------------------------------------------------


def test_an_adapter_is_chosen_by_name_or_by_number(tiny_bundle: Path, tmp_path: Path) -> None:
    paths = {"one": lora(1).write(tmp_path / "one"), "two": lora(2).write(tmp_path / "two")}
    with served({"tiny": tiny_bundle}, adapters=paths) as daemon:
        plain = _tokens(daemon, "tiny")
        one, two = _tokens(daemon, "tiny:one"), _tokens(daemon, "tiny:two")
        assert plain != one != two != plain
        assert _tokens(daemon, "tiny", lora=[{"id": 0, "scale": 1.0}]) == one
        assert _tokens(daemon, "tiny", lora=[{"id": "two", "scale": 1}]) == two
        assert _tokens(daemon, "tiny", lora=[{"id": 1, "scale": 0}]) == plain
        assert _tokens(daemon, "tiny", lora=[{"id": 1, "scale": 10_000}])  # as POST /lora-adapters takes it
        assert _tokens(daemon, "tiny") == plain
        cards = {card["id"]: card["parent"] for card in daemon.http.get("/v1/models").json()["data"]}
        assert cards == {"tiny": None, "tiny:one": "tiny", "tiny:two": "tiny"}
        assert daemon.http.get("/v1/models/tiny:two").json()["id"] == "tiny:two"
        both = {"model": "tiny:one", "prompt": [3, 4], "lora": [{"id": 1, "scale": 1}]}
        assert daemon.post("/v1/completions", both).status_code == 400
        assert daemon.post("/v1/completions", {"model": "tiny:three", "prompt": [3]}).status_code == 404
        none = {"model": "tiny", "prompt": [3, 4], "lora": [{"id": "three", "scale": 1}]}
        assert daemon.post("/v1/completions", none).status_code == 404
        scored = {"prompt": [3, 4, 5], "echo": True, "logprobs": 0, "max_tokens": 0}
        first = daemon.post("/v1/completions", {**scored, "model": "tiny:one"}).json()
        other = daemon.post("/v1/completions", {**scored, "model": "tiny"}).json()
        assert first["choices"][0]["logprobs"] != other["choices"][0]["logprobs"]


def test_a_client_that_leaves_while_its_adapter_is_read_ends_what_begins_then() -> None:
    reading, begun, cancelled = threading.Event(), threading.Event(), threading.Event()

    def submit(*_: Any, **__: Any) -> Any:
        reading.set()
        assert begun.wait(30)
        return SimpleNamespace(cancel=cancelled.set)

    loaded: Any = SimpleNamespace(
        engine=SimpleNamespace(submit=submit), model=SimpleNamespace(name="tiny"), adapters=("one",)
    )

    async def work() -> None:
        jobs = Jobs(loaded, "one", [Work([3], Sampling())], Metrics())
        entering = asyncio.ensure_future(jobs.__aenter__())
        while not reading.is_set():
            await asyncio.sleep(0)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        begun.set()
        while not cancelled.is_set():
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(work(), 30))


def _tokens(daemon: Daemon, model: str, **others: Any) -> list[str]:
    body = {"model": model, "prompt": list(range(3, 20)), "max_tokens": 12, "temperature": 0, "logprobs": 0}
    reply = daemon.post("/v1/completions", {**body, "ignore_eos": True, **others})
    assert reply.status_code == 200, reply.text
    tokens: list[str] = reply.json()["choices"][0]["logprobs"]["tokens"]
    return tokens


# --- the state of a neighbour -----------------------------------------------------------------------


def test_many_at_once_get_what_each_would_get_alone() -> None:
    """Streams, whole replies, schemas and refusals beside one another."""
    from concurrent.futures import ThreadPoolExecutor

    def ask(daemon: Daemon, number: int) -> Any:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": f"What is the number {number}?"}],
            "max_tokens": 12,
            "temperature": 0.8,
            "seed": number,
        }
        if number % 5 == 1:
            body["temperature"] = -1
        if number % 5 == 2:
            schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
            body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
        if number % 5 == 3:
            events = daemon.events("/v1/chat/completions", body)
            return [event["choices"][0]["delta"].get("content") for event in events if event]
        if number % 5 == 4:
            scored = {
                "prompt": [number, 5, 6, 7],
                "echo": True,
                "logprobs": 1,
                "max_tokens": 2,
                "temperature": 0,
            }
            return daemon.post("/v1/completions", scored).json()["choices"]
        reply = daemon.post("/v1/chat/completions", body)
        return reply.json().get("choices") or reply.status_code

    with served({"docs-moe": locate(None)}, parallel=2) as daemon:
        alone = [ask(daemon, number) for number in range(15)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda number: ask(daemon, number), range(15)))
        assert together == alone
