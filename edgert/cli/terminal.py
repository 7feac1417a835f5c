"""What commands share in talking to people and scripts."""

import io
import json
import sys
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

# Text of a model or a file must not steer the terminal.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def say(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print at once; without control characters if `file` (default: stdout) is a terminal."""
    stream = file or sys.stdout
    print(clean(text) if stream.isatty() else text, end=end, file=stream, flush=True)


def clean(text: str) -> str:
    """Without control characters but tabs and line ends."""
    return text.translate(_CONTROLS)


def note(text: str) -> None:
    """One line to stderr, for people."""
    say(text, file=sys.stderr)


def fail(error: BaseException) -> None:
    """The one line that an error gets."""
    note(f"edgert: error: {one_line(error)}")


def one_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


def show_what_can_be_shown() -> None:
    """A character that the output's encoding lacks becomes a question mark instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def show_warnings() -> None:
    """Warnings of the library become one line each, said once."""

    warnings.showwarning = lambda message, *_, **__: note(f"edgert: warning: {message}")
    warnings.simplefilter("once", RuntimeWarning)


def print_json(value: object) -> None:
    print(json.dumps(value), flush=True)  # ASCII, whatever the encoding and the terminal


def table(rows: Sequence[Sequence[str]], *, right: Container[int] = ()) -> str:
    """Align columns; those in `right` to the right. The first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


def markdown_table(rows: Sequence[Sequence[str]], *, right: Container[int] = ()) -> str:
    """The same as Markdown."""
    head, *body = rows
    ruler = ["--:" if column in right else "---" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *body))


@contextmanager
def progress(what: str, unit: str = "B") -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, driven by callback(done, total); None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    scale = unit == "B"
    with tqdm(desc=what, unit=unit, unit_scale=scale, unit_divisor=1024, leave=False, file=sys.stderr) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
