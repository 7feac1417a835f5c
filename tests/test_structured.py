"""Constrained decoding: what a reply is held to, it follows."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import structured_schemas
import tokenizers_made
from forms import POINT, TOOLS, allowed, allows, json_schema
from shell import Shell, assert_fails

from edgert.chat import ChatTemplate
from edgert.errors import EdgertError, InvalidArgumentError
from edgert.model import Model
from edgert.structured import constraint_of
from edgert.structured.grammar import Vocabulary
from edgert.tokenizer import Tokenizer


@pytest.fixture
def model(docs_moe: Model) -> Model:
    return docs_moe


@pytest.mark.parametrize("seed", range(4))
def test_every_reply_validates(model: Model, seed: int) -> None:
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


def test_json_object(model: Model) -> None:
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
def test_grammars(model: Model, grammar: Any, text: str, other: str) -> None:
    for candidate, fits in ((text, True), (other, False)):
        constraint = constraint_of(model, grammar=grammar)
        assert constraint is not None and allows(constraint, model, candidate) is fits


def test_white_space_in_json_is_bounded(model: Model) -> None:
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
        ({"type": "number"}, "-1" + "2" * 18 + "." + "3" * 17 + "e-40", True),
        ({"type": "number"}, "1e100", False),
        ({"type": "object"}, '{"a": [12, {"b": ' + "1" * 19 + "}]}", True),
        ({"type": "object"}, '{"a": [12, {"b": ' + "1" * 20 + "}]}", False),
        ({"type": "object"}, '{"a": "' + "1" * 40 + '", "b 1e' + "1" * 40 + '": 1}', True),
        ({"type": "string", "pattern": "^[0-9]{40}$"}, '"' + "1" * 40 + '"', True),
        ({"type": "string", "pattern": "^[0-9a-f]{40}$"}, '"' + "1" * 40 + '"', True),
        ({"const": 10**25}, str(10**25), True),
    ],
)
def test_numbers_in_json_have_an_end(model: Model, schema: Any, text: str, fits: bool) -> None:
    for constraint in (
        constraint_of(model, response_format=json_schema(schema)),
        constraint_of(model, grammar={"type": "json_schema", "value": schema}),
    ):
        assert constraint is not None and allows(constraint, model, text) is fits


@pytest.mark.parametrize("kind", ["integer", "number"])
def test_a_model_that_would_write_digits_for_ever(model: Model, kind: str) -> None:
    bias = {
        token: 100.0
        for token, text in enumerate(model.tokenizer.token_bytes())
        if text and set(text) <= set(b"1234567890")
    }
    form = {"type": "json_schema", "value": {"type": kind}}
    reply = model.generate("1", grammar=form, logit_bias=bias, max_tokens=100)
    assert reply.finish_reason == "stop"
    assert re.fullmatch(r"-?[0-9]{1,19}(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?", reply.text)


def test_a_grammar_of_the_users_own_counts_no_digits(model: Model) -> None:
    constraint = constraint_of(model, grammar="start: /[0-9]+/")
    assert constraint is not None and allows(constraint, model, "1" * 40)


def test_recursion_by_reference(model: Model) -> None:
    tree = {
        "type": "object",
        "properties": {"of": {"type": "array", "items": {"$ref": "#"}}},
        "additionalProperties": False,
    }
    constraint = constraint_of(model, response_format=json_schema(tree))
    assert constraint is not None and allows(constraint, model, '{"of": [{"of": [{}, {}]}]}')


def test_a_complete_reply_ends(model: Model) -> None:
    """Without a token more, whatever ignore_eos says; a reply that max_tokens cuts says so."""
    only = {"type": "choice", "value": ["yes"]}
    reply = model.generate("Is it?", grammar=only, ignore_eos=True, max_tokens=50)
    assert (reply.text, reply.finish_reason) == ("yes", "stop")
    reply = model.generate("Is it?", grammar={"type": "regex", "value": "[a-z ]{50}"}, max_tokens=3)
    assert reply.finish_reason == "length" and len(reply.tokens) == 3


def test_bias_cannot_break_the_form(model: Model) -> None:
    (token,) = model.tokenizer.encode("no")
    reply = model.generate(
        "Is it?", grammar={"type": "choice", "value": ["yes"]}, logit_bias={token: 1e4}, logprobs=2
    )
    assert reply.text == "yes" and reply.logprobs is not None
    free = model.generate("Is it?", max_tokens=1, logprobs=2)
    assert (
        free.logprobs is not None and free.logprobs[0][1] == reply.logprobs[0][1]
    )  # of the model, not of the form


def test_the_same_seed_repeats_the_reply(model: Model) -> None:
    schema = json_schema(structured_schemas.schemas(10)[3])
    options: dict[str, Any] = {"response_format": schema, "temperature": 1.0, "seed": 5, "max_tokens": 200}
    assert model.chat("Go.", **options).tokens == model.chat("Go.", **options).tokens


def test_text_and_special_tokens_are_told_apart(model: Model) -> None:
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


def test_reasoning_stays_free(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_malformed_requests(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        constraint_of(model, **options)


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


def test_errors_are_of_the_family(model: Model) -> None:
    with pytest.raises(EdgertError):
        constraint_of(model, grammar="start: foo")
