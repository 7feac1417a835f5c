"""<|tool_call|>[{"name": ..., "arguments": {...}}]: Granite 3."""

from collections.abc import Sequence

from edgert.structured.families.format import CallFormat, Syntax
from edgert.structured.tools import Call, Tool, call_of, read_json

_BEGIN = "<|tool_call|>"


def _parse(text: str, tools: Sequence[Tool]) -> list[Call] | None:
    found = read_json(text, len(_BEGIN))
    if found is None or text[found[1] :].strip() or not isinstance(found[0], list):
        return None
    calls = [call_of(value) for value in found[0]]
    return [call for call in calls if call is not None] if calls and all(calls) else None


FORMAT = CallFormat(
    "granite",
    (_BEGIN,),
    ("]",),
    Syntax('{"name": "', '", "arguments": ', "}", f"{_BEGIN}[", "]", ", "),
    _parse,
)
