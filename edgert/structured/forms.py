"""Forms as grammars: Lark's text, in the dialect of llguidance."""

import json
from collections.abc import Mapping
from typing import Any

from edgert.errors import InvalidArgumentError
from edgert.structured.limits import check_choices, check_lark, check_pattern, check_schema

# Between the tokens of JSON: nothing, a space, or a new line with its indentation; so a reply cannot stay there for ever.
_WHITESPACE = "( |\\n {0,32})?"


def schema_form(schema: object, where: str, *, lenient: bool = False) -> str:
    """`%json` of a schema, checked. `lenient`: what cannot be enforced is left out instead of refused."""
    checked = check_schema(schema, where)
    if checked is False:
        raise InvalidArgumentError(f"{where}: false allows nothing")
    body = {} if checked is True else dict(checked)
    body["x-guidance"] = {
        "whitespace_flexible": True,
        "whitespace_pattern": _WHITESPACE,
        "lenient": lenient,
        "coerce_one_of": False,
    }
    return "%json " + json.dumps(body, ensure_ascii=False)


def choice_form(choices: object, where: str) -> str:
    return "(" + " | ".join(quoted(one) for one in check_choices(choices, where)) + ")"


def pattern_form(pattern: object, where: str) -> str:
    from edgert.structured.grammar import regex_literal

    return regex_literal(check_pattern(pattern, where))


def grammar_text(grammar: str | Mapping[str, Any]) -> str:
    """The whole grammar of the option `grammar`."""
    if isinstance(grammar, str):
        return check_lark(grammar, "grammar")
    if not isinstance(grammar, Mapping) or set(grammar) != {"type", "value"}:
        raise InvalidArgumentError('grammar: allowed is Lark\'s text or {"type": ..., "value": ...}')
    kind, value = grammar["type"], grammar["value"]
    if kind == "lark":
        return check_lark(value, "grammar: value")
    if kind == "regex":
        return f"start: {pattern_form(value, 'grammar: value')}"
    if kind == "choice":
        return f"start: {choice_form(value, 'grammar: value')}"
    if kind == "json_schema":
        return f"start: {schema_form(value, 'grammar: value')}"
    raise InvalidArgumentError(
        f"grammar: type: found {kind!r:.60}, allowed are lark, regex, choice and json_schema"
    )


def quoted(text: str) -> str:
    """A literal of Lark."""
    return json.dumps(text, ensure_ascii=False)
