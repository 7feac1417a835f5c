"""{"name": ..., "parameters": {...}} as the whole reply, several apart by semicolons: Llama 3.1 and later."""

from collections.abc import Sequence

from edgert.structured.families.format import CallFormat, Syntax
from edgert.structured.tools import Call, Tool, call_of, read_json

_TAG = "<|python_tag|>"


def _parse(text: str, tools: Sequence[Tool]) -> list[Call] | None:
    place, calls = len(_TAG) if text.startswith(_TAG) else 0, []
    while text[place:].strip(" \n;"):
        found = read_json(text, place + (len(text[place:]) - len(text[place:].lstrip(" \n;"))))
        if found is None:
            return None
        value, place = found
        call = call_of(
            value, "parameters" if isinstance(value, dict) and "parameters" in value else "arguments"
        )
        if call is None:
            return None
        calls.append(call)
    return calls or None


FORMAT = CallFormat(
    "llama3",
    ("{", _TAG),
    (),
    Syntax('{"name": "', '", "parameters": ', "}", separator="; "),
    _parse,
    bare=True,
)
