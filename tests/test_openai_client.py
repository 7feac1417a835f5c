"""OpenAI's own Python client against the daemon."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from daemons import running
from openai import OpenAI
from serving import Daemon, served, words

import edgert
from edgert.bundle import locate
from edgert.model import Model

QUESTION = [{"role": "user", "content": "What does the open function return?"}]
PROMPT = "The module reads the file"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Rome", "Oslo"]},
                "days": {"type": "integer", "minimum": 0, "maximum": 5},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with served(
        {"docs-moe": locate(None), "words": words(tmp_path_factory.mktemp("words"))}, parallel=8
    ) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> OpenAI:
    return OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with edgert.load(memory="64MiB", threads=1) as loaded:
        yield loaded


def ask(client: OpenAI, **others: Any) -> Any:
    options = {"model": "docs-moe", "messages": QUESTION, "temperature": 0, "max_tokens": 24, **others}
    return client.chat.completions.create(**options)


# --- chat -------------------------------------------------------------------------------------------


def test_a_chat_is_the_models_own(client: OpenAI, model: Model) -> None:
    expected = model.chat(QUESTION, temperature=0, max_tokens=24)
    reply = ask(client)
    (choice,) = reply.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert reply.usage.prompt_tokens == expected.statistics["prompt_tokens"]
    assert reply.usage.completion_tokens == len(expected.tokens)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens >= 0
    assert reply.id.startswith("chatcmpl-") and reply.system_fingerprint.startswith("fp_")


def test_a_stream_says_the_same_and_counts_when_asked(client: OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_choices_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        reply = ask(client, temperature=1.5, n=3, seed=seed)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        return [choice.message.content for choice in reply.choices]

    first = texts(-7)
    assert len(set(first)) == 3
    assert texts(-7) == first
    assert texts(8) != first


def test_streamed_choices_come_apart_by_their_index(client: OpenAI) -> None:
    whole = ask(client, temperature=1.0, n=2, seed=4)
    texts = ["", ""]
    for chunk in ask(client, temperature=1.0, n=2, seed=4, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_a_stop_string_ends_the_answer(client: OpenAI) -> None:
    whole = ask(client).choices[0].message.content
    stop = whole[8:12]
    reply = ask(client, stop=[stop, "never seen"])
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_logprobs_are_of_the_tokens_and_their_bytes(client: OpenAI, model: Model) -> None:
    expected = model.chat(QUESTION, temperature=0, max_tokens=4, logprobs=3)
    (choice,) = ask(client, max_tokens=4, logprobs=True, top_logprobs=3).choices
    assert expected.logprobs is not None
    assert len(choice.logprobs.content) == 4
    for entry, (logprob, top) in zip(choice.logprobs.content, expected.logprobs, strict=True):
        assert entry.logprob == pytest.approx(logprob, abs=1e-5)
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx([one for _, one in top])
        assert bytes(entry.bytes).decode() == entry.token
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    streamed = [
        entry.token
        for chunk in ask(client, max_tokens=4, logprobs=True, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == [entry.token for entry in choice.logprobs.content]


def test_a_bias_and_penalties_change_what_is_drawn(client: OpenAI, model: Model) -> None:
    plain = ask(client).choices[0].message.content
    first = model.chat(QUESTION, temperature=0, max_tokens=1).tokens[0]
    assert not ask(client, logit_bias={str(first): -100}).choices[0].message.content.startswith(plain[:3])
    assert ask(client, extra_body={"repetition_penalty": 3.0}).choices[0].message.content != plain
    assert ask(client, presence_penalty=2.0, frequency_penalty=2.0).choices[0].message.content != plain


def test_the_widely_used_extensions(client: OpenAI) -> None:
    plain = ask(client).choices[0].message.content
    assert ask(client, temperature=1.5, extra_body={"top_k": 1}).choices[0].message.content == plain
    assert ask(client, temperature=1.5, extra_body={"min_p": 1.0}).choices[0].message.content == plain
    reply = ask(client, max_tokens=200, extra_body={"ignore_eos": True, "top_k": -1})
    assert reply.usage.completion_tokens == 200
    reply = ask(client, max_tokens=openai.omit, max_completion_tokens=2)
    assert reply.usage.completion_tokens == 2 and reply.choices[0].finish_reason == "length"


def test_what_a_client_sends_along_is_taken(client: OpenAI) -> None:
    first = ask(
        client, user="someone", metadata={"a": "b"}, store=True, service_tier="auto", prompt_cache_key="k"
    ).choices[0]
    again = [
        *QUESTION,
        first.message.model_dump(),
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    assert ask(client, messages=again).choices[0].message.content


# --- forms and tools --------------------------------------------------------------------------------


def test_an_answer_follows_its_schema(client: OpenAI) -> None:
    class Trip(pydantic.BaseModel):
        city: Literal["Rome", "Oslo"]
        days: int = pydantic.Field(ge=0, le=5)

    for seed in range(3):
        reply = client.chat.completions.parse(
            model="docs-moe",
            messages=[{"role": "user", "content": "Where to?"}],
            response_format=Trip,
            temperature=1,
            seed=seed,
            max_tokens=80,
        )
        assert isinstance(reply.choices[0].message.parsed, Trip)
    answer = client.responses.parse(
        model="docs-moe", input="Where to?", text_format=Trip, temperature=1, max_output_tokens=80
    )
    assert isinstance(answer.output_parsed, Trip)
    text = ask(client, response_format={"type": "text"}).choices[0].message.content
    assert text == ask(client).choices[0].message.content


def test_a_grammar_holds_a_completion(client: OpenAI) -> None:
    reply = client.completions.create(
        model="docs-moe",
        prompt="The answer is ",
        temperature=2,
        n=4,
        extra_body={"grammar": {"type": "regex", "value": "[0-9]{3}"}},
    )
    assert all(len(choice.text) == 3 and choice.text.isdigit() for choice in reply.choices)


def test_a_tool_is_called_when_it_has_to_be(client: OpenAI) -> None:
    def called(**others: Any) -> Any:
        return ask(client, tools=[WEATHER], parallel_tool_calls=False, max_tokens=200, **others)

    (choice,) = called(tool_choice="required").choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "weather" and call.id
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    named = {"type": "function", "function": {"name": "weather"}}
    deltas = [chunk.choices[0] for chunk in called(tool_choice=named, stream=True)]
    (streamed,) = [one for choice in deltas for one in choice.delta.tool_calls or ()]
    assert streamed.index == 0 and streamed.function.name == "weather"
    assert json.loads(streamed.function.arguments).keys() == {"city", "days"}
    assert deltas[-1].finish_reason == "tool_calls"
    assert not called(tool_choice="none").choices[0].message.tool_calls
    answer = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    told = ask(client, tools=[WEATHER], messages=[*QUESTION, choice.message.model_dump(), answer])
    assert told.choices[0].finish_reason in ("stop", "length")


def test_a_response_calls_functions_too(client: OpenAI) -> None:
    tool = {"type": "function", **WEATHER["function"]}
    options: dict[str, Any] = {
        "model": "docs-moe",
        "input": "Rain?",
        "tools": [tool],
        "tool_choice": {"type": "function", "name": "weather"},
        "temperature": 0,
    }
    (call,) = client.responses.create(**options).output
    assert call.type == "function_call" and json.loads(call.arguments).keys() == {"city", "days"}
    kinds = [event.type for event in client.responses.create(**options, stream=True)]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    again = [{"role": "user", "content": "Rain?"}, call.model_dump(), output]
    assert client.responses.create(model="docs-moe", input=again, max_output_tokens=4).output_text


# --- completions ------------------------------------------------------------------------------------


def test_a_completion_is_the_models_own(client: OpenAI, model: Model) -> None:
    expected = model.generate(PROMPT, temperature=0, max_tokens=10)
    reply = client.completions.create(model="docs-moe", prompt=PROMPT, temperature=0, max_tokens=10)
    assert reply.choices[0].text == expected.text
    tokens = model.tokenizer.encode(PROMPT)
    by_ids = client.completions.create(model="docs-moe", prompt=tokens, temperature=0, max_tokens=10)
    assert by_ids.choices[0].text == expected.text
    assert by_ids.usage is not None and by_ids.usage.prompt_tokens == len(tokens)
    unstated = client.completions.create(model="docs-moe", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert unstated.usage is not None and unstated.usage.completion_tokens == 16


def test_several_prompts_each_get_their_choices(client: OpenAI, model: Model) -> None:
    prompts = [PROMPT, "A list", "The thread", *(f"The number {n}" for n in range(8))]
    expected = [model.generate(prompt, temperature=0, max_tokens=4).text for prompt in prompts]
    reply = client.completions.create(model="docs-moe", prompt=prompts, temperature=0, max_tokens=4)
    assert [choice.text for choice in reply.choices] == expected
    lists = [model.tokenizer.encode(prompt) for prompt in prompts]
    twice = client.completions.create(model="docs-moe", prompt=lists, temperature=0, max_tokens=4, n=2)
    assert [choice.text for choice in twice.choices[::2]] == expected
    assert [choice.index for choice in twice.choices] == list(range(2 * len(prompts)))
    texts = [""] * len(prompts)
    for chunk in client.completions.create(
        model="docs-moe", prompt=prompts, temperature=0, max_tokens=4, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_an_echo_tells_how_likely_the_prompt_was(client: OpenAI, model: Model) -> None:
    tokens = model.tokenizer.encode(PROMPT)
    reply = client.completions.create(
        model="docs-moe", prompt=PROMPT, echo=True, logprobs=2, max_tokens=0, temperature=0
    )
    (choice,) = reply.choices
    assert choice.text == PROMPT and choice.finish_reason == "length"
    scored = choice.logprobs
    assert scored is not None and scored.tokens and scored.token_logprobs and scored.top_logprobs
    assert "".join(scored.tokens) == PROMPT
    assert scored.text_offset == [len("".join(scored.tokens[:i])) for i in range(len(tokens))]
    assert scored.token_logprobs[0] is None
    logits = model.logits(tokens)
    for index in range(1, len(tokens)):
        row = logits[index - 1].astype(float)
        expected = row[tokens[index]] - math.log(sum(math.exp(x - row.max()) for x in row)) - row.max()
        assert scored.token_logprobs[index] == pytest.approx(expected, abs=1e-5)
        assert 2 <= len(scored.top_logprobs[index]) <= 3
        assert scored.top_logprobs[index][scored.tokens[index]] == scored.token_logprobs[index]


def test_an_echo_with_a_continuation_is_one_text(client: OpenAI, model: Model) -> None:
    expected = model.generate(PROMPT, temperature=0, max_tokens=3, logprobs=0)
    options: dict[str, Any] = {
        "model": "docs-moe",
        "prompt": PROMPT,
        "echo": True,
        "logprobs": 0,
        "max_tokens": 3,
        "temperature": 0,
    }
    (choice,) = client.completions.create(**options).choices
    assert choice.text == PROMPT + expected.text
    assert expected.logprobs is not None and choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[-3:] == pytest.approx(
        [one for one, _ in expected.logprobs], abs=1e-5
    )
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text


# --- models, embeddings -----------------------------------------------------------------------------


def test_models_are_listed_and_found(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["docs-moe", "words"]
    assert client.models.retrieve("words").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_embeddings_are_the_encoders_own(client: OpenAI, daemon: Daemon) -> None:
    texts = ["w0 w4", "w1 w2 w3"]
    reply = client.embeddings.create(model="words", input=texts)  # base64 on the way
    expected = daemon.models["words"].model.embed(texts)
    for row, vector in zip(reply.data, expected, strict=True):
        assert row.embedding == pytest.approx(vector.tolist())
    assert reply.usage.prompt_tokens == sum(
        len(daemon.models["words"].model.tokenizer.encode(text)) for text in texts
    )
    many = client.embeddings.create(model="words", input=[f"w{n % 9}" for n in range(100)])
    assert [row.index for row in many.data] == list(range(100))
    assert many.data[0].embedding == many.data[90].embedding != many.data[1].embedding
    short = client.embeddings.create(model="words", input="w0 w4", dimensions=3, encoding_format="float")
    assert len(short.data[0].embedding) == 3
    raw = daemon.post(
        "/v1/embeddings", {"model": "words", "input": "w0 w4", "encoding_format": "base64"}
    ).json()
    packed = base64.b64decode(raw["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(packed) // 4}f", packed)) == pytest.approx(expected[0].tolist())


def test_a_model_that_embeds_writes_no_text_and_the_other_way_round(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="encoder|chat template"):
        client.chat.completions.create(model="words", messages=[{"role": "user", "content": "Hello"}])
    with pytest.raises(openai.BadRequestError, match="encoder"):
        client.completions.create(model="words", prompt="Hello")
    with pytest.raises(openai.BadRequestError, match="embeds no text"):
        client.embeddings.create(model="docs-moe", input="Hello")


# --- responses --------------------------------------------------------------------------------------


def test_a_response_is_the_chats_answer(client: OpenAI, model: Model) -> None:
    expected = model.chat(QUESTION, temperature=0, max_tokens=24)
    reply = client.responses.create(
        model="docs-moe", input=str(QUESTION[0]["content"]), temperature=0, max_output_tokens=24
    )
    assert reply.output_text == expected.text
    assert reply.status == ("completed" if expected.finish_reason == "stop" else "incomplete")
    assert reply.usage is not None and reply.usage.output_tokens == len(expected.tokens)
    told = client.responses.create(
        model="docs-moe",
        instructions="Be brief.",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
        temperature=0,
        max_output_tokens=2,
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert told.output_text == model.chat(messages, temperature=0, max_tokens=2).text
    assert told.status == "incomplete"
    assert told.incomplete_details is not None and told.incomplete_details.reason == "max_output_tokens"


def test_the_events_of_a_response_come_in_their_order(client: OpenAI) -> None:
    with client.responses.stream(
        model="docs-moe", input=str(QUESTION[0]["content"]), temperature=0, max_output_tokens=24
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events if not event.type.endswith("delta")]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text


# --- errors -----------------------------------------------------------------------------------------


def test_errors_are_the_clients_own(client: OpenAI, model: Model) -> None:
    with pytest.raises(openai.NotFoundError, match="docs-moe"):
        ask(client, model="another")
    with pytest.raises(openai.NotFoundError, match="adapter"):
        ask(client, model="docs-moe:legal")
    with pytest.raises(openai.BadRequestError) as too_long:
        ask(client, messages=[{"role": "user", "content": "word " * 2 * model.context}])
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(client, temperature=-1)
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="docs-moe", prompt="a", suffix="b")
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="docs-moe", input="a", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="chat_template"):
        ask(client, extra_body={"chat_template": "{{ 1 }}"})


def test_a_key_is_asked_for_where_there_is_one(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-some-length\n")
    with running(tmp_path, locate(None), "--api-key-file", keys) as daemon:
        daemon.ready()
        asked = OpenAI(base_url=f"{daemon.url.rstrip('/')}/v1", api_key="a-key-of-some-length")
        assert [model.id for model in asked.models.list()] == ["docs-moe"]
        with pytest.raises(openai.AuthenticationError):
            asked.with_options(api_key="another-key-of-this-length").models.list()
