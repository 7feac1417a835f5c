"""Text read as it streams, cut at markers wherever the pieces end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgert.structured.tools import Call

Kind = Literal["content", "reasoning", "tool_call"]


@dataclass(frozen=True, slots=True)
class Delta:
    """What a piece adds to the reply. `text`: of "content" and "reasoning", what to append; of a "tool_call", its whole
    arguments, a JSON object's text. A call comes in one delta, when it is complete: `index` counts the calls of the reply,
    `name` is its function, `id` the one that the model gave it, None where the family has none."""

    kind: Kind
    text: str = ""
    index: int = 0
    name: str | None = None
    id: str | None = None


class Reader:
    """Base of the readers: `step` takes from `buffer` what is settled, and says whether it got further."""

    def __init__(self) -> None:
        self.buffer = ""
        self._deltas: list[Delta] = []
        self._calls = 0

    def read(self, text: str, final: bool) -> list[Delta]:
        """What `text` settles; all that there is if it is the last."""
        self.buffer += text
        while self.step(final):
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def step(self, final: bool) -> bool:
        raise NotImplementedError

    def take(self, count: int) -> str:
        taken, self.buffer = self.buffer[:count], self.buffer[count:]
        return taken

    def give(self, kind: Kind, text: str) -> None:
        if not text:
            return
        if self._deltas and self._deltas[-1].kind == kind:
            text = self._deltas.pop().text + text
        self._deltas.append(Delta(kind, text))

    def give_call(self, call: Call) -> None:
        self._deltas.append(Delta("tool_call", call.arguments, self._calls, call.name, call.id))
        self._calls += 1

    def earliest(self, markers: Sequence[str], start: int = 0) -> tuple[int, str] | None:
        """Where the first of `markers` stands in the buffer, and which: the longest of those that begin there."""
        places = [(self.buffer.find(marker, start), -len(marker), marker) for marker in markers]
        found = min((place for place in places if place[0] >= 0), default=None)
        return None if found is None else (found[0], found[2])

    def settled(self, markers: Sequence[str], *, hold_space: bool) -> int:
        """How much of a buffer without any of `markers` cannot belong to one, nor to the white space before one."""
        end = len(self.buffer)
        held = 0
        for marker in markers:
            for length in range(min(len(marker) - 1, end), held, -1):
                if self.buffer.endswith(marker[:length]):
                    held = length
                    break
        kept = end - held
        return len(self.buffer[:kept].rstrip()) if hold_space else kept
