"""Constrained decoding: nothing that a request says does harm."""

import sys
from typing import Any

import pytest
import tokenizers_made
from forms import allowed, json_schema

from edgert import _native
from edgert.errors import InvalidArgumentError, UnsupportedError
from edgert.model import Model
from edgert.structured import constraint_of
from edgert.structured.grammar import Vocabulary, vocabulary_of
from edgert.structured.limits import MAX_PATTERN_CHARACTERS
from edgert.tokenizer import Tokenizer


@pytest.fixture
def model(docs_moe: Model) -> Model:
    return docs_moe


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
def test_hostile_schemas(model: Model, name: str) -> None:
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
def test_hostile_grammars(model: Model, name: str) -> None:
    with pytest.raises((InvalidArgumentError, UnsupportedError), match="^grammar"):
        constraint_of(model, grammar=HOSTILE_GRAMMARS[name])


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(.*a){12}.{30}b", ".*(a.{500}|b.{400}).*", "((a{1,100}b?){1,100}c?){1,100}", "(x|y)*" * 300],
)
def test_a_pattern_of_much_work_ends_its_request_alone(model: Model, pattern: str) -> None:
    """Either it runs or it is refused, at the beginning or on the way; another request does not notice."""
    try:
        model.generate("Go.", grammar={"type": "regex", "value": pattern}, temperature=1.0, max_tokens=40)
    except (InvalidArgumentError, UnsupportedError) as error:
        assert "form" in str(error) or "grammar" in str(error)
    assert model.generate("Go.", grammar={"type": "choice", "value": ["yes"]}).text == "yes"


def test_thousands_of_schemas_do_not_pile_up(model: Model) -> None:
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


def test_one_compiled_schema_serves_many_replies(model: Model) -> None:
    """Each has a place of its own in it."""
    first = constraint_of(model, grammar={"type": "choice", "value": ["ab"]})
    second = constraint_of(model, grammar={"type": "choice", "value": ["ab"]})
    assert first is not None and second is not None
    (token,) = model.tokenizer.encode("a")
    before = bytes(second.mask() or b"")
    first.accept(token) if allowed(first, token) else None
    assert bytes(second.mask() or b"") == before


def test_an_error_on_the_way_is_typed_and_the_model_goes_on(model: Model) -> None:
    constraint = constraint_of(model, grammar={"type": "choice", "value": ["yes"]})
    assert constraint is not None
    with pytest.raises(UnsupportedError, match="form"):
        constraint.accept(model.tokenizer.encode("no")[0])
    assert model.generate("Go.", max_tokens=2).finish_reason == "length"


def test_a_mask_of_another_vocabulary(model: Model) -> None:
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
