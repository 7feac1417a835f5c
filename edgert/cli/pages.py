"""The pages of docs/commands, one a command, made of the parser's declaration: python -m edgert.cli.pages docs/commands"""

import argparse
import sys
from pathlib import Path

from edgert.cli.tree import Command, Option, command_tree

_NOTE = (
    "<!-- Made by `python -m edgert.cli.pages docs/commands`; change the command's declaration instead. -->"
)


def pages() -> dict[str, str]:
    """Every page by the name of its file."""
    tree = command_tree()
    made = {f"{command.words[1]}.md": _page(command) for command in tree.commands}
    return {"index.md": _index(tree), **made}


def write(folder: Path) -> None:
    """Write every page into `folder`, and remove those of commands that went."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for old in folder.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


def _index(tree: Command) -> str:
    rows = [f"| [edgert {one.words[1]}]({one.words[1]}.md) | {_cell(one.summary)} |" for one in tree.commands]
    return "\n".join(
        [
            _NOTE,
            "# Commands",
            "",
            tree.description,
            "",
            "| command | does |",
            "|---|---|",
            *rows,
            "",
            "A flag goes before its variable `EDGERT_<NAME>`, which stands in brackets behind what the flag does and goes "
            "before `~/.config/edgert/config.toml` and `/etc/edgert/edgert.toml`. Commands whose output a script would read "
            "take `--json`.",
            "",
            "Exit status: 0 done, 1 failed (one line on stderr says what, and what to do; `--verbose` adds where), 2 wrong "
            "usage, 130 interrupted, 141 the reader of the output went away.",
            "",
        ]
    )


def _page(command: Command) -> str:
    return "\n".join([_NOTE, *_sections(command, 1)])


def _sections(command: Command, depth: int) -> list[str]:
    lines = [f"{'#' * depth} {' '.join(command.words)}", "", command.description or command.summary, ""]
    lines += [f"    {_synopsis(command)}", ""]
    if command.commands:
        rows = [f"| `{' '.join(below.words)}` | {_cell(below.summary)} |" for below in command.commands]
        lines += ["| command | does |", "|---|---|", *rows, ""]
    if command.arguments:
        rows = [
            f"| `{one.name}` | {_cell(one.help or 'one of ' + ', '.join(one.choices))} |"
            for one in command.arguments
        ]
        lines += ["| argument | is |", "|---|---|", *rows, ""]
    options = [option for option in command.options if "--help" not in option.flags]
    for group in dict.fromkeys(option.group for option in options):
        lines += _options(group, [option for option in options if option.group == group])
    for below in command.commands:
        lines += _sections(below, depth + 1)
    return lines


def _options(group: str | None, options: list[Option]) -> list[str]:
    head = "flag" if group is None else f"flag: {group}"
    rows = [
        f"| {_flags(option)} | {_cell(option.help)}{' (needed)' if option.required else ''} |"
        for option in options
    ]
    return [f"| {head} | does |", "|---|---|", *rows, ""]


def _flags(option: Option) -> str:
    value = "" if option.value is None else f" {option.value}"
    return "<br>".join(f"`{flag}{value}`".replace("|", "\\|") for flag in option.flags)


def _synopsis(command: Command) -> str:
    words = list(command.words)
    if command.commands:
        return " ".join([*words, "COMMAND", "..."])
    words += [f"{option.flags[0]} {option.value}" for option in command.options if option.required]
    words += ["[FLAG...]"]
    for one in command.arguments:
        name = f"{one.name}..." if one.many else one.name
        words.append(f"[{name}]" if one.optional else name)
    return " ".join(words)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the pages of the commands.")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    write(parser.parse_args(sys.argv[1:]).folder)
