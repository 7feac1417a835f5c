"""Replies whose reasoning and calls stand between tags, in text that is content otherwise."""

from collections.abc import Sequence
from typing import Literal

from edgert.structured.families.format import CallFormat
from edgert.structured.reader import Reader
from edgert.structured.tools import Tool

_MAX_CALL = 256 << 10  # characters held back for a call


class TaggedReader(Reader):
    """`reasoning`: what opens and closes it, None where there is none; `opened`: the prompt has opened it; `calls`: how calls
    are written, None where none are read. White space between the parts is dropped."""

    def __init__(
        self,
        reasoning: tuple[str, str] | None,
        opened: bool,
        calls: CallFormat | None,
        tools: Sequence[Tool],
    ) -> None:
        super().__init__()
        self._reasoning = reasoning
        self._format = calls
        self._tools = tools
        self._names = {tool.name for tool in tools}
        self._state: Literal["start", "reasoning", "gap", "content", "call"] = "gap"
        if opened:
            self._state = "reasoning"
        elif reasoning is not None:
            self._state = "start"
        self._begun = False  # whether reasoning has given any text
        self._strip = False  # whether white space that comes now only parts what came from what comes
        self._tried = 0  # up to where the buffer was searched for the end of a call
        self._failed = False  # whether an end was found at which it could not be read

    def step(self, final: bool) -> bool:
        return {
            "start": self._start,
            "reasoning": self._reason,
            "gap": self._gap,
            "content": self._content,
            "call": self._call,
        }[self._state](final)

    def _start(self, final: bool) -> bool:
        """Reasoning comes first or not at all."""
        assert self._reasoning is not None
        text, opens = self.buffer.lstrip(), self._reasoning[0]
        if text.startswith(opens):
            self.take(len(self.buffer) - len(text) + len(opens))
            self._state = "reasoning"
            return True
        if opens.startswith(text) and not final:
            return False
        self._state = "gap"
        return True

    def _reason(self, final: bool) -> bool:
        assert self._reasoning is not None
        closes = self._reasoning[1]
        if not self._begun:
            self.buffer = self.buffer.lstrip()
            self._begun = bool(self.buffer)
        place = self.buffer.find(closes)
        if place >= 0:
            self.give("reasoning", self.take(place).rstrip())
            self.take(len(closes))
            self._state, self._strip = "gap", True
            return True
        text = self.take(len(self.buffer) if final else self.settled((closes,), hold_space=True))
        self.give("reasoning", text.rstrip() if final else text)
        return False

    def _gap(self, final: bool) -> bool:
        """At the beginning and between the parts; a bare call begins only here."""
        bare = self._format.begins if self._format is not None and self._format.bare else ()
        text = self.buffer.lstrip()
        if any(text.startswith(marker) for marker in bare):
            self.buffer, self._state = text, "call"
            return True
        undecided = not text if self._strip else False
        if not final and (undecided or any(marker.startswith(text) for marker in bare)):
            return False
        if self._strip:
            self.buffer = text
        self._state = "content"
        return True

    def _content(self, final: bool) -> bool:
        if self._format is None or self._format.bare:
            self.give("content", self.take(len(self.buffer)))
            return False
        begins = self._format.begins
        found = self.earliest(begins)
        if found is not None:
            self.give("content", self.take(found[0]).rstrip())
            self._state = "call"
            return True
        self.give("content", self.take(len(self.buffer) if final else self.settled(begins, hold_space=True)))
        return False

    def _call(self, final: bool) -> bool:
        """The buffer begins with a call. It ends at the first end at which it can be read; once one has failed, the
        beginning of another shows that it is malformed."""
        assert self._format is not None
        begins, ends = self._format.begins, self._format.ends
        while (found := self.earliest((*ends, *begins) if self._failed else ends, self._tried)) is not None:
            place, marker = found
            if place + len(marker) > _MAX_CALL:
                break
            if marker in begins:
                return self._as_content(place)
            if self._give_calls(place + len(marker)):
                return True
            self._tried, self._failed = place + len(marker), True
        if len(self.buffer) > _MAX_CALL:
            return self._as_content(_MAX_CALL)
        self._tried = max(self._tried, len(self.buffer) + 1 - max(map(len, (*begins, *ends))))
        if not final or (not ends and self._give_calls(len(self.buffer))):
            return False
        return self._as_content(len(self.buffer))

    def _give_calls(self, end: int) -> bool:
        assert self._format is not None
        found = self._format.parse(self.buffer[:end], self._tools)
        if not found or any(call.name not in self._names for call in found):
            return False
        self.take(end)
        for call in found:
            self.give_call(call)
        self._state, self._strip, self._tried, self._failed = "gap", True, 0, False
        return True

    def _as_content(self, end: int) -> bool:
        self.give("content", self.take(end))
        self._state, self._strip, self._tried, self._failed = "content", False, 0, False
        return bool(self.buffer)
