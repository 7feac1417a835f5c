"""The functions that a request offers, and the calls that replies make of them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from edgert.errors import InvalidArgumentError
from edgert.structured.limits import check_schema

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """A function: `parameters` is the JSON schema of its arguments' object, `strict` whether calls must follow it."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def schema(self) -> dict[str, Any]:
        nothing = {"properties": {}, "additionalProperties": False}
        return {"type": "object", **(self.parameters or nothing)}

    def property(self, name: str) -> Mapping[str, Any]:
        """The schema of one argument; empty where it states none."""
        properties = self.parameters.get("properties")
        found = properties.get(name) if isinstance(properties, Mapping) else None
        return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class Call:
    """A call in a reply: `arguments` is the text of a JSON object, `id` the model's own where its family has one."""

    name: str
    arguments: str
    id: str | None = None


def tools_of(given: Sequence[Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """OpenAI's `tools`: [{"type": "function", "function": {"name", "parameters", "strict"}}]. Raises InvalidArgumentError."""
    if given is None:
        return ()
    if not isinstance(given, list | tuple) or len(given) > MAX_TOOLS:
        raise InvalidArgumentError(f"tools: allowed is a list of up to {MAX_TOOLS} functions")
    tools = tuple(_tool(one, f"tools[{index}]") for index, one in enumerate(given))
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidArgumentError("tools: two functions have the same name")
    return tools


def _tool(given: object, where: str) -> Tool:
    if not isinstance(given, Mapping) or given.get("type", "function") != "function":
        raise InvalidArgumentError(f'{where}: allowed is {{"type": "function", "function": ...}}')
    function = given.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"{where}: function: name: found {name!r:.80}, allowed are 1 to 64 letters, digits, _, - and ."
        )
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise InvalidArgumentError(f"{where}: function: parameters: allowed is a JSON schema")
    check_schema(parameters, f"{where}: function: parameters")
    return Tool(name, parameters, function.get("strict") is True)


def chosen(tools: Sequence[Tool], tool_choice: str | Mapping[str, Any] | None) -> tuple[str, Sequence[Tool]]:
    """What `tool_choice` asks for: "none", "auto", "required" or "named", and among which functions.
    Raises InvalidArgumentError."""
    if tool_choice is None:
        tool_choice = "auto" if tools else "none"
    if tool_choice in ("none", "auto") or (tool_choice == "required" and tools):
        return str(tool_choice), tools
    if isinstance(tool_choice, Mapping) and isinstance(tool_choice.get("function"), Mapping):
        wanted = tool_choice["function"].get("name")
        named = [tool for tool in tools if tool.name == wanted]
        if named:
            return "named", named
        raise InvalidArgumentError(f"tool_choice: found {wanted!r:.80}, which is none of the tools")
    if tool_choice == "required":
        raise InvalidArgumentError("tool_choice: required, but there are no tools")
    raise InvalidArgumentError(
        f"tool_choice: found {tool_choice!r:.80}, allowed are none, auto, required and one function by name"
    )


def json_text(value: object) -> str | None:
    """`value` as JSON that any UTF-8 channel carries; None where JSON has no word for it."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def read_json(text: str, start: int = 0) -> tuple[Any, int] | None:
    """The JSON value at `start` (after white space) and where it ends; None where there is none yet, or never."""
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def call_of(value: object, arguments_key: str = "arguments", *, id_key: str = "id") -> Call | None:
    """The call that {"name": ..., "arguments": {...}} means; None where it means none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get(arguments_key, {})
    if isinstance(arguments, str):  # some models write the object as a string of JSON
        inner = read_json(arguments)
        arguments = None if inner is None or arguments[inner[1] :].strip() else inner[0]
    text = json_text(arguments) if isinstance(arguments, dict) else None
    given = value.get(id_key)
    return None if text is None else Call(value["name"], text, given if isinstance(given, str) else None)


def value_of(text: str, schema: Mapping[str, Any]) -> object:
    """The argument that a family without quotes writes as `text`: JSON, unless its schema says that it is a string."""
    kinds = schema.get("type")
    if kinds == "string" or (isinstance(kinds, list) and "string" in kinds and "null" not in kinds):
        return text
    if isinstance(schema.get("enum"), list) and text in schema["enum"]:
        return text
    found = read_json(text)
    return text if found is None or text[found[1] :].strip() else found[0]


def _refused(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refused)
