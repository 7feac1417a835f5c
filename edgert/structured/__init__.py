"""Replies in a form: constrained decoding (json_schema, grammars, tool calls), and replies taken apart."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgert.errors import UnsupportedError
from edgert.structured.constraint import Constraint
from edgert.structured.reply import Delta, ReplyParser

if TYPE_CHECKING:
    from edgert.model import Model

__all__ = ["Constraint", "Delta", "ReplyParser", "constraint_of"]


def constraint_of(
    model: "Model",
    *,
    response_format: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool = True,
    grammar: str | Mapping[str, Any] | None = None,
    prompt: str = "",
    reasoning: str = "auto",
    tool_format: str = "auto",
) -> Constraint | None:
    """The form that a request asks its reply to take; None where it asks for none. Made anew for each of n choices.

    `response_format`: OpenAI's {"type": "text" | "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}};
    `tools` and `tool_choice` (None, "none", "auto", "required", {"type": "function", "function": {"name": ...}}): OpenAI's;
    `grammar`: Lark's text, or {"type": "lark" | "regex" | "choice" | "json_schema", "value": ...}.
    `prompt`, `reasoning` and `tool_format` as for ReplyParser.of(): reasoning stays free, the form holds what follows it.

    Bounded in time and memory; blocks for up to some seconds, so call it off the event loop. Raises InvalidArgumentError
    for what is malformed or asks for two forms at once, UnsupportedError for what is too large or has no support here.
    """
    raise UnsupportedError("constrained decoding is not built yet")
