"""Replies taken apart as they stream: content, reasoning and tool calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from edgert.errors import UnsupportedError

if TYPE_CHECKING:
    from edgert.model import Model


@dataclass(frozen=True, slots=True)
class Delta:
    """What a piece adds to the reply. `text`: of "content" and "reasoning", what to append; of a "tool_call", its whole
    arguments, a JSON object's text. A call comes in one delta, when it is complete: `index` counts the calls of the reply,
    `name` is its function, `id` the one that the model gave it, None where the family has none."""

    kind: Literal["content", "reasoning", "tool_call"]
    text: str = ""
    index: int = 0
    name: str | None = None
    id: str | None = None


class ReplyParser:
    """One reply. What is malformed is content, never an error."""

    @classmethod
    def of(
        cls,
        model: "Model",
        *,
        prompt: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning: str = "auto",
        tool_format: str = "auto",
    ) -> Self:
        """The parser for the replies of `model`, by its chat template and vocabulary.

        `prompt`: the text that the chat template made (it may already open the reasoning); `tools`: those of the request:
        without any nothing is read as a call. `reasoning` and `tool_format` name what to look for instead of "auto", or
        "none". Raises InvalidArgumentError for names that are unknown.
        """
        raise UnsupportedError("reply parsers are not built yet")

    def push(self, text: str, token: int | None = None) -> list[Delta]:
        """What a Piece settles: its text and its token (special tokens have no text, but some are markers)."""
        raise UnsupportedError("reply parsers are not built yet")

    def finish(self) -> list[Delta]:
        """What was still held back; the reply is over."""
        raise UnsupportedError("reply parsers are not built yet")
