"""Calls of functions as rules of a grammar, in a family's way of writing them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from edgert.structured.families.format import Syntax
from edgert.structured.forms import quoted, schema_form
from edgert.structured.tools import Tool

_MAX_CALLS = 16  # in one reply


def call_rules(
    syntax: Syntax, tools: Sequence[Tool], literal: Callable[[str], str], *, many: bool
) -> list[str]:
    """The rule `body`, which is one call or more, and those that it needs."""
    names = [f"call_{index}" for index in range(len(tools))]
    separator = literal(syntax.separator)
    more = f" ({separator} call){{0,{_MAX_CALLS - 1}}}" if many else ""
    rules = [
        f"body: {literal(syntax.open)} call{more} {literal(syntax.close)}",
        f"call: {' | '.join(names)}",
    ]
    for name, tool in zip(names, tools, strict=True):
        before = literal(syntax.before + tool.name + syntax.between)
        rules.append(f"{name}: {before} {name}_arguments {literal(syntax.after)}")
        where = f"tools: {tool.name}: parameters"
        if syntax.arguments == "json":
            rules.append(f"{name}_arguments: {schema_form(tool.schema(), where, lenient=not tool.strict)}")
        else:
            rules.extend(_elements(syntax, tool, f"{name}_arguments", literal, where))
    return rules


def begun(syntax: Syntax, trigger: str) -> Syntax:
    """What is still to come of calls after their `trigger`."""
    if syntax.open:
        return replace(syntax, open=syntax.open.removeprefix(trigger))
    return replace(syntax, before=syntax.before.removeprefix(trigger))


def _elements(syntax: Syntax, tool: Tool, name: str, literal: Callable[[str], str], where: str) -> list[str]:
    """An element an argument, in the order of the schema; those that are not required may be left out."""
    opens, middle, closes = syntax.element
    schema = tool.schema()
    properties: dict[str, Any] = dict(schema.get("properties") or {})
    required = schema.get("required") or []
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts, rules = [], []
    for index, (key, value) in enumerate(properties.items()):
        one = f"{name}_{index}"
        parts.append(one if key in required else f"{one}?")
        begin = literal(f"{opens}{key}{middle}")
        if (
            isinstance(value, dict)
            and value.get("type") == "string"
            and "enum" not in value
            and "const" not in value
        ):
            rules.append(f"{one}: {begin} {one}_text")
            rules.append(f"{one}_text[suffix={quoted(closes)}]: /(?s:.*)/")
        elif isinstance(value, dict) and value.get("type") == "string":
            words = value.get("enum") or [value.get("const")]
            either = " | ".join(quoted(str(word)) for word in words)
            rules.append(f"{one}: {begin} ({either}) {literal(closes)}")
        else:
            body = {**shared, **value} if isinstance(value, dict) else value
            rules.append(f"{one}: {begin} {one}_value {literal(closes)}")
            rules.append(f"{one}_value: {schema_form(body, where, lenient=not tool.strict)}")
    return [f"{name}: {' '.join(parts) or quoted('')}", *rules]
