"""[TOOL_CALLS] and a list of {"name", "arguments"}; in later models [TOOL_CALLS]NAME[ARGS]{...}: Mistral."""

from collections.abc import Sequence

from edgert.structured.families.format import CallFormat, Syntax
from edgert.structured.tools import Call, Tool, call_of, read_json

_BEGIN, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def _parse_list(text: str, tools: Sequence[Tool]) -> list[Call] | None:
    found = read_json(text, len(_BEGIN))
    if found is None or text[found[1] :].strip() or not isinstance(found[0], list):
        return None
    calls = [call_of(value) for value in found[0]]
    return [call for call in calls if call is not None] if calls and all(calls) else None


def _parse_one(text: str, tools: Sequence[Tool]) -> list[Call] | None:
    name, marker, rest = text[len(_BEGIN) :].partition(_ARGUMENTS)
    found = read_json(rest)
    if not marker or found is None or rest[found[1] :].strip():
        return None
    name, _, call_id = name.partition(_ID)
    call = call_of({"name": name.strip(), "arguments": found[0], "id": call_id.strip() or None})
    return None if call is None else [call]


LIST = CallFormat(
    "mistral",
    (_BEGIN,),
    ("]",),
    Syntax('{"name": "', '", "arguments": ', "}", f"{_BEGIN}[", "]", ", "),
    _parse_list,
)
ONE = CallFormat(
    "mistral_args",
    (_BEGIN,),
    ("}",),
    Syntax(_BEGIN, _ARGUMENTS, ""),
    _parse_one,
    markers=(_ID, _ARGUMENTS),
)
