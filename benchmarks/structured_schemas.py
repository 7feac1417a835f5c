"""JSON schemas to hold replies to: written by hand, and drawn from a generator over the features that are enforced.

Strings, lists and numbers are bounded, so that a reply fits into some hundred tokens whatever the model would write.
"""

import json
import random
from typing import Any

Schema = dict[str, Any]

FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email")
PATTERNS = (
    "^[A-Z]{2}[0-9]{4}$",
    "^(red|green|blue)-[a-f0-9]{2}$",
    "^v[0-9]+\\.[0-9]+$",
    "^[a-z]+(_[a-z]+){0,2}$",
)
_MOST_VALUES = 10  # in a reply
NAMES = ("id", "name", "kind", "size", "tags", "notes", "at", "by", "été", "a b", 'quo"te', "$value")


def _object(
    properties: dict[str, Schema], required: list[str] | None = None, *, defs: dict[str, Schema] | None = None
) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
        **({"$defs": defs} if defs else {}),
    }


def _text(low: int = 0, high: int = 12) -> Schema:
    return {"type": "string", "minLength": low, "maxLength": high}


def _list(items: Schema, low: int = 0, high: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def _whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


_ADDRESS = _object({"street": _text(1), "zip": {"type": "string", "pattern": "^[0-9]{5}$"}})
BY_HAND: tuple[Schema, ...] = (
    _object({"name": _text(1), "age": _whole(0, 120)}),
    _object(
        {
            "answer": {"enum": ["yes", "no", "unsure"]},
            "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        }
    ),
    _object(
        {"steps": _list(_object({"explanation": _text(), "output": _text()}), 1), "final_answer": _text()}
    ),
    _object({"x": _whole(-5, 5), "y": _whole(-5, 5)}, ["x"]),
    {"type": "array", "items": _whole(0, 9), "minItems": 2, "maxItems": 5},
    {"type": "array", "prefixItems": [_text(), _whole(0, 3)], "items": False, "minItems": 2},
    {"enum": [1, "one", None, True, [1], {"one": 1}]},
    {"const": {"fixed": ["value", 1.5]}},
    {"type": ["integer", "null"], "minimum": 3, "maximum": 1000},
    {"anyOf": [_whole(0, 9), _text(2, 4), _object({"a": {"type": "null"}})]},
    _object(
        {"home": {"$ref": "#/$defs/address"}, "work": {"$ref": "#/$defs/address"}},
        defs={"address": _ADDRESS},
    ),
    {
        "$defs": {
            "node": _object(
                {"v": _whole(0, 9), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}, ["v"]
            )
        },
        "$ref": "#/$defs/node",
    },
    _object({"t": _list({"$ref": "#"}, 0, 1)}, []),
    _object({"when": {"type": "string", "format": "date-time"}, "id": {"type": "string", "format": "uuid"}}),
    _object({"price": {"type": "number", "exclusiveMinimum": 0, "maximum": 99.5, "multipleOf": 0.5}}),
    _object({"even": {"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 100}}),
    {
        "type": "object",
        "additionalProperties": False,
        "patternProperties": {"^[a-z]{1,6}$": _text()},
        "maxProperties": 2,
        "minProperties": 1,
    },
    {
        "type": "object",
        "patternProperties": {"^k[0-9]$": _whole(0, 9)},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    {"allOf": [_object({"a": _whole(0, 50)}), {"properties": {"a": {"minimum": 20}}}]},
    {"type": "string", "pattern": "^(a+)+b$", "maxLength": 10},
    {"type": "boolean"},
    {"type": "null"},
    _object({}),
    _object({name: _whole(0, 9) for name in NAMES[4:]}),
    {
        "oneOf": [
            _object({"kind": {"const": "cat"}, "lives": _whole(1, 9)}),
            _object({"kind": {"const": "dog"}}),
        ]
    },
)


def schemas(count: int) -> list[Schema]:
    """The first `count` of one endless list without repetitions: those by hand, then drawn ones, each of its own seed."""
    chosen = {json.dumps(schema): schema for schema in BY_HAND}
    seed = 0
    while len(chosen) < count:
        schema = _drawn(random.Random(seed))
        chosen.setdefault(json.dumps(schema), schema)
        seed += 1
    return list(chosen.values())[:count]


def _drawn(rng: random.Random) -> Schema:
    while _values(schema := _any(rng), {}) > _MOST_VALUES:
        pass
    return schema


def _values(schema: Schema, shared: dict[str, Schema]) -> int:
    """How many values a reply may hold at most."""
    shared = schema.get("$defs", shared)
    if "$ref" in schema:
        return _values(shared[schema["$ref"].removeprefix("#/$defs/")], shared)
    if "anyOf" in schema:
        return max(_values(branch, shared) for branch in schema["anyOf"])
    if "items" in schema:
        return 1 + int(schema["maxItems"]) * _values(schema["items"], shared)
    return 1 + sum(_values(value, shared) for value in schema.get("properties", {}).values())


def _any(rng: random.Random) -> Schema:
    shared = {f"part{index}": _value(rng, 1, []) for index in range(rng.randint(0, 2))}
    schema = _properties(rng, 2, list(shared)) if rng.random() < 0.85 else _value(rng, 3, list(shared))
    return {**schema, "$defs": shared} if shared else schema


def _value(rng: random.Random, depth: int, shared: list[str]) -> Schema:
    leaves = (_string, _string, _integer, _number, _choice, _plain)
    if shared and rng.random() < 0.15:
        return {"$ref": f"#/$defs/{rng.choice(shared)}"}
    if depth == 0 or rng.random() < 0.55:
        return rng.choice(leaves)(rng)
    kind = rng.randrange(4)
    if kind == 0:
        return _list(_value(rng, depth - 1, shared), rng.randint(0, 1), rng.randint(1, 3))
    if kind == 1:
        return {"anyOf": [_value(rng, depth - 1, shared) for _ in range(rng.randint(2, 3))]}
    return _properties(rng, depth - 1, shared)


def _properties(rng: random.Random, depth: int, shared: list[str]) -> Schema:
    names = rng.sample(NAMES, rng.randint(1, 3))
    required = [name for name in names if rng.random() < 0.7]
    return _object({name: _value(rng, depth, shared) for name in names}, required)


def _string(rng: random.Random) -> Schema:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "format": rng.choice(FORMATS), "maxLength": 40}
    if kind == 1:
        return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 16}
    low = rng.randint(0, 4)
    return _text(low, low + rng.randint(0, 8))


def _integer(rng: random.Random) -> Schema:
    low = rng.randint(-1000, 1000)
    schema = _whole(low, low + rng.choice((0, 3, 100, 12345)))
    if rng.random() < 0.2:
        return {**schema, "minimum": 0, "maximum": 1000, "multipleOf": rng.choice((2, 5, 7))}
    return schema


def _number(rng: random.Random) -> Schema:
    edge = "minimum" if rng.random() < 0.5 else "exclusiveMinimum"
    return {
        "type": "number",
        "minimum": 0,
        edge: 0,
        "maximum": rng.randint(1, 99),
        "multipleOf": rng.choice((0.5, 0.25)),
    }


def _choice(rng: random.Random) -> Schema:
    return {
        "enum": rng.sample(
            ["alpha", "beta", 'g"\\', "δ", "", 1, 2.5, None, True, "a much longer one"], rng.randint(1, 5)
        )
    }


def _plain(rng: random.Random) -> Schema:
    return {"type": rng.choice(("boolean", "null"))}
