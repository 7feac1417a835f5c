"""Constrained decoding: calls of functions in every family's way of writing."""

import json
from typing import Any

import jsonschema_rs
import pytest
from forms import POINT, TOOLS, allows, json_schema

from edgert.model import Model
from edgert.structured import ReplyParser, constraint_of
from edgert.structured.formats import CALLS


@pytest.fixture
def model(docs_moe: Model) -> Model:
    return docs_moe


@pytest.mark.parametrize("family", [*CALLS, "harmony"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_call_is_one(model: Model, family: str, choice: Any) -> None:
    """What the grammar of a family lets through, the family's parser reads; the arguments follow their schema."""
    constraint = constraint_of(
        model,
        tools=TOOLS,
        tool_choice=choice,
        tool_format=family,
        parallel_tool_calls=False,
        reasoning="none",
    )
    assert constraint is not None
    parser = ReplyParser.of(model, tools=TOOLS, tool_format=family, reasoning="none")
    drawn: list[int] = []
    for step in range(300):
        mask = constraint.mask()
        assert mask is not None
        bits = [token for token in range(model.vocab_size) if mask[token // 8] >> token % 8 & 1]
        end = [token for token in bits if token in model.eos_token_ids]
        token = end[0] if end else bits[step * 7919 % len(bits)]
        drawn.append(token)
        if not constraint.accept(token):
            break
    deltas = [*parser.push(model.tokenizer.decode(drawn)), *parser.finish()]
    calls = [delta for delta in deltas if delta.kind == "tool_call"]
    assert len(calls) == 1 and not any(delta.kind == "content" and delta.text.strip() for delta in deltas)
    if calls[0].name == "weather":
        jsonschema_rs.validate(TOOLS[0]["function"]["parameters"], json.loads(calls[0].text))  # type: ignore[index]
    assert calls[0].name == "weather" or choice == "required"


@pytest.mark.parametrize("family", ["qwen3_coder", "glm45", "minimax_m2"])
def test_texts_in_elements_are_free(model: Model, family: str) -> None:
    """They end at their tag; an argument that is not required may be left out, one that is may not."""
    tool = {
        "name": "say",
        "parameters": {
            "type": "object",
            "properties": {"what": {"type": "string"}, "times": {"type": "integer"}},
            "required": ["what"],
        },
    }
    tools = [{"type": "function", "function": tool}]
    written = CALLS[family].syntax
    opens, middle, closes = written.element
    what, times = f"{opens}what{middle}any\n<text>{closes}", f"{opens}times{middle}3{closes}"
    for body, expected in (
        (what, {"what": "any\n<text>"}),
        (what + times, {"what": "any\n<text>", "times": 3}),
        (times, None),
    ):
        text = f"{written.open}{written.before}say{written.between}{body}{written.after}{written.close}"
        constraint = constraint_of(model, tools=tools, tool_choice="required", tool_format=family)
        assert constraint is not None and allows(constraint, model, text) is (expected is not None)
        parser = ReplyParser.of(model, tools=tools, tool_format=family)
        (delta,) = [*parser.push(text), *parser.finish()]
        assert expected is None or json.loads(delta.text) == expected


def test_auto_holds_strict_calls_once_they_begin(model: Model) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    for text, fits in (
        ("Hello, <tool_callers>.", True),
        (call, True),
        (f"Let me see. {call}\n{call} Well.", True),
        ("Let me <tool_call>\nsee", False),
        (call.replace("Rome", "Oslo"), False),
    ):
        constraint = constraint_of(model, tools=TOOLS, tool_choice="auto")
        assert constraint is not None and allows(constraint, model, text) is fits, text
    assert constraint_of(model, tools=TOOLS, tool_choice="none") is None
    assert constraint_of(model, tools=TOOLS[1:]) is None  # nothing is strict


def test_a_form_is_the_answers_and_calls_stand_in_its_place(model: Model) -> None:
    answer = '{"x": 1, "y": "a"}'
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    for choice, tool_format, text, fits in (
        ("auto", "hermes", answer, True),
        ("auto", "hermes", call, True),
        ("auto", "hermes", call.replace("Rome", "Oslo"), False),
        ("auto", "hermes", f"Well. {answer}", False),
        ("none", "hermes", call, False),
        ("none", "hermes", answer, True),
        ("required", "hermes", call, True),
        ("required", "hermes", answer, False),
        ("auto", "llama3", answer, True),
        ("auto", "none", answer, True),
        ("auto", "harmony", f"<|channel|>final<|message|>{answer}", True),
        ("auto", "harmony", answer, False),
    ):
        constraint = constraint_of(
            model,
            response_format=json_schema(POINT),
            tools=TOOLS,
            tool_choice=choice,
            tool_format=tool_format,
            reasoning="none",
        )
        assert constraint is not None and allows(constraint, model, text) is fits, (choice, tool_format, text)
