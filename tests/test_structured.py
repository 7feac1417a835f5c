"""Constrained decoding: schemas, grammars and calls hold, and nothing that a request says does harm."""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import structured_schemas
import tokenizers_made
from shell import Shell, assert_fails

import edgert
from edgert import _native
from edgert.errors import EdgertError, InvalidArgumentError, UnsupportedError
from edgert.structured import Constraint, ReplyParser, constraint_of
from edgert.structured.formats import CALLS
from edgert.structured.grammar import Vocabulary, vocabulary_of
from edgert.structured.limits import MAX_PATTERN_CHARACTERS
from edgert.tokenizer import Tokenizer

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "y": {"enum": ["a", "b"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def model() -> Iterator[edgert.Model]:
    with edgert.load("docs-moe", memory="64MiB", threads=1, context=512) as model:
        yield model


def json_schema(schema: object, **options: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema, **options}}


def allows(constraint: Constraint, model: edgert.Model, text: str) -> bool:
    """Whether `text` may come, and the reply may end there."""
    for token in model.tokenizer.encode(text, add_special_tokens=False):
        if not allowed(constraint, token):
            return False
        if not constraint.accept(token):
            return text.endswith(model.tokenizer.decode([token]))
    return any(allowed(constraint, token) for token in model.eos_token_ids)


def allowed(constraint: Constraint, token: int) -> bool:
    mask = constraint.mask()
    return mask is None or bool(mask[token // 8] >> token % 8 & 1)


# --- what holds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_every_reply_validates(model: edgert.Model, seed: int) -> None:
    """A few of the schemas of benchmarks/structured.py, which has the 500."""
    for schema in structured_schemas.schemas(80)[seed::10]:
        reply = model.chat(
            "Write one.", response_format=json_schema(schema), temperature=1.0, seed=seed, max_tokens=300
        )
        if reply.finish_reason == "length":
            continue
        jsonschema_rs.validate(schema, json.loads(reply.text), validate_formats=True)
    reply = model.chat(
        "Write one.", response_format=json_schema(POINT), temperature=1.0, seed=seed, max_tokens=150
    )
    assert reply.finish_reason == "stop" and set(json.loads(reply.text)) == {"x", "y"}


def test_json_object(model: edgert.Model) -> None:
    constraint = constraint_of(model, response_format={"type": "json_object"})
    assert constraint is not None and allows(constraint, model, '{"a": [1, null, "é"]}')
    for text in ("[1]", "no", '{"a": 1,}'):
        constraint = constraint_of(model, response_format={"type": "json_object"})
        assert constraint is not None and not allows(constraint, model, text)
    assert constraint_of(model, response_format={"type": "text"}) is None
    assert constraint_of(model) is None


@pytest.mark.parametrize(
    ("grammar", "text", "other"),
    [
        ({"type": "regex", "value": r"\d{3}-[a-f]+/"}, "123-abc/", "12-abc/"),
        ({"type": "regex", "value": "(a+)+b"}, "aaaab", "aaaa"),
        ({"type": "choice", "value": ["yes", 'no / "never"\n']}, 'no / "never"\n', "no"),
        ({"type": "json_schema", "value": POINT}, '{"x": 7, "y": "b"}', '{"x": 7, "y": "c"}'),
        ({"type": "lark", "value": 'start: "a" start "b" | "c"'}, "aacbb", "aacb"),
        ('start: e\ne: e "+" e | "(" e ")" | N\nN: /[0-9]+/', "1+(2+3)", "1+(2"),
        ('start: start start | "x"', "xxx", "xy"),
    ],
)
def test_grammars(model: edgert.Model, grammar: Any, text: str, other: str) -> None:
    for candidate, fits in ((text, True), (other, False)):
        constraint = constraint_of(model, grammar=grammar)
        assert constraint is not None and allows(constraint, model, candidate) is fits


def test_white_space_in_json_is_bounded(model: edgert.Model) -> None:
    schema = json_schema(POINT)
    for text, fits in (
        ('{\n  "x": 1,\n  "y": "a"\n}', True),
        ('{"x":1,"y":"a"}', True),
        ('{"x":   1', False),
    ):
        constraint = constraint_of(model, response_format=schema)
        assert constraint is not None and allows(constraint, model, text) is fits


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        ({"type": "integer"}, "-" + "1" * 19, True),
        ({"type": "integer"}, "1" * 20, False),
        ({"type": "number"}, "0." + "0" * 17, True),
        ({"type": "number"}, "0." + "0" * 18, False),
        ({"type": "number"}, "-1" + "2" * 18 + "." + "3" * 17 + "e-400", True),
        ({"type": "number"}, "1e1000", False),
        ({"type": "object"}, '{"a": [12, {"b": ' + "1" * 19 + "}]}", True),
        ({"type": "object"}, '{"a": [12, {"b": ' + "1" * 20 + "}]}", False),
        ({"type": "object"}, '{"a": "' + "1" * 40 + '", "b 1e' + "1" * 40 + '": 1}', True),
        ({"type": "string", "pattern": "^[0-9]{40}$"}, '"' + "1" * 40 + '"', True),
        ({"type": "string", "pattern": "^[0-9a-f]{40}$"}, '"' + "1" * 40 + '"', True),
        ({"const": 10**25}, str(10**25), True),
    ],
)
def test_numbers_in_json_have_an_end(model: edgert.Model, schema: Any, text: str, fits: bool) -> None:
    for constraint in (
        constraint_of(model, response_format=json_schema(schema)),
        constraint_of(model, grammar={"type": "json_schema", "value": schema}),
    ):
        assert constraint is not None and allows(constraint, model, text) is fits


@pytest.mark.parametrize("kind", ["integer", "number"])
def test_a_model_that_would_write_digits_for_ever(model: edgert.Model, kind: str) -> None:
    bias = {
        token: 100.0
        for token, text in enumerate(model.tokenizer.token_bytes())
        if text and set(text) <= set(b"1234567890")
    }
    form = {"type": "json_schema", "value": {"type": kind}}
    reply = model.generate("1", grammar=form, logit_bias=bias, max_tokens=100)
    assert reply.finish_reason == "stop"
    assert re.fullmatch(r"-?[0-9]{1,19}(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,3})?", reply.text)


def test_a_grammar_of_the_users_own_counts_no_digits(model: edgert.Model) -> None:
    constraint = constraint_of(model, grammar="start: /[0-9]+/")
    assert constraint is not None and allows(constraint, model, "1" * 40)


def test_recursion_by_reference(model: edgert.Model) -> None:
    tree = {
        "type": "object",
        "properties": {"of": {"type": "array", "items": {"$ref": "#"}}},
        "additionalProperties": False,
    }
    constraint = constraint_of(model, response_format=json_schema(tree))
    assert constraint is not None and allows(constraint, model, '{"of": [{"of": [{}, {}]}]}')


def test_a_complete_reply_ends(model: edgert.Model) -> None:
    """Without a token more, whatever ignore_eos says; a reply that max_tokens cuts says so."""
    only = {"type": "choice", "value": ["yes"]}
    reply = model.generate("Is it?", grammar=only, ignore_eos=True, max_tokens=50)
    assert (reply.text, reply.finish_reason) == ("yes", "stop")
    reply = model.generate("Is it?", grammar={"type": "regex", "value": "[a-z ]{50}"}, max_tokens=3)
    assert reply.finish_reason == "length" and len(reply.tokens) == 3


def test_bias_cannot_break_the_form(model: edgert.Model) -> None:
    (token,) = model.tokenizer.encode("no")
    reply = model.generate(
        "Is it?", grammar={"type": "choice", "value": ["yes"]}, logit_bias={token: 1e4}, logprobs=2
    )
    assert reply.text == "yes" and reply.logprobs is not None
    free = model.generate("Is it?", max_tokens=1, logprobs=2)
    assert (
        free.logprobs is not None and free.logprobs[0][1] == reply.logprobs[0][1]
    )  # of the model, not of the form


def test_the_same_seed_repeats_the_reply(model: edgert.Model) -> None:
    schema = json_schema(structured_schemas.schemas(10)[3])
    options: dict[str, Any] = {"response_format": schema, "temperature": 1.0, "seed": 5, "max_tokens": 200}
    assert model.chat("Go.", **options).tokens == model.chat("Go.", **options).tokens


def test_text_and_special_tokens_are_told_apart(model: edgert.Model) -> None:
    constraint = constraint_of(model, grammar={"type": "choice", "value": ["a<|im_end|>b"]})
    assert constraint is not None
    for token in model.tokenizer.encode("a"):
        constraint.accept(token)
    end = model.tokenizer.token_id("<|im_end|>")
    assert end is not None and not allowed(constraint, end)


@pytest.mark.parametrize(
    "make", [tokenizers_made.byte_level, tokenizers_made.sentencepiece, tokenizers_made.words]
)
def test_tokenizers_of_every_kind(make: Any) -> None:
    tokenizer = Tokenizer(make())
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size + 7, frozenset([0]))
    constraint = vocabulary.constraint("start: /[^0-9]+/", "grammar")
    mask = constraint.mask()
    assert len(mask) == (tokenizer.vocab_size + 7 + 31) // 32 * 4
    bits = [token for token in range(len(mask) * 8) if mask[token // 8] >> token % 8 & 1]
    assert bits and max(bits) < tokenizer.vocab_size
    texts = tokenizer.token_bytes()
    assert all(text and not set(text) & set(b"0123456789") for text in (texts[token] for token in bits))


def test_reasoning_stays_free(model: edgert.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgert.chat import ChatTemplate

    monkeypatch.setattr(model.tokenizer, "chat_template", ChatTemplate("<think></think>"))
    for prompt, text, fits in (
        ("<think>\n", 'Any {thing}\n</think>\n\n{"x": 1, "y": "a"}', True),
        ("<think>\n", '{"x": 1, "y": "a"}', False),
        ("", '<think>Well.</think>{"x": 1, "y": "a"}', True),
        ("", '{"x": 1, "y": "a"}', True),
        ("<think>\n\n</think>\n\n", '{"x": 1, "y": "a"}', True),
        ("<think>\n\n</think>\n\n", "<think>Well.", False),
    ):
        constraint = constraint_of(model, response_format=json_schema(POINT), prompt=prompt)
        assert constraint is not None and allows(constraint, model, text) is fits, (prompt, text)


# --- calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CALLS, "harmony"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_call_is_one(model: edgert.Model, family: str, choice: Any) -> None:
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
def test_texts_in_elements_are_free(model: edgert.Model, family: str) -> None:
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


def test_auto_holds_strict_calls_once_they_begin(model: edgert.Model) -> None:
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


def test_a_form_is_the_answers_and_calls_stand_in_its_place(model: edgert.Model) -> None:
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice: found 'maybe'"),
        ({"tool_choice": "required"}, "there are no tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "none of the tools",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, r"tools\[0\]: function: name"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "same name"),
        ({"tools": [TOOLS[1]] * 129}, "up to 128"),
        ({"tools": "weather"}, "list of up to"),
        ({"response_format": {"type": "xml"}}, "found 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "json_object"}, "grammar": 'start: "a"'}, "one form"),
        ({"grammar": 'start: "a"', "tools": TOOLS, "tool_choice": "required"}, "one form"),
        ({"grammar": {"type": "prolog", "value": "x"}}, "found 'prolog'"),
        ({"grammar": {"type": "choice", "value": []}}, "list of 1"),
        ({"grammar": ""}, "allowed is a text"),
        ({"grammar": {"type": "regex", "value": "a\0"}}, "NUL"),
        ({"grammar": {"type": "regex", "value": "a\ud800"}}, "surrogate"),
    ],
)
def test_malformed_requests(model: edgert.Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        constraint_of(model, **options)


# --- what is hostile ----------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def chain(length: int, depth: int = 0) -> dict[str, Any]:
    links: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    if depth:
        links = {name: {"anyOf": [link, nested(depth)], "items": link} for name, link in links.items()}
    return {"$defs": {**links, f"a{length}": {"type": "integer"}}, "$ref": "#/$defs/a0"}


HOSTILE_SCHEMAS: dict[str, Any] = {
    "no schema": [1],
    "remote reference": {"$ref": "http://127.0.0.1/schema.json"},
    "reference to a file": {"properties": {"a": {"$ref": "file:///etc/passwd"}}},
    "reference to nothing": {"$ref": "#/$defs/none"},
    "reference to itself": {"$ref": "#"},
    "references in a circle": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "too deep": nested(100),
    "depth of 100000": "nested",
    "a chain of references": chain(5000),
    "a deep chain": chain(200, 20),
    "too large": {"enum": [f"value {i}" for i in range(20_000)]},
    "exponential": {
        "allOf": [
            {
                "anyOf": [
                    {"properties": {f"p{i}": {"type": "integer"}}},
                    {"properties": {f"q{i}": {"type": "null"}}},
                ]
            }
            for i in range(30)
        ]
    },
    "a pattern that is none": {"type": "string", "pattern": "(("},
    "a long pattern": {"type": "string", "pattern": "a?" * MAX_PATTERN_CHARACTERS},
    "patterns that conflict": {"type": "string", "allOf": [{"pattern": "^a+$"}, {"pattern": "^b+$"}]},
    "nothing fits": {"type": "string", "minLength": 5, "maxLength": 3},
    "an empty enum": {"enum": []},
    "not supported": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "false": False,
    "not finite": {"type": "number", "minimum": float("nan")},
    "a lone surrogate": {"const": "\ud800"},
    "no JSON": {"const": {1, 2}},
}


@pytest.mark.parametrize("name", HOSTILE_SCHEMAS)
def test_hostile_schemas(model: edgert.Model, name: str) -> None:
    schema = HOSTILE_SCHEMAS[name]
    if schema == "nested":
        schema = nested(100_000)
    with pytest.raises((InvalidArgumentError, UnsupportedError), match="^response_format"):
        constraint_of(model, response_format=json_schema(schema))


HOSTILE_GRAMMARS: dict[str, Any] = {
    "none": "start",
    "an unknown name": "start: foo",
    "open brackets": "start: (((",
    "nested 5000 deep": "start: " + "(" * 5000 + '"a"' + ")" * 5000,
    "terminals in a circle": "start: A\nA: B\nB: A",
    "intersections": "start: A\nA: /.*a.{15}/ & /.*b.{14}/",
    "complements": "start: A\nA: ~/.*a.{15}/",
    "too long": "start: " + '"a" ' * 10_000,
    "a long pattern": "start: /" + "a?" * MAX_PATTERN_CHARACTERS + "/",
    "another file": "%import common.WORD\nstart: @other",
    "a nested pattern": {"type": "regex", "value": "(" * 1000 + "a" + ")" * 1000},
    "many choices": {"type": "choice", "value": ["a"] * 1001},
    "a remote reference": 'start: %json {"$ref": "http://127.0.0.1/x"}',
}


@pytest.mark.parametrize("name", HOSTILE_GRAMMARS)
def test_hostile_grammars(model: edgert.Model, name: str) -> None:
    with pytest.raises((InvalidArgumentError, UnsupportedError), match="^grammar"):
        constraint_of(model, grammar=HOSTILE_GRAMMARS[name])


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(.*a){12}.{30}b", ".*(a.{500}|b.{400}).*", "((a{1,100}b?){1,100}c?){1,100}", "(x|y)*" * 300],
)
def test_a_pattern_of_much_work_ends_its_request_alone(model: edgert.Model, pattern: str) -> None:
    """Either it runs or it is refused, at the beginning or on the way; another request does not notice."""
    start = time.monotonic()
    try:
        model.generate("Go.", grammar={"type": "regex", "value": pattern}, temperature=1.0, max_tokens=40)
    except (InvalidArgumentError, UnsupportedError) as error:
        assert "form" in str(error) or "grammar" in str(error)
    assert time.monotonic() - start < 30
    assert model.generate("Go.", grammar={"type": "choice", "value": ["yes"]}).text == "yes"


def test_thousands_of_schemas_do_not_pile_up(model: edgert.Model) -> None:
    vocabulary = vocabulary_of(model)
    for index in range(300):
        constraint_of(model, response_format=json_schema({"const": f"only {index}"}))
    assert len(vocabulary._kept) <= 16


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tokenizer = Tokenizer(tokenizers_made.byte_level())
    with pytest.raises(UnsupportedError, match=r"pip install 'edgert\[serve\]'"):
        Vocabulary(tokenizer, tokenizer.vocab_size, frozenset([0]))
    with pytest.raises(UnsupportedError, match="end-of-sequence"):
        Vocabulary(tokenizer, tokenizer.vocab_size, frozenset())


def test_one_compiled_schema_serves_many_replies(model: edgert.Model) -> None:
    """Each has a place of its own in it."""
    first = constraint_of(model, grammar={"type": "choice", "value": ["ab"]})
    second = constraint_of(model, grammar={"type": "choice", "value": ["ab"]})
    assert first is not None and second is not None
    (token,) = model.tokenizer.encode("a")
    before = bytes(second.mask() or b"")
    first.accept(token) if allowed(first, token) else None
    assert bytes(second.mask() or b"") == before


def test_an_error_on_the_way_is_typed_and_the_model_goes_on(model: edgert.Model) -> None:
    constraint = constraint_of(model, grammar={"type": "choice", "value": ["yes"]})
    assert constraint is not None
    with pytest.raises(UnsupportedError, match="form"):
        constraint.accept(model.tokenizer.encode("no")[0])
    assert model.generate("Go.", max_tokens=2).finish_reason == "length"


def test_a_mask_of_another_vocabulary(model: edgert.Model) -> None:
    sampler = _native.Sampler(_native.SamplerOptions())
    logits = memoryview(bytes(4 * 40)).cast("f")
    for mask, message in ((b"", "whole words"), (b"abc", "whole words"), (b"\0" * 8, "allows no token")):
        with pytest.raises(InvalidArgumentError, match=message):
            sampler.allow(mask)
    sampler.allow(b"\0\0\0\0\1\0\0\0")
    assert sampler.sample(logits, 0).token == 32
    sampler.allow(b"\1\0\0\0" * 3)
    with pytest.raises(InvalidArgumentError, match="found 3 words, allowed 2"):
        sampler.sample(logits, 0)
    sampler.allow(None)
    assert sampler.sample(logits, 0).token == 0


# --- the command line ---------------------------------------------------------------------------------


def test_run_with_a_schema_and_with_a_grammar(edgert: Shell, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "point.json", tmp_path / "answer.lark"
    schema.write_text(json.dumps(POINT))
    grammar.write_text('start: "yes" | "no"')
    common = (
        "docs-moe",
        "--memory",
        "64MiB",
        "--max-tokens",
        "150",
        "--temperature",
        "1",
        "-p",
        "Write one.",
    )
    run = edgert("run", *common, "--json-schema", schema)
    assert run.returncode == 0 and set(json.loads(run.stdout)) == {"x", "y"}
    assert edgert("run", *common, "--grammar", grammar).stdout in ("yes\n", "no\n")
    schema.write_text("{")
    assert_fails(edgert("run", *common, "--json-schema", schema), "point.json: not JSON")


def test_errors_are_of_the_family(model: edgert.Model) -> None:
    with pytest.raises(EdgertError):
        constraint_of(model, grammar="start: foo")
