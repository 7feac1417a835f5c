"""Forms as grammars: Lark's text, in the dialect of llguidance."""

import json
from collections.abc import Mapping
from typing import Any

from edgert.errors import InvalidArgumentError
from edgert.structured.limits import check_choices, check_lark, check_pattern, check_schema

# Between the tokens of JSON: nothing, a space, or a new line with its indentation; so a reply cannot stay there for ever.
_WHITESPACE = "( |\\n {0,16})?"

# The library's dates have a 29th of February in every year, and its times a second 60.
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = (
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_EXACT = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
_WIDEST = (1 << 63) - 1024  # of the integers that a double holds, the largest that 64 bits hold too
_VALUES = ("const", "enum", "default", "examples")  # hold no schemas


def schema_form(schema: object, where: str, *, lenient: bool = False) -> str:
    """`%json` of a schema, checked. `lenient`: what cannot be enforced is left out instead of refused."""
    checked = check_schema(schema, where)
    if checked is False:
        raise InvalidArgumentError(f"{where}: false allows nothing")
    body = {} if checked is True else _exact(checked)
    body["x-guidance"] = {
        "whitespace_flexible": True,
        "whitespace_pattern": _WHITESPACE,
        "lenient": lenient,
        "coerce_one_of": False,
    }
    return "%json " + json.dumps(body, ensure_ascii=False)


def _exact(value: Any) -> Any:
    """A schema as the library takes it at its word: with patterns in place of formats that it takes too widely, without
    what says nothing, and with constants told apart."""
    if isinstance(value, list | tuple):
        return [_exact(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    made = {key: item if key in _VALUES else _exact(item) for key, item in value.items()}
    for key, limit in (("minimum", -_WIDEST), ("maximum", _WIDEST)):
        if isinstance(made.get(key), int) and abs(made[key]) > _WIDEST:
            made[key] = limit  # tighter; only such bounds come here
    if made.get("uniqueItems") is False:
        del made["uniqueItems"]
    if "anyOf" not in made and _are_distinct_constants(made.get("oneOf")):
        made["anyOf"] = made.pop("oneOf")
    kind = made.get("format")
    if isinstance(kind, str) and kind in _EXACT:
        del made["format"]
        if "pattern" in made:
            made["allOf"] = [*made.get("allOf", ()), {"pattern": _EXACT[kind]}]
        else:
            made["pattern"] = _EXACT[kind]
    return made


def _are_distinct_constants(branches: object) -> bool:
    """Branches of oneOf, each of a constant or some, none of which two have."""
    if not isinstance(branches, list | tuple):
        return False
    seen: list[Any] = []
    for branch in branches:
        if not isinstance(branch, Mapping) or not ("const" in branch or isinstance(branch.get("enum"), list)):
            return False
        seen += [branch["const"]] if "const" in branch else branch["enum"]
    texts = [json.dumps(value, sort_keys=True) for value in seen if not isinstance(value, float)]
    return len(texts) == len(seen) == len(set(texts))


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
