"""Special tokens around name and arguments: DeepSeek V3 and R1 (with a fence of JSON), V3.1 and later (without)."""

import re
from collections.abc import Sequence

from edgert.structured.families.format import CallFormat, Syntax
from edgert.structured.tools import Call, Tool, call_of, read_json

_OPEN, _CLOSE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001 - their own letters
_BEGIN, _SEPARATOR, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001
_MARKERS = (_BEGIN, _SEPARATOR, _END, _CLOSE)
_FENCE = re.compile(r"([^\n]+)\n```(?:json)?\n(.*)\n```\s*", re.DOTALL)


def _parse(text: str, tools: Sequence[Tool]) -> list[Call] | None:
    calls = []
    for block in text.removeprefix(_OPEN).removesuffix(_CLOSE).split(_BEGIN)[1:]:
        head, separator, rest = block.partition(_SEPARATOR)
        body, end, after = rest.rpartition(_END)
        if not separator or not end or after.strip():
            return None
        fenced = _FENCE.fullmatch(body)
        name, arguments = (fenced[1], fenced[2]) if fenced else (head, body)
        found = read_json(arguments)
        if found is None or arguments[found[1] :].strip():
            return None
        call = call_of({"name": name.strip(), "arguments": found[0]})
        if call is None:
            return None
        calls.append(call)
    return calls or None


FENCED = CallFormat(
    "deepseek_v3",
    (_OPEN,),
    (_CLOSE,),
    Syntax(f"{_BEGIN}function{_SEPARATOR}", "\n```json\n", f"\n```{_END}", _OPEN, _CLOSE, "\n"),
    _parse,
    markers=_MARKERS,
)
PLAIN = CallFormat(
    "deepseek_v31",
    (_OPEN,),
    (_CLOSE,),
    Syntax(_BEGIN, _SEPARATOR, _END, _OPEN, _CLOSE),
    _parse,
    markers=_MARKERS,
)
