"""Chat templates: a conversation becomes the prompt that its model was trained on."""

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from edgert.errors import CorruptError, InvalidArgumentError, UnsupportedError
from edgert.sandbox import SandboxedEnvironment, TemplateRefusal

_MAX_TEMPLATE_CHARACTERS = 256 << 10
_MAX_MESSAGE_CHARACTERS = 16 << 20
_STEPS = 2_000_000  # about a second
_STEPS_PER_INPUT_CHARACTER = 32  # a long conversation deserves more


class ChatTemplate:
    """A conversation's prompt. Safe to use from several threads."""

    def __init__(self, source: str, *, bos_token: str | None = None, eos_token: str | None = None) -> None:
        """Compile `source`. Raises CorruptError, naming the line, for what is not a template."""
        if len(source) > _MAX_TEMPLATE_CHARACTERS:
            raise CorruptError(
                f"chat template: found {len(source)} characters, allowed are {_MAX_TEMPLATE_CHARACTERS}"
            )
        self.source = source
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._lock = threading.Lock()
        self._environment = SandboxedEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CorruptError(f"chat template: line {error.lineno}: {error.message}") from None
        except Exception as error:  # noqa: BLE001 - such as nesting too deep for Python itself
            raise CorruptError(
                f"chat template: cannot be compiled: {error or type(error).__name__}"
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt for `messages`; `variables` (such as enable_thinking) reach the template.

        Raises InvalidArgumentError for messages that are not plain data or that the template refuses, and
        UnsupportedError for a template that takes unbounded work or does what is not allowed.
        """
        given = {"messages": messages, "tools": tools, **variables}
        data, size = _plain(given)
        with self._lock:
            self._environment.steps = _STEPS + _STEPS_PER_INPUT_CHARACTER * size
            try:
                return self._template.render(
                    {**self._tokens, **data, "add_generation_prompt": add_generation_prompt}
                )
            except TemplateRefusal as error:
                raise InvalidArgumentError(f"chat template: {error}") from None
            except Exception as error:  # noqa: BLE001 - whatever a template provokes
                reason = (
                    "recursion too deep"
                    if isinstance(error, RecursionError)
                    else error or type(error).__name__
                )
                raise UnsupportedError(f"chat template: {str(reason)[:400]}") from None


def _plain(given: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A copy of `given` that is nothing but JSON, and its size; objects of Python stay outside the sandbox."""
    messages = given["messages"]
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidArgumentError("messages: allowed is a non-empty list of {'role': ..., 'content': ...}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidArgumentError(f"messages[{index}]: allowed is an object with a string 'role'")
    given = {**given, "messages": [_joined(index, message) for index, message in enumerate(messages)]}
    try:
        text = json.dumps(given, default=dict)
        if len(text) > _MAX_MESSAGE_CHARACTERS:
            raise InvalidArgumentError(
                f"messages: found {len(text)} characters, allowed are {_MAX_MESSAGE_CHARACTERS}"
            )
        return json.loads(text), len(text)
    except (TypeError, RecursionError) as error:
        raise InvalidArgumentError(f"messages: not plain data: {error}") from None
    except ValueError as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"messages: not plain data: {error}") from None


def _joined(index: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with one text where its content is a list of texts, as OpenAI's clients have it."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    for number, part in enumerate(content):
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            found = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InvalidArgumentError(
                f"messages[{index}].content[{number}]: found {found!r:.60}, allowed are parts of type 'text'"
            )
    return {**message, "content": "\n".join(part["text"] for part in content)}
