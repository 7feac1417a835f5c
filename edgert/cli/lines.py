"""Messages as people type them: line editing and history on a terminal, plain lines from a pipe."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from edgert import settings
from edgert.cli.terminal import note, say

_HISTORY_LINES = 1000
_QUOTES = '"""'


class Lines:
    """Iterate over messages. A message is a line; one that ends with a backslash goes on in the next, and one that begins
    with three quotation marks goes on until the next three. On a terminal Ctrl-C discards what is typed."""

    def __init__(self, commands: Sequence[str], *, keep_history: bool) -> None:
        self._on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._history = History(commands, kept=keep_history) if self._on_terminal else None

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                message = self._message()
            except EOFError:
                if self._on_terminal:
                    say("")
                return
            except KeyboardInterrupt:
                if not self._on_terminal:
                    raise
                say("")
                note("(Ctrl-D or /bye leaves)")
                continue
            if message:
                if self._history:
                    self._history.add(message)
                yield message

    def _message(self) -> str:
        text = self._line(">>> ").strip()
        if text.startswith(_QUOTES):
            text = text.removeprefix(_QUOTES)
            while _QUOTES not in text:
                text += "\n" + self._line("... ")
            return text.partition(_QUOTES)[0].strip("\n")
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self._line("... ").rstrip()
        return text.strip()

    def _line(self, prompt: str) -> str:
        if self._on_terminal:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class History:
    """readline's history, kept in the state directory for the user's eyes only. Where Python has no readline, or the
    file cannot be written, there is none, and nothing else is lost."""

    def __init__(self, commands: Sequence[str], *, kept: bool) -> None:
        self._file: Path | None = None
        try:
            import readline
        except ImportError:
            return
        readline.set_auto_history(False)
        readline.clear_history()
        readline.set_history_length(_HISTORY_LINES)
        readline.set_completer_delims("\n")
        readline.set_completer(lambda text, state: _completion(commands, text, state))
        readline.parse_and_bind("tab: complete")
        if kept:
            with suppress(OSError):
                self._file = _history_file()
                readline.read_history_file(self._file)

    def add(self, message: str) -> None:
        with suppress(ImportError, OSError):
            import readline

            readline.add_history(message)
            if self._file:
                readline.append_history_file(1, self._file)


def _history_file() -> Path:
    """It is there once this returns, readable by its owner alone."""
    path = settings.state() / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    return path


def _completion(commands: Sequence[str], text: str, state: int) -> str | None:
    matching = [command for command in commands if text.startswith("/") and command.startswith(text)]
    return matching[state] if state < len(matching) else None
