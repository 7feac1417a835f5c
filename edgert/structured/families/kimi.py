"""<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>: Kimi K2."""

import re
from collections.abc import Sequence

from edgert.structured.families.format import CallFormat, Syntax
from edgert.structured.tools import Call, Tool, call_of, read_json

_OPEN, _CLOSE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_BEGIN, _ARGUMENTS, _END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ID = re.compile(r"\s*((?:functions\.)?([A-Za-z0-9_.-]+?)(?::\d+)?)\s*")


def _parse(text: str, tools: Sequence[Tool]) -> list[Call] | None:
    calls = []
    for block in text.removeprefix(_OPEN).removesuffix(_CLOSE).split(_BEGIN)[1:]:
        head, marker, rest = block.partition(_ARGUMENTS)
        body, end, after = rest.rpartition(_END)
        named, found = _ID.fullmatch(head), read_json(body)
        if (
            not marker
            or not end
            or after.strip()
            or named is None
            or found is None
            or body[found[1] :].strip()
        ):
            return None
        call = call_of({"name": named[2], "arguments": found[0], "id": named[1]})
        if call is None:
            return None
        calls.append(call)
    return calls or None


FORMAT = CallFormat(
    "kimi_k2",
    (_OPEN,),
    (_CLOSE,),
    Syntax(f"{_BEGIN}functions.", f":0{_ARGUMENTS}", _END, _OPEN, _CLOSE),
    _parse,
    markers=(_BEGIN, _ARGUMENTS, _END, _CLOSE),
)
