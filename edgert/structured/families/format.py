"""What a family's way of writing tool calls consists of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgert.structured.tools import Call, Tool

Parse = Callable[[str, Sequence[Tool]], list[Call] | None]


@dataclass(frozen=True)
class Syntax:
    """How calls are written: open, then for each call (`separator` between them) before NAME between ARGUMENTS after, then
    close. `arguments`: a JSON object, or one element an argument: key_open KEY key_close VALUE value_close."""

    before: str
    between: str
    after: str
    open: str = ""
    close: str = ""
    separator: str = ""
    arguments: Literal["json", "elements"] = "json"
    element: tuple[str, str, str] = ("", "", "")


@dataclass(frozen=True)
class CallFormat:
    """`begins`: where calls begin, in the text or as special tokens; `ends`: where they may be complete (none: with the
    reply); `bare`: a reply that begins with one of `begins`, and only at its beginning. `parse` gives the calls in a text
    from begin to end, None while they are incomplete or malformed. `markers`: further special tokens that it reads."""

    name: str
    begins: tuple[str, ...]
    ends: tuple[str, ...]
    syntax: Syntax
    parse: Parse
    bare: bool = False
    markers: tuple[str, ...] = ()
