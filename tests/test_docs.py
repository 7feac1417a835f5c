"""The documentation keeps to the code: pages of commands, command lines, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgert.cli.main import make_parser
from edgert.cli.pages import pages, write
from edgert.cli.tree import Command, command_tree

ROOT = Path(__file__).parents[1]
MARKDOWN = sorted(
    path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")) if path.parent.name != "commands"
)
_CODE_LINE = re.compile(r"^(?: {4,}|\t|\$ )?(?:\$ |sudo )?(edgert .*)$")
_INLINE = re.compile(r"`(?:edgert|\$ edgert) ([^`]+)`")
_PLACEHOLDER = re.compile(r"…|^\[|^\{")


def test_the_pages_of_the_commands_are_up_to_date() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs/commands").glob("*.md")}
    assert found == pages(), "run: python -m edgert.cli.pages docs/commands"


def test_writing_the_pages_removes_those_of_commands_that_went(tmp_path: Path) -> None:
    (tmp_path / "fly.md").touch()
    write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == pages().keys()


def code_lines(text: str) -> Iterator[str]:
    """The lines of code blocks, joined where a backslash says so, without comments and pipes."""
    joined = text.replace("\\\n", " ")
    fenced = False
    for line in joined.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith(("    ", "\t")):
            for part in re.split(r"\s(?:&&|\|\||\||;)\s|\s#\s|\s{2,}#|^\s*#", line):
                match = _CODE_LINE.match(part if part.startswith(" ") else f"    {part}")
                if match:
                    yield match[1].strip()


def inline(text: str) -> Iterator[str]:
    for match in _INLINE.finditer(text):
        yield match[1]


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_command_lines_are_what_the_parser_takes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for line in code_lines(text):
        words = shlex.split(line.split(" > ")[0].removesuffix(" &"), comments=True)[1:]
        if any(_PLACEHOLDER.search(word) for word in words):
            check_words(words, f"{path.name}: {line}")
            continue
        try:
            make_parser().parse_args(words)
        except SystemExit as leaving:
            pytest.fail(f"{path.name}: {line}") if leaving.code else None
    for line in inline(text):
        check_words(line.split(), f"{path.name}: {line}")


def check_words(words: list[str], where: str) -> None:
    """The command and its flags are there; the rest may be anything."""
    command = command_tree()
    for word in words:
        below: dict[str, Command] = {one.words[-1]: one for one in command.commands}
        if word in below:
            command = below[word]
        elif word.startswith("-") and len(word) > 1:
            flags = {flag for option in command.options for flag in option.flags}
            assert re.split(r"[=,;:)\]]", word.rstrip("."))[0] in flags | {"--version"}, where
        elif below and word.islower() and word.isalpha():
            pytest.fail(f"{where}: no such command")
