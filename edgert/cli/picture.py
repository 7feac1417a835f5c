"""A live picture of the expert store: a row a layer, a cell an expert, under the text as it comes."""

import shutil
import sys
import textwrap
from types import TracebackType
from typing import TYPE_CHECKING, Self

from edgert.cli.terminal import clean
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.model import Model

_ABSENT, _READING, _RESIDENT = 0, 1, 2
_ON_DISK, _ON_ITS_WAY, _HELD = "·", "□", "■"
_TEXT_LINES, _TEXT_WIDTH, _MARGIN = 8, 90, "  "
_DIM, _BLUE, _AMBER, _BOLD, _PLAIN = "\x1b[2m", "\x1b[38;5;74m", "\x1b[38;5;214m", "\x1b[1m", "\x1b[0m"
_UP, _CLEAR_REST, _HIDE_CURSOR, _SHOW_CURSOR = "\x1b[{}A\r", "\x1b[K", "\x1b[?25l", "\x1b[?25h"


class Picture:
    """Redraws itself in place; a context manager, which leaves the last state standing. For terminals only."""

    def __init__(self, model: "Model", title: str) -> None:
        self._model = model
        self._title = title
        self._text = ""
        self._before: list[bytes] = []
        self._drawn = 0  # lines

    def __enter__(self) -> Self:
        sys.stdout.write(_HIDE_CURSOR)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout.write("\n" + _SHOW_CURSOR)
        sys.stdout.flush()

    def add(self, text: str) -> None:
        """Show more text, and the store as it is now."""
        self._text += clean(text)
        lines = [
            f"{_BOLD}{self._title}{_PLAIN}",
            "",
            *self._wrapped(),
            "",
            *self._store(),
            "",
            self._legend(),
        ]
        if self._drawn:
            sys.stdout.write(_UP.format(self._drawn))
        self._drawn = len(lines)
        sys.stdout.write("".join(f"{line}{_CLEAR_REST}\n" for line in lines))
        sys.stdout.flush()

    def _wrapped(self) -> list[str]:
        """The last lines of the text; always as many, so that the picture stands still."""
        width = min(shutil.get_terminal_size().columns, _TEXT_WIDTH) - len(_MARGIN)
        lines = [part for line in self._text.splitlines() for part in textwrap.wrap(line, width) or [""]]
        shown = [_MARGIN + line for line in lines[-_TEXT_LINES:]]
        return shown + [""] * (_TEXT_LINES - len(shown))

    def _store(self) -> list[str]:
        layers = self._model.native.store()
        size = shutil.get_terminal_size()
        rows = max(1, size.lines - _TEXT_LINES - 8)
        before = self._before or [bytes(len(layer)) for layer in layers]
        lines = [
            f"{_MARGIN}{_DIM}layer {index:<3}{_PLAIN} " + _cells(layer, old, (size.columns - 14) // 2)
            for index, (layer, old) in enumerate(zip(layers[:rows], before, strict=False))
        ]
        if len(layers) > rows:
            lines.append(f"{_MARGIN}{_DIM}and {len(layers) - rows} layers more{_PLAIN}")
        self._before = layers
        return lines

    def _legend(self) -> str:
        stats = self._model.stats()
        looked_up = stats["expert_hits"] + stats["expert_prefetch_hits"] + stats["expert_misses"]
        hits = stats["expert_hits"] / looked_up if looked_up else 0.0
        return (
            f"{_MARGIN}{_BLUE}{_HELD}{_PLAIN} in memory  {_AMBER}{_HELD}{_PLAIN} just read  {_DIM}{_ON_DISK}{_PLAIN} on disk"
            f"{_DIM}     hits {hits:4.0%}   read {format_bytes(stats['expert_bytes_read'])}{_PLAIN}"
        )


def _cells(layer: bytes, before: bytes, room: int) -> str:
    shown = " ".join(_cell(now, old) for now, old in zip(layer[:room], before, strict=False))
    return shown if len(layer) <= room else shown + " …"


def _cell(now: int, before: int) -> str:
    if now == _ABSENT:
        return f"{_DIM}{_ON_DISK}{_PLAIN}"
    if now == _READING:
        return f"{_AMBER}{_ON_ITS_WAY}{_PLAIN}"
    return f"{_BLUE if before == _RESIDENT else _AMBER}{_HELD}{_PLAIN}"
