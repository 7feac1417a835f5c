"""Constrained decoding: odd schemas are refused by name, or hold."""

import json
from typing import Any

import jsonschema_rs
import pytest
from forms import allows, json_schema
from odd_schemas import SCHEMAS

from edgert.errors import InvalidArgumentError, UnsupportedError
from edgert.model import Model
from edgert.structured import constraint_of


@pytest.mark.parametrize("part", range(12))
def test_replies_to_odd_schemas(docs_moe: Model, part: int) -> None:
    """A reply that max_tokens cuts says nothing; most are whole."""
    whole = 0
    for number, schema in list(enumerate(SCHEMAS))[part::12]:
        form = json_schema(schema)
        try:
            constraint_of(docs_moe, response_format=form)
        except (InvalidArgumentError, UnsupportedError) as refusal:
            assert str(refusal).startswith("response_format")
            continue
        reply = docs_moe.chat(
            "Write one.", response_format=form, temperature=1.3, seed=number, max_tokens=120
        )
        if reply.finish_reason == "stop":
            whole += 1
            jsonschema_rs.Draft202012Validator(
                _of_today(schema) if isinstance(schema, dict) else schema, validate_formats=True
            ).validate(json.loads(reply.text))
    assert whole >= 15


def _of_today(schema: dict[str, Any]) -> dict[str, Any]:
    """Without what only the compiler of forms takes, in the way of older drafts."""
    made = {key: value for key, value in schema.items() if not (key == "exclusiveMinimum" and value is True)}
    if isinstance(made.get("items"), list):
        made["prefixItems"] = made.pop("items")
    if made.get("allOf") == []:
        del made["allOf"]
    if "required" in made:
        made["required"] = list(dict.fromkeys(made["required"]))
    made.pop("$schema", None)
    return made


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 0.991}]}, "multipleOf"),
        ({"type": "integer", "minimum": 2**53 + 1}, "minimum: found 9007199254740993"),
        ({"type": "integer", "exclusiveMinimum": 2**53}, "exclusiveMinimum"),
        ({"type": "integer", "minimum": 10**19, "maximum": 10**19 + 5}, "minimum"),
        ({"type": "number", "minimum": 1e-30}, "minimum: found 1e-30"),
    ],
)
def test_numbers_that_would_not_hold_are_refused(docs_moe: Model, schema: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        constraint_of(docs_moe, response_format=json_schema({"properties": {"x": schema}}))


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}, "-12", True),
        ({"type": "number", "multipleOf": 0.01, "minimum": 0}, "1.25", True),
        ({"type": "number", "multipleOf": 0.01, "minimum": 0}, "1.255", False),
        ({"oneOf": [{"const": 1}, {"const": 2, "title": "two"}, {"enum": ["x", None]}]}, "2", True),
        ({"oneOf": [{"const": 1}, {"const": 2, "title": "two"}, {"enum": ["x", None]}]}, '"x"', True),
        ({"oneOf": [{"const": 1}, {"const": 2}]}, "3", False),
        ({"type": "array", "items": {"const": 1}, "uniqueItems": False}, "[1, 1]", True),
    ],
)
def test_what_is_common_is_taken(docs_moe: Model, schema: Any, text: str, fits: bool) -> None:
    constraint = constraint_of(docs_moe, response_format=json_schema(schema))
    assert constraint is not None and allows(constraint, docs_moe, text) is fits


def test_constants_of_which_two_are_one_are_no_choice(docs_moe: Model) -> None:
    with pytest.raises(InvalidArgumentError, match="oneOf"):
        constraint_of(docs_moe, response_format=json_schema({"oneOf": [{"const": 1}, {"enum": [2, 1]}]}))
