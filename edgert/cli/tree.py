"""The command line as data, read off the parser: what completion and the pages of the documentation are made of."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from edgert.cli.main import make_parser

# What names no file, among the metavars.
_NO_FILES = (
    "N",
    "X",
    "SIZE",
    "TEXT",
    "BITS",
    "SHARE",
    "FORMAT",
    "FORMATS",
    "METHOD",
    "NAME",
    "TOKEN=BIAS",
    "SECONDS",
)


@dataclass(frozen=True)
class Option:
    """`value` is what its argument is called; None where it takes none."""

    flags: tuple[str, ...]
    value: str | None
    help: str
    choices: tuple[str, ...] = ()
    required: bool = False
    group: str | None = None  # its heading, where it is not among the command's own

    @property
    def takes_file(self) -> bool:
        return self.value is not None and not self.choices and self.value not in _NO_FILES


@dataclass(frozen=True)
class Argument:
    name: str
    help: str
    choices: tuple[str, ...] = ()
    optional: bool = False
    many: bool = False


@dataclass(frozen=True)
class Command:
    """`words` as they are typed: ("edgert", "events", "run")."""

    words: tuple[str, ...]
    summary: str
    description: str
    options: tuple[Option, ...]
    arguments: tuple[Argument, ...]
    commands: tuple["Command", ...]

    def all(self) -> Iterator["Command"]:
        """It and those below it."""
        yield self
        for command in self.commands:
            yield from command.all()


def command_tree() -> Command:
    """`edgert` and all that follows it."""
    return _command(make_parser(), ("edgert",), "")


def _command(parser: argparse.ArgumentParser, words: tuple[str, ...], summary: str) -> Command:
    below = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    commands = []
    if below is not None:
        for choice in below._choices_actions:
            name = choice.dest
            commands.append(_command(below.choices[name], (*words, name), _text(parser, choice)))
    groups = {
        id(action): group.title for group in parser._action_groups[2:] for action in group._group_actions
    }
    named = [action for action in parser._actions if action is not below]
    return Command(
        words,
        summary,
        parser.description or "",
        tuple(_option(parser, one, groups.get(id(one))) for one in named if one.option_strings),
        tuple(_argument(parser, one) for one in named if not one.option_strings),
        tuple(commands),
    )


def _option(parser: argparse.ArgumentParser, action: argparse.Action, group: str | None) -> Option:
    value = None
    choices = tuple(map(str, action.choices or ()))
    if action.nargs != 0:
        value = _value(action)
        if value.startswith("{") and value.endswith("}"):
            choices = tuple(value[1:-1].split(","))
    return Option(tuple(action.option_strings), value, _text(parser, action), choices, action.required, group)


def _value(action: argparse.Action) -> str:
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    return action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "VALUE")


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> Argument:
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    choices = tuple(map(str, action.choices or ()))
    return Argument(
        name, _text(parser, action), choices, action.nargs in ("?", "*"), action.nargs in ("*", "+")
    )


def _text(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Its help, as argparse would print it."""
    values = {"prog": parser.prog, "default": action.default, "type": action.type}
    return (action.help or "") % values
