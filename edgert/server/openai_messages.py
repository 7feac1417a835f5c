"""Conversations as OpenAI's clients send them, made into what chat templates expect; and the prompt that comes of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgert.errors import ContextLengthError
from edgert.server.openai_fields import refused
from edgert.server.openai_work import check_length, too_long

if TYPE_CHECKING:
    from edgert.prompts import Prompts

_RESERVED = frozenset(
    {"messages", "tools", "chat_template", "add_generation_prompt", "bos_token", "eos_token"}
)


@dataclass(frozen=True)
class Conversation:
    """What a chat route asks for; `tools` are those that may be called."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    variables: Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    text: str
    tokens: list[int]


def conversation_of(fields: Mapping[str, Any]) -> Conversation:
    """Of a checked chat request. Raises ApiError 400 for fields that do not go together."""
    tools = fields.get("tools") or None
    choice = fields.get("tool_choice")
    named = choice["function"]["name"] if isinstance(choice, Mapping) else None
    if choice not in (None, "none", "auto"):
        names = [tool["function"]["name"] for tool in tools or ()]
        if not names or (named is not None and named not in names):
            raise refused(
                f"tool_choice: found {named or choice!r}, the tools are {', '.join(names) or 'none'}",
                "tool_choice",
            )
    return Conversation(
        [_message(message) for message in fields["messages"]],
        None if choice == "none" else tools,
        choice,
        variables_of(fields.get("chat_template_kwargs", {}), fields.get("reasoning_effort")),
    )


def variables_of(given: Mapping[str, Any], effort: str | None) -> dict[str, Any]:
    """The template's variables: chat_template_kwargs, and reasoning_effort, of which "none" turns thinking off."""
    for name in given:
        if name in _RESERVED:
            raise refused(
                f"chat_template_kwargs.{name}: the request has a field of its own for this, or the model decides it",
                f"chat_template_kwargs.{name}",
            )
    variables = dict(given)
    if effort == "none":
        variables.setdefault("enable_thinking", False)
    elif effort is not None:
        variables.setdefault("reasoning_effort", effort)
    return variables


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    made = {name: message[name] for name in ("role", "name", "tool_call_id") if name in message}
    content = message.get("content")
    made["content"] = content if content is None or isinstance(content, str) else joined(content)
    if "reasoning_content" in message:
        made["reasoning_content"] = message["reasoning_content"]
    if message.get("tool_calls"):
        made["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    elif made["content"] is None:
        made["content"] = message.get("refusal", "")
    return made


def joined(parts: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(part["text"] for part in parts)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Templates write the arguments' JSON themselves."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        arguments = function["arguments"]
    return {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
        **({"id": call["id"]} if "id" in call else {}),
    }


def prompt_of(texts: "Prompts", conversation: Conversation, param: str) -> Prompt:
    """By the chat template; takes up to a second. Raises ApiError 400 where it does not fit into the context."""
    template = texts.tokenizer.chat_template
    messages: Sequence[Mapping[str, Any]] = conversation.messages
    if template is not None:
        messages = [_as_known(message, template.source) for message in messages]
    text = texts.tokenizer.apply_chat_template(messages, tools=conversation.tools, **conversation.variables)
    try:
        tokens = texts.encoded(text, add_special_tokens=False)
    except ContextLengthError as error:
        raise too_long(error, texts, param) from None
    check_length(len(tokens), texts, param)
    return Prompt(text, tokens)


def _as_known(message: Mapping[str, Any], template: str) -> Mapping[str, Any]:
    """With the names that this template has for what OpenAI's has since renamed."""
    if message["role"] == "developer" and "developer" not in template:
        return {**message, "role": "system"}
    reasoning = message.get("reasoning_content")
    if reasoning and "reasoning_content" not in template and "thinking" in template:
        return {**message, "thinking": reasoning}
    return message
