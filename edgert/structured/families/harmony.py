"""Channels of gpt-oss: <|channel|>NAME to=functions.NAME<|message|>TEXT<|end|>."""

import re
from collections.abc import Callable, Sequence

from edgert.structured.families.format import Syntax
from edgert.structured.reader import Reader
from edgert.structured.tools import Tool, call_of, read_json

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
MARKERS = (START, CHANNEL, MESSAGE, "<|constrain|>", *_ENDS)
_MAX_HEADER = 1024
_RECIPIENT = re.compile(r"to=(?:functions\.)?([A-Za-z0-9_.-]+)")
_NAME = re.compile(r"\s*(\w+)")


class HarmonyReader(Reader):
    """analysis is reasoning, final and commentary are content, commentary to a function is a call."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__()
        self._names = {tool.name for tool in tools}
        self._body: str | None = (
            None  # "reasoning", "content" or the function's name after "call "; None: in a header
        )
        self._plain = False  # text outside any message

    def step(self, final: bool) -> bool:
        return self._header(final) if self._body is None else self._message(final)

    def _header(self, final: bool) -> bool:
        if self._plain or not self._may_be_header():
            return self._outside(final)
        place = self.buffer.find(MESSAGE)
        if 0 <= place <= _MAX_HEADER:
            self._open(self.take(place + len(MESSAGE))[: -len(MESSAGE)])
            return True
        if self.buffer and (final or len(self.buffer) > _MAX_HEADER + len(MESSAGE)):
            self.give("content", self.take(1))  # so it was none
            self._plain = True
            return True
        return False

    def _may_be_header(self) -> bool:
        text = self.buffer
        return any(text.startswith(marker) or marker.startswith(text) for marker in (START, CHANNEL))

    def _open(self, header: str) -> None:
        _, _, after = header.partition(CHANNEL)
        channel, recipient = _NAME.match(after), _RECIPIENT.search(header)
        if recipient is not None and recipient[1] in self._names:
            self._body = "call " + recipient[1]
        else:  # the model's own tools, such as python, are part of its reasoning
            reasons = recipient is not None or (channel is not None and channel[1] == "analysis")
            self._body = "reasoning" if reasons else "content"

    def _outside(self, final: bool) -> bool:
        """Text without a header is content, up to the next header."""
        found = self.earliest((START, CHANNEL))
        if found is not None:
            self.give("content", self.take(found[0]))
            self._plain = False
            return True
        self._plain = True
        self.give(
            "content",
            self.take(len(self.buffer) if final else self.settled((START, CHANNEL), hold_space=False)),
        )
        return False

    def _message(self, final: bool) -> bool:
        assert self._body is not None
        found = self.earliest((*_ENDS, START))
        if self._body.startswith("call "):
            if found is None and not final:
                return False
            self._call(self.take(len(self.buffer) if found is None else found[0]), self._body[5:])
        else:
            count = self.settled((*_ENDS, START), hold_space=False) if found is None else found[0]
            kind = "reasoning" if self._body == "reasoning" else "content"
            self.give(kind, self.take(len(self.buffer) if found is None and final else count))  # type: ignore[arg-type]
        if found is None:
            return False
        if found[1] != START:
            self.take(len(found[1]))
        self._body, self._plain = None, False
        return bool(self.buffer)

    def _call(self, text: str, name: str) -> None:
        found = read_json(text)
        call = None
        if found is not None and not text[found[1] :].strip():
            call = call_of({"name": name, "arguments": found[0]})
        if call is None:
            self.give("content", text)
        else:
            self.give_call(call)


# After <|start|>assistant, which the prompt has opened or start_rules() have.
SYNTAX = Syntax(
    before=f"{CHANNEL}commentary to=functions.",
    between=f" <|constrain|>json{MESSAGE}",
    after="",  # <|call|> ends the reply, which the end of the form does too
)


def start_rules(literal: Callable[[str], str]) -> list[str]:
    """The rule `start`: analysis, if any, then `body`, which opens its own channel."""
    analysis = literal(f"{CHANNEL}analysis{MESSAGE}")
    again = literal(f"<|end|>{START}assistant")
    return ["start: thought? body", f"thought: {analysis} /(?s:.*)/ {again}"]
