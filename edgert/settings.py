"""One mechanism for everything tunable: flag > EDGERT_<NAME> variable > configuration file > default.

A Setting is declared once: the engine's knobs in the native knob table, sampling in edgert.sampling. Flags, variables,
file keys and checks follow from the declaration. The files are TOML with one key a setting; the user's
(~/.config/edgert/config.toml, or the file that EDGERT_CONFIG names) goes before /etc/edgert/edgert.toml.
"""

import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.errors import InvalidArgumentError, NotFoundError
from edgert.units import parse_bytes

SYSTEM_FILE = Path("/etc/edgert/edgert.toml")
_MAX_FILE_BYTES = 1 << 20
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True)
class Setting:
    """One tunable. `kind` is bytes, int, float, bool, choice, text or texts (a list).

    A number may have "auto" among its choices; calls write it as 0.
    """

    name: str
    kind: str
    help: str
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    above_minimum: bool = False  # the minimum itself is not allowed
    choices: tuple[str, ...] = ()
    unit: str = ""
    live: bool = False
    lossy: bool = False  # gives up quality unless it is 0

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "EDGERT_" + self.name.upper()

    def allowed(self) -> str:
        """Say in words what values are allowed."""
        if self.kind == "choice":
            return "one of " + ", ".join(self.choices)
        if self.kind == "bool":
            return "true or false"
        if self.kind in ("text", "texts"):
            return "a string" if self.kind == "text" else "a string or a list of strings"
        start = "above" if self.above_minimum else "from"
        low = "" if self.minimum is None else f"{start} {_shown(self.minimum)}"
        high = "" if self.maximum is None else f"up to {_shown(self.maximum)}"
        noun = {"bytes": "a size", "int": "a whole number", "float": "a number"}[self.kind]
        return " ".join(
            part for part in (noun, low, high, *(f"or {choice}" for choice in self.choices)) if part
        )

    def check(self, value: object, where: str | None = None) -> Any:
        """Return `value` (as given by a caller, a flag, a variable or a file) as this setting's type.

        Raises InvalidArgumentError naming `where`, what was found and what is allowed.
        """
        where = where or self.name
        if self.kind != "choice" and value == "auto" and value in self.choices:
            return 0
        try:
            return self._convert(value, where)
        except (TypeError, ValueError, OverflowError, KeyError) as error:
            if isinstance(error, InvalidArgumentError):
                raise
            shown = repr(value)
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise InvalidArgumentError(f"{where}: found {shown}, allowed is {self.allowed()}") from None

    def _convert(self, value: object, where: str) -> Any:
        if self.kind == "texts":
            items = [value] if isinstance(value, str) else value
            if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
                raise TypeError
            return tuple(items)
        if self.kind == "text":
            if not isinstance(value, str):
                raise TypeError
            return value
        if self.kind == "choice":
            if value not in self.choices:
                raise ValueError
            return value
        if self.kind == "bool":
            return value if isinstance(value, bool) else _BOOLEANS[str(value).strip().lower()]
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError
        number: float
        if self.kind == "bytes":
            if isinstance(value, float):
                raise TypeError
            number = parse_bytes(value, where)
        elif self.kind == "int":
            if isinstance(value, float) and not value.is_integer():
                raise ValueError
            number = int(value)
        else:
            number = float(value)
        if not math.isfinite(number):
            raise ValueError
        if self.minimum is not None and (
            number < self.minimum or (self.above_minimum and number == self.minimum)
        ):
            raise ValueError
        if self.maximum is not None and number > self.maximum:
            raise ValueError
        return number


def _shown(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:.10g}"


def knobs() -> tuple[Setting, ...]:
    """The engine's knobs, from the native table."""
    from edgert import _native

    return tuple(_from_knob(row) for row in _native.knobs())


def _from_knob(row: Mapping[str, Any]) -> Setting:
    numeric = row["kind"] != "choice"
    return Setting(
        name=row["name"],
        kind=row["kind"],
        help=row["help"],
        default=row["default"],
        minimum=row["minimum"] if numeric else None,
        maximum=row["maximum"] if numeric else None,
        choices=tuple(row["choices"]),
        unit=row["unit"],
        live=row["live"],
        lossy=row["lossy"],
    )


def every_setting() -> tuple[Setting, ...]:
    """All that a configuration file may hold."""
    from edgert.controlling.bounds import CONTROL
    from edgert.sampling import SAMPLING
    from edgert.server.configuration import SETTINGS

    return knobs() + SAMPLING + SETTINGS + CONTROL


def home() -> Path:
    """Where bundles live: $EDGERT_HOME, else ~/.local/share/edgert."""
    named = os.environ.get("EDGERT_HOME")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "edgert"


def cache() -> Path:
    """Where what can be made again is kept: $EDGERT_HOME/cache, else ~/.cache/edgert."""
    named = os.environ.get("EDGERT_HOME")
    if named:
        return Path(named) / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgert"


def state() -> Path:
    """Where what is remembered between runs is kept: $EDGERT_HOME/state, else ~/.local/state/edgert."""
    named = os.environ.get("EDGERT_HOME")
    if named:
        return Path(named) / "state"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "edgert"


class Layers:
    """The configuration files, read once; variables are looked up as they are asked for."""

    def __init__(self, files: Iterable[tuple[Path, Mapping[str, Any]]]) -> None:
        self._files = tuple(files)

    @classmethod
    def read(cls) -> "Layers":
        """Read the files that exist.

        Raises NotFoundError where EDGERT_CONFIG names no file, and InvalidArgumentError, naming the file, for
        malformed TOML and for a key that is no setting.
        """
        known = {setting.name for setting in every_setting()}
        named = os.environ.get("EDGERT_CONFIG")
        base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        user = Path(named) if named else base / "edgert/config.toml"
        if named and (not user.exists() or user.is_dir()):
            raise NotFoundError(f"EDGERT_CONFIG: there is no file {user}")
        return cls((path, _read_file(path, known)) for path in (user, SYSTEM_FILE) if path.is_file())

    def value(self, setting: Setting, given: object = None) -> Any:
        """The value of `setting`: `given` unless None, else the variable's, else the first file's, else None."""
        found = self.find(setting, given)
        return None if found is None else found[0]

    def find(self, setting: Setting, given: object = None) -> tuple[Any, str] | None:
        """The same with where it comes from: the setting's name if it was given."""
        if given is not None:
            return setting.check(given), setting.name
        variable = os.environ.get(setting.variable)
        if variable:
            return setting.check(variable, setting.variable), setting.variable
        for path, table in self._files:
            if setting.name in table:
                where = f"{path}: {setting.name}"
                return setting.check(table[setting.name], where), where
        return None


def _read_file(path: Path, known: set[str]) -> dict[str, Any]:
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise InvalidArgumentError(f"{path}: more than {_MAX_FILE_BYTES} bytes")
    try:
        table = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidArgumentError(f"{path}: not valid TOML: {error}") from None
    for key in table:
        if key not in known:
            raise InvalidArgumentError(
                f"{path}: unknown key {key!r}; the keys are {', '.join(sorted(known))}"
            )
    return table
