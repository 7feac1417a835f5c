"""Schemas at the edges of draft 2020-12: some are refused, and whatever follows one of the others validates."""

from typing import Any

SCHEMAS: list[Any] = []


def add(*schemas: Any) -> None:
    SCHEMAS.extend(schemas)


def obj(props: dict[str, Any], req: list[str] | None = None, **k: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": props,
        "required": list(props) if req is None else req,
        "additionalProperties": False,
        **k,
    }


def st(**k: Any) -> dict[str, Any]:
    return {"type": "string", **k}


odd = [
    "",
    '"',
    "\\",
    "/",
    "\n",
    "\t\r\b\f",
    "\u0000",
    "\u001f",
    "\u007f",
    "é",
    "漢字",
    "😀",
    'a"b\\c',
    "\u2028\u2029",
    "</tool_call>",
    "<|im_end|>",
    "{}",
    "null",
    "\ufeff",
    "e\u0301",
    "\ud7ff",
    "\U0010ffff",
    " lead",
    "trail ",
    "%json",
    "/re/",
    "#c",
    "'",
    "$",
    "^a$",
    "\\n",
    "\\u0041",
]
for t in odd:
    add({"const": t}, {"enum": [t, t + "x"]}, obj({t: {"const": t}}))
add(
    {"const": {"a": [1, 2.5, None, True, {"b": "é"}]}},
    {"const": []},
    {"const": {}},
    {"const": None},
    {"const": True},
    {"const": 0},
    {"const": -1.5},
    {"const": 1e100},
    {"const": 1e-7},
    {"const": -0.0},
    {"const": 10**30},
    {"enum": [1, "1", 1.5, None, False, [], {}, [1], {"a": 1}]},
    {"enum": [0, False]},
    {"enum": [1.0, True]},
    {"enum": list(range(900))},
    {"enum": [f"k{i}" for i in range(2000)]},
    {"type": "string", "enum": ["a", 1]},
    {"type": "integer", "enum": [1, 2.5, "x"]},
    {"type": ["string", "null"], "enum": ["a", None]},
    {"const": "a", "type": "integer"},
    {"enum": ["abc", "abd"], "pattern": "d$"},
    {"enum": ["abc", "abd"], "minLength": 4},
    {"const": 5, "minimum": 6},
)
for t in ("integer", "number"):
    for k in (
        {"minimum": 0},
        {"maximum": -1},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 2},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"minimum": -5, "maximum": 5},
        {"minimum": 99, "maximum": 101},
        {"minimum": 0.1, "maximum": 0.3},
        {"minimum": 1.5, "maximum": 1.5},
        {"minimum": 7, "maximum": 3},
        {"multipleOf": 3},
        {"multipleOf": 0.1},
        {"multipleOf": 0.01, "minimum": 0, "maximum": 1},
        {"multipleOf": 7, "minimum": 10, "maximum": 20},
        {"multipleOf": 0},
        {"minimum": 1e17},
        {"minimum": 10**19, "maximum": 10**19 + 5},
        {"maximum": -(10**18)},
        {"minimum": -0.001, "maximum": 0.001},
        {"minimum": "3"},
        {"multipleOf": 2.5},
        {"exclusiveMinimum": True},
        {"minimum": 1e-30, "maximum": 1e-29},
        {"minimum": -9007199254740993, "maximum": -9007199254740991},
        {"multipleOf": 1},
        {"minimum": 0, "multipleOf": 0.25, "maximum": 2},
    ):
        add({"type": t, **k})
for options in (
    {"minLength": 3, "maxLength": 3},
    {"maxLength": 0},
    {"minLength": 0, "maxLength": 1},
    {"minLength": -1},
    {"maxLength": 2, "pattern": "^a+$"},
    {"minLength": 4, "maxLength": 6, "pattern": "^[ab]+$"},
    {"pattern": "a"},
    {"pattern": "^$"},
    {"pattern": ""},
    {"pattern": "^\\d{3}-\\d{4}$"},
    {"pattern": "^\\w+@\\w+\\.\\w{2,3}$"},
    {"pattern": "^(foo|bar|baz){2}$"},
    {"pattern": '^[^"\\\\]{3}$'},
    {"pattern": "^\\p{L}{2,4}$"},
    {"pattern": "^[\\u00e0-\\u00ff]{2}$"},
    {"pattern": "^\\S{2,5}$"},
    {"pattern": "^.{2,5}$"},
    {"pattern": "^\\s{1,2}$"},
    {"pattern": "^[\\s\\S]{1,3}$"},
    {"pattern": "(?=a)a"},
    {"pattern": "(a)\\1"},
    {"pattern": "^(?!x)y$"},
    {"pattern": "\\bword\\b"},
    {"pattern": "^(a|aa)+$", "maxLength": 9},
    {"pattern": "^((a{0,20}){0,20}){0,20}$"},
    {"pattern": "^(x+x+)+y$", "maxLength": 8},
    {"pattern": "["},
    {"pattern": "*"},
    {"pattern": "a{5,2}"},
    {"pattern": "^[a-z]{1000}$"},
    {"pattern": "^\\x41\\u0042\\cJ$"},
    {"pattern": "^a$|^b$"},
    {"pattern": "^a|b$", "maxLength": 5},
    {"pattern": "\\/", "maxLength": 5},
    {"pattern": "^\\\\$"},
    {"pattern": '^"$'},
    {"pattern": "^[\\[\\]]{2}$"},
    {"pattern": "^\\$\\d+$", "maxLength": 6},
    {"pattern": "^(?i)abc$"},
    {"pattern": "^(?<n>a)b$"},
    {"pattern": "^\\D\\W$"},
    {"pattern": "^😀{2}$"},
    {"pattern": "^[😀-😂]$"},
    {"minLength": 2, "maxLength": 2, "pattern": "^.*$"},
    {"minLength": 1.5},
    {"maxLength": "3"},
):
    add(st(**options))
for f in (
    "date",
    "time",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
    "regex",
    "json-pointer",
    "iri",
    "idn-email",
    "uri-reference",
    "unknown-thing",
    "",
):
    add(obj({"x": st(format=f)}), st(format=f, maxLength=60))
add(
    st(format="date", pattern="^2"),
    st(format="ipv4", minLength=3),
    {"format": "date"},
    {"type": ["string", "integer"], "format": "date"},
)
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
add(
    {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 2},
    {"type": "array", "maxItems": 0},
    {"type": "array", "items": False},
    {"type": "array", "items": False, "minItems": 1},
    {"type": "array", "items": DIGIT, "minItems": 3, "maxItems": 1},
    {"type": "array", "prefixItems": [DIGIT, st(maxLength=2)], "items": False},
    {"type": "array", "prefixItems": [DIGIT, st(maxLength=2)], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [DIGIT], "items": DIGIT, "maxItems": 3},
    {"type": "array", "prefixItems": [DIGIT], "minItems": 3, "maxItems": 4},
    {"type": "array", "prefixItems": [DIGIT, False]},
    {"type": "array", "items": [DIGIT, DIGIT]},
    {"type": "array", "items": DIGIT, "additionalItems": False},
    {"type": "array", "contains": DIGIT},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "uniqueItems": False, "items": DIGIT, "maxItems": 2},
    {
        "type": "array",
        "items": {"type": "array", "items": {"type": "array", "items": DIGIT, "maxItems": 2}, "maxItems": 2},
        "maxItems": 2,
    },
    {"type": "array", "items": {"enum": [[], [1], {}]}, "maxItems": 3},
    {"type": "array", "minItems": 50, "maxItems": 50, "items": {"const": 0}},
    {"type": "array", "minItems": 10**9},
    {"maxItems": 10**12, "type": "array", "items": DIGIT},
    {"items": DIGIT, "maxItems": 2},
    {"type": "array", "unevaluatedItems": False},
)
add(
    {"type": "object", "maxProperties": 0},
    {"type": "object", "additionalProperties": False},
    {"type": "object", "properties": {}},
    {"type": "object", "required": ["a"]},
    {"type": "object", "required": ["a", "b"], "additionalProperties": DIGIT},
    {"type": "object", "required": ["z"], "properties": {"a": DIGIT}, "additionalProperties": False},
    {
        "type": "object",
        "required": ["z"],
        "properties": {"a": DIGIT},
        "additionalProperties": st(maxLength=3),
    },
    {"type": "object", "properties": {"a": False}, "additionalProperties": False},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
    {"type": "object", "properties": {"a": True}, "required": ["a"], "additionalProperties": False},
    obj({"a": DIGIT, "b": DIGIT, "c": DIGIT}, []),
    obj({"a": DIGIT, "b": DIGIT, "c": DIGIT}, ["b"]),
    obj({"b": DIGIT, "a": DIGIT}, ["a", "b"]),
    {"type": "object", "patternProperties": {"^x": DIGIT}, "additionalProperties": False},
    {
        "type": "object",
        "patternProperties": {"^x": DIGIT, "y$": st(maxLength=2)},
        "additionalProperties": False,
    },
    {
        "type": "object",
        "patternProperties": {"^x": DIGIT},
        "properties": {"xa": {"maximum": 5}},
        "required": ["xa"],
        "additionalProperties": False,
    },
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "minProperties": 1},
    {"type": "object", "minProperties": 2, "maxProperties": 2, "additionalProperties": DIGIT},
    {"type": "object", "dependentRequired": {"a": ["b"]}, "properties": {"a": DIGIT, "b": DIGIT}},
    {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    {"type": "object", "unevaluatedProperties": False},
    {"properties": {"a": DIGIT}, "required": ["a"]},
    {"type": "object", "required": []},
    {"type": "object", "required": ["a", "a"], "properties": {"a": DIGIT}, "additionalProperties": False},
    {"type": "object", "properties": {"a": DIGIT}, "required": "a"},
    {"type": "object", "properties": []},
    {
        "type": "object",
        "properties": {f"p{i}": DIGIT for i in range(60)},
        "required": [f"p{i}" for i in range(60)],
        "additionalProperties": False,
    },
    {"type": "object", "properties": {f"p{i}": DIGIT for i in range(200)}, "additionalProperties": False},
    {"type": "object", "required": ['é😀"'], "additionalProperties": DIGIT},
    {"type": "object", "additionalProperties": {"type": "null"}, "properties": {"a": DIGIT}},
)
add(
    {"anyOf": [DIGIT, st(maxLength=3)]},
    {"anyOf": []},
    {"oneOf": [{"const": 1}, {"const": 2}]},
    {"oneOf": [DIGIT, {"type": "integer", "maximum": 5}]},
    {"oneOf": [DIGIT, st(maxLength=3), {"type": "null"}]},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"oneOf": [obj({"k": {"const": "a"}, "x": DIGIT}), obj({"k": {"const": "b"}, "y": DIGIT})]},
    {"oneOf": [obj({"a": DIGIT}, []), obj({"b": DIGIT}, [])]},
    {"allOf": [DIGIT, {"maximum": 3}]},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"allOf": [st(maxLength=5), st(minLength=5), {"pattern": "^[ab]*$"}]},
    {"allOf": []},
    {
        "allOf": [
            {"properties": {"a": DIGIT}, "required": ["a"]},
            {"properties": {"b": DIGIT}, "required": ["b"]},
        ],
        "type": "object",
    },
    {"allOf": [obj({"a": DIGIT}), obj({"b": DIGIT})]},
    {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}, {"not": {"const": 2}}]},
    {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]},
    {"not": {}},
    {"not": {"type": "string"}},
    {"if": {"const": 1}, "then": DIGIT},
    {
        "anyOf": [
            {"type": "object", "properties": {"a": DIGIT}, "additionalProperties": False},
            {"type": "array", "items": DIGIT, "maxItems": 1},
        ]
    },
    {"type": ["integer", "null"], "minimum": 3, "maximum": 4},
    {"type": []},
    {"type": "any"},
    {"type": ["string", "array"], "maxLength": 2, "maxItems": 1, "items": DIGIT},
    {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": DIGIT}},
    {"anyOf": [True, DIGIT]},
    {"anyOf": [False, DIGIT]},
    {"anyOf": [False, False]},
    {"type": "integer", "anyOf": [{"maximum": 3}, {"minimum": 5}], "minimum": 0, "maximum": 9},
    {
        "type": "object",
        "properties": {"a": DIGIT},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        "additionalProperties": DIGIT,
    },
    {
        "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
        "type": "object",
        "properties": {"a": DIGIT, "b": DIGIT},
        "additionalProperties": False,
    },
    {"allOf": [{"multipleOf": 2}, {"multipleOf": 3}], "type": "integer", "minimum": 0, "maximum": 50},
    {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": DIGIT}, "maximum": 2},
)
add(
    {
        "$ref": "#/$defs/n",
        "$defs": {"n": obj({"v": DIGIT, "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}})},
    },
    {"$ref": "#/definitions/x", "definitions": {"x": DIGIT}},
    {
        "$defs": {"a/b": DIGIT, "c~d": DIGIT, "e f": DIGIT, "%25": DIGIT},
        "type": "array",
        "prefixItems": [{"$ref": "#/$defs/a~1b"}, {"$ref": "#/$defs/c~0d"}],
        "items": False,
        "minItems": 2,
    },
    {"$ref": "#/$defs/e%20f", "$defs": {"e f": DIGIT}},
    {"$ref": "#anchor", "$defs": {"a": {"$anchor": "anchor", **DIGIT}}},
    {"$id": "http://x/y", "$ref": "#/$defs/a", "$defs": {"a": DIGIT}},
    {"$ref": "#/$defs/a", "$defs": {"a": DIGIT}, "maximum": 3},
    {"$ref": "#/properties/a", "properties": {"a": DIGIT}},
    {"$dynamicRef": "#x", "$defs": {"a": {"$dynamicAnchor": "x"}}},
    {
        "$defs": {"t": {"anyOf": [DIGIT, {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}]}},
        "$ref": "#/$defs/t",
    },
    {"$defs": {"t": obj({"t": {"$ref": "#/$defs/t"}})}, "$ref": "#/$defs/t"},
    {"$ref": 5},
    {"$ref": ""},
    {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "integer",
        "minimum": 0,
        "exclusiveMinimum": True,
        "maximum": 9,
    },
    {"$schema": "https://json-schema.org/draft/2020-12/schema", **DIGIT},
    {"type": "object", "properties": {"$ref": DIGIT}, "required": ["$ref"], "additionalProperties": False},
)
steps = obj(
    {
        "steps": {
            "type": "array",
            "items": obj({"explanation": st(maxLength=20), "output": st(maxLength=20)}),
            "maxItems": 2,
        },
        "final_answer": st(maxLength=20),
    }
)
add(
    steps,
    obj(
        {
            "item": {
                "anyOf": [
                    obj({"name": st(maxLength=5), "age": DIGIT}),
                    obj({"number": st(maxLength=5), "street": st(maxLength=5)}),
                ]
            }
        }
    ),
    obj({"unit": {"type": ["string", "null"], "enum": ["F", "C", None], "description": "d"}}),
    {
        "$defs": {"step": obj({"e": st(maxLength=5)})},
        **obj({"s": {"type": "array", "items": {"$ref": "#/$defs/step"}, "maxItems": 2}}),
    },
    obj(
        {"ui": {"$ref": "#/$defs/ui"}},
        None,
        **{
            "$defs": {
                "ui": obj(
                    {
                        "type": {"enum": ["div", "b"]},
                        "children": {"type": "array", "items": {"$ref": "#/$defs/ui"}, "maxItems": 1},
                    }
                )
            }
        },
    ),
)
add(
    {},
    True,
    {
        "title": "x",
        "description": "y",
        "default": 3,
        "examples": [1],
        "readOnly": True,
        "deprecated": True,
        "$comment": "c",
        **DIGIT,
    },
    {"type": "object", "x-other": 5, "properties": {"a": DIGIT}, "additionalProperties": False},
    {"type": "null"},
    {"type": "boolean"},
    {"contentEncoding": "base64", "type": "string"},
)
