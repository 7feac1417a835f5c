"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen2.5, Qwen3, ERNIE, Granite 4 and others."""

from collections.abc import Sequence

from edgert.structured.families.format import CallFormat, Syntax
from edgert.structured.tools import Call, Tool, call_of, read_json

_BEGIN, _END = "<tool_call>", "</tool_call>"


def _parse(text: str, tools: Sequence[Tool]) -> list[Call] | None:
    found = read_json(text, len(_BEGIN))
    if found is None or text[found[1] :].strip() != _END:
        return None
    values = found[0] if isinstance(found[0], list) else [found[0]]
    calls = [call_of(value) for value in values]
    return [call for call in calls if call is not None] if all(calls) else None


FORMAT = CallFormat(
    "hermes",
    (_BEGIN,),
    (_END,),
    Syntax(f'{_BEGIN}\n{{"name": "', '", "arguments": ', f"}}\n{_END}", separator="\n"),
    _parse,
)
