"""Replies taken apart as they stream: content, reasoning and tool calls."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from edgert.structured.families.harmony import MARKERS, HarmonyReader
from edgert.structured.formats import call_format, is_harmony, opened_by, reasoning_tags
from edgert.structured.reader import Delta, Reader
from edgert.structured.tagged import TaggedReader
from edgert.structured.tools import tools_of

if TYPE_CHECKING:
    from edgert.prompts import Prompts


class ReplyParser:
    """One reply. The deltas, joined, are the same wherever the pieces end; what is malformed, and a call of a function that
    was not offered, is content, never an error."""

    def __init__(self, reader: Reader, markers: Mapping[int, str] | None = None) -> None:
        """`markers`: the text of those special tokens that the reader knows."""
        self._reader = reader
        self._markers = markers or {}

    @classmethod
    def of(
        cls,
        texts: "Prompts",
        *,
        prompt: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning: str = "auto",
        tool_format: str = "auto",
    ) -> Self:
        """The parser for a reply, by the chat template of `texts`: a model, or Model.prompts().

        `prompt`: the text that the chat template made (it may already open the reasoning); `tools`: those of the request:
        without any nothing is read as a call. `reasoning` and `tool_format` name what to look for instead of "auto", or
        "none". Raises InvalidArgumentError for names that are unknown, and for malformed tools.
        """
        tokenizer, functions = texts.tokenizer, tools_of(tools)
        special = tokenizer.special_tokens()
        if is_harmony(tokenizer, tool_format, reasoning):
            return cls(HarmonyReader(functions), {special[m]: m for m in MARKERS if m in special})
        tags = reasoning_tags(tokenizer, reasoning)
        calls = call_format(tokenizer, tool_format)
        if not functions:
            calls = None
        known = (*(tags or ()), *((*calls.begins, *calls.ends, *calls.markers) if calls else ()))
        reader = TaggedReader(tags, opened_by(prompt, tags), calls, functions)
        return cls(reader, {special[marker]: marker for marker in known if marker in special})

    def push(self, text: str, token: int | None = None) -> list[Delta]:
        """What a Piece settles: its text and its token (special tokens have no text, but some are markers)."""
        marker = "" if token is None else self._markers.get(token, "")
        return self._reader.read(text + marker, False)

    def finish(self) -> list[Delta]:
        """What was still held back; the reply is over."""
        return self._reader.read("", True)
