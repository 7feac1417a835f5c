"""Calls whose arguments are elements of their own: Qwen3-Coder, GLM 4.5 and MiniMax M2."""

import re
from collections.abc import Sequence

from edgert.structured.families.format import CallFormat, Parse, Syntax
from edgert.structured.tools import Call, Tool, json_text, value_of


def _parser(call: str, argument: str, newlines: bool) -> Parse:
    """`call`: a pattern of one call, its name and its body; `argument`: of one argument, its key and its value."""
    calls, arguments = re.compile(call, re.DOTALL), re.compile(argument, re.DOTALL)

    def parse(text: str, tools: Sequence[Tool]) -> list[Call] | None:
        found, place = [], 0
        for one in calls.finditer(text):
            if text[place : one.start()].strip():
                return None
            place = one.end()
            made = _call(one["name"].strip(), one["body"], arguments, newlines, tools)
            if made is None:
                return None
            found.append(made)
        return None if text[place:].strip() or not found else found

    return parse


def _call(
    name: str, body: str, argument: re.Pattern[str], newlines: bool, tools: Sequence[Tool]
) -> Call | None:
    tool = next((tool for tool in tools if tool.name == name), Tool(name))
    values: dict[str, object] = {}
    place = 0
    for one in argument.finditer(body):
        if body[place : one.start()].strip():
            return None
        place = one.end()
        value = one["value"]
        if newlines:  # a line of their own
            value = value.removeprefix("\n").removesuffix("\n")
        values[one["key"]] = value_of(value, tool.property(one["key"]))
    text = json_text(values)
    return None if body[place:].strip() or text is None else Call(name, text)


def _between_tags(
    name: str, before: str, between: str, after: str, element: tuple[str, str, str], parse: Parse
) -> CallFormat:
    """Each call between <tool_call> and </tool_call>, on lines of its own."""
    syntax = Syntax(
        f"<tool_call>{before}",
        between,
        f"{after}</tool_call>",
        separator="\n",
        arguments="elements",
        element=element,
    )
    return CallFormat(name, ("<tool_call>",), ("</tool_call>",), syntax, parse)


QWEN_CODER = _between_tags(
    "qwen3_coder",
    "\n<function=",
    ">\n",
    "</function>\n",
    ("<parameter=", ">\n", "\n</parameter>\n"),
    _parser(
        r"<tool_call>\s*<function=(?P<name>[^>\n]+)>(?P<body>.*?)</function>\s*</tool_call>",
        r"<parameter=(?P<key>[^>\n]+)>(?P<value>.*?)</parameter>",
        newlines=True,
    ),
)
GLM = _between_tags(
    "glm45",
    "",
    "\n",
    "",
    ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
    _parser(
        r"<tool_call>(?P<name>[^<\n]+)(?P<body>.*?)</tool_call>",
        r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
        newlines=False,
    ),
)
_MINIMAX_BLOCK = re.compile(r"<minimax:tool_call>(.*)</minimax:tool_call>", re.DOTALL)
_minimax_calls = _parser(
    r"<invoke name=\"(?P<name>[^\"\n]+)\">(?P<body>.*?)</invoke>",
    r"<parameter name=\"(?P<key>[^\"\n]+)\">(?P<value>.*?)</parameter>",
    newlines=False,
)


def _parse_minimax(text: str, tools: Sequence[Tool]) -> list[Call] | None:
    block = _MINIMAX_BLOCK.fullmatch(text)
    return None if block is None else _minimax_calls(block[1], tools)


MINIMAX = CallFormat(
    "minimax_m2",
    ("<minimax:tool_call>",),
    ("</minimax:tool_call>",),
    Syntax(
        '<invoke name="',
        '">\n',
        "</invoke>\n",
        "<minimax:tool_call>\n",
        "</minimax:tool_call>",
        arguments="elements",
        element=('<parameter name="', '">', "</parameter>\n"),
    ),
    _parse_minimax,
)
