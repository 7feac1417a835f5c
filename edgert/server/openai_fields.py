"""What a JSON value may be: declared once; requests are checked by it and the OpenAPI document is made of it.

check() returns the value as the program uses it, or raises ApiError 400 naming the place, what was found and what is
allowed. schema() is the same in JSON Schema 2020-12, as OpenAPI 3.1 has it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgert.server.errors import ApiError
from edgert.settings import Setting

Schema = dict[str, Any]


def refused(message: str, param: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Kind(ABC):
    """One sort of value."""

    types: frozenset[type]  # of Python, as the JSON parser gives them

    @abstractmethod
    def check(self, value: Any, where: str) -> Any: ...
    @abstractmethod
    def schema(self) -> Schema: ...
    @abstractmethod
    def allowed(self) -> str:
        """In words."""

    def wrong(self, value: object, where: str) -> ApiError:
        return refused(f"{where}: found {shown(value)}, allowed is {self.allowed()}", where)


@dataclass(frozen=True)
class Text(Kind):
    minimum: int = 0
    maximum: int | None = None
    pattern: str | None = None  # for the document alone
    types = frozenset({str})

    def check(self, value: Any, where: str) -> str:
        if type(value) is not str or len(value) < self.minimum:
            raise self.wrong(value, where)
        if self.maximum is not None and len(value) > self.maximum:
            raise refused(f"{where}: found {len(value)} characters, allowed are {self.maximum}", where)
        return value

    def schema(self) -> Schema:
        limits = {"minLength": self.minimum or None, "maxLength": self.maximum, "pattern": self.pattern}
        return {"type": "string", **{name: limit for name, limit in limits.items() if limit is not None}}

    def allowed(self) -> str:
        return "a string" if not self.minimum else "a string that is not empty"


@dataclass(frozen=True)
class Number(Kind):
    minimum: float | None = None
    maximum: float | None = None
    above_minimum: bool = False
    whole: bool = False
    types = frozenset({int, float})

    def check(self, value: Any, where: str) -> Any:
        if type(value) not in self.types or not math.isfinite(value):
            raise self.wrong(value, where)
        if self.whole:
            if type(value) is float and not value.is_integer():
                raise self.wrong(value, where)
            value = int(value)
        low, high = self.minimum, self.maximum
        if low is not None and (value < low or (self.above_minimum and value == low)):
            raise self.wrong(value, where)
        if high is not None and value > high:
            raise self.wrong(value, where)
        return value

    def holds_all(self, values: list[Any]) -> bool:
        """Whether they are right as they are, such as thousands of token ids; False may also mean that it is not known."""
        low, high = self.minimum, self.maximum
        if not self.whole or low is None or high is None or set(map(type, values)) != {int}:
            return False
        return bool(min(values) >= low and max(values) <= high)

    def schema(self) -> Schema:
        low = "exclusiveMinimum" if self.above_minimum else "minimum"
        limits = {low: self.minimum, "maximum": self.maximum}
        kind = "integer" if self.whole else "number"
        return {"type": kind, **{name: limit for name, limit in limits.items() if limit is not None}}

    def allowed(self) -> str:
        start = "above" if self.above_minimum else "from"
        low = "" if self.minimum is None else f" {start} {self.minimum}"
        high = "" if self.maximum is None else f" up to {self.maximum}"
        return ("a whole number" if self.whole else "a number") + low + high


def whole(minimum: int | None = None, maximum: int | None = None) -> Number:
    return Number(minimum, maximum, whole=True)


def of_setting(setting: Setting) -> Kind:
    """A number, flag or list of texts that is declared as a Setting already."""
    if setting.kind == "bool":
        return Flag()
    assert setting.kind in ("int", "float")
    return Number(setting.minimum, setting.maximum, setting.above_minimum, setting.kind == "int")


@dataclass(frozen=True)
class Flag(Kind):
    types = frozenset({bool})

    def check(self, value: Any, where: str) -> bool:
        if type(value) is not bool:
            raise self.wrong(value, where)
        return value

    def schema(self) -> Schema:
        return {"type": "boolean"}

    def allowed(self) -> str:
        return "true or false"


class Choice(Kind):
    """One of some constants."""

    def __init__(self, *values: str | bool | int) -> None:
        self.values = values
        self.types = frozenset(map(type, values))

    def check(self, value: Any, where: str) -> Any:
        if type(value) not in self.types or value not in self.values:
            raise self.wrong(value, where)
        return value

    def schema(self) -> Schema:
        return {"enum": list(self.values)}

    def allowed(self) -> str:
        return " or ".join(map(repr, self.values)) if len(self.values) < 9 else f"one of {self.values}"


class Unsupported(Kind):
    """A field that OpenAI has and edgert does not: only the values that ask for nothing are taken."""

    def __init__(self, why: str, *neutral: str | bool | int) -> None:
        self.why = why
        self.neutral = neutral
        self.types = frozenset({str, bool, int, float, list, dict})

    def check(self, value: Any, where: str) -> Any:
        if any(type(value) is type(one) and value == one for one in self.neutral):
            return None
        raise refused(f"{where}: is not supported: {self.why}", where, "unsupported_parameter")

    def schema(self) -> Schema:
        return {"enum": list(self.neutral), "description": f"Not supported: {self.why}"}

    def allowed(self) -> str:
        return "null" + "".join(f" or {shown(value)}" for value in self.neutral)


@dataclass(frozen=True)
class Anything(Kind):
    """Plain data, such as a JSON Schema or what is not looked at. `mapping`: an object."""

    mapping: bool = True
    types = frozenset({dict})

    def check(self, value: Any, where: str) -> Any:
        if self.mapping and type(value) is not dict:
            raise self.wrong(value, where)
        return value

    def schema(self) -> Schema:
        return {"type": "object"} if self.mapping else {}

    def allowed(self) -> str:
        return "an object" if self.mapping else "anything"


@dataclass(frozen=True)
class ListOf(Kind):
    item: Kind
    minimum: int = 0
    maximum: int | None = None
    types = frozenset({list})

    def check(self, value: Any, where: str) -> list[Any]:
        if type(value) is not list:
            raise self.wrong(value, where)
        if len(value) < self.minimum or (self.maximum is not None and len(value) > self.maximum):
            most = "" if self.maximum is None else f" to {self.maximum}"
            raise refused(f"{where}: found {len(value)} items, allowed are {self.minimum}{most}", where)
        if isinstance(self.item, Number) and self.item.holds_all(value):
            return value
        check = self.item.check
        return [check(item, f"{where}[{index}]") for index, item in enumerate(value)]

    def schema(self) -> Schema:
        limits = {"minItems": self.minimum or None, "maxItems": self.maximum}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        return {"type": "array", "items": self.item.schema(), **limits}

    def allowed(self) -> str:
        return f"a list of which each is {self.item.allowed()}"


@dataclass(frozen=True)
class MapOf(Kind):
    """An object with keys of the caller's; `keys` is a regular expression for the document, `key` takes them in."""

    item: Kind
    maximum: int
    key: Kind | None = None
    types = frozenset({dict})

    def check(self, value: Any, where: str) -> dict[Any, Any]:
        if type(value) is not dict:
            raise self.wrong(value, where)
        if len(value) > self.maximum:
            raise refused(f"{where}: found {len(value)} entries, allowed are {self.maximum}", where)
        taken = {}
        for name, item in value.items():
            place = f"{where}.{name:.60}"
            taken[name if self.key is None else self.key.check(name, place)] = self.item.check(item, place)
        return taken

    def schema(self) -> Schema:
        keys = {} if self.key is None else {"propertyNames": self.key.schema()}
        return {
            "type": "object",
            "additionalProperties": self.item.schema(),
            "maxProperties": self.maximum,
            **keys,
        }

    def allowed(self) -> str:
        return f"an object of which each value is {self.item.allowed()}"


class TokenKey(Kind):
    """A token id as the key of an object."""

    types = frozenset({str})

    def check(self, value: Any, where: str) -> int:
        if not (value.isascii() and value.isdigit() and len(value) <= 10):
            raise self.wrong(value, where)
        return int(value)

    def schema(self) -> Schema:
        return {"type": "string", "pattern": "^[0-9]{1,10}$"}

    def allowed(self) -> str:
        return "a token id as the key"


@dataclass(frozen=True)
class Object(Kind):
    """Known fields; null is as if a field were not there, whatever its name. `name`: in the document's components."""

    fields: Mapping[str, Kind]
    required: Sequence[str] = ()
    name: str | None = None
    extra: Kind | None = None  # what other fields hold, which are dropped; None: there must be none
    types = frozenset({dict})

    def check(self, value: Any, where: str) -> dict[str, Any]:
        if type(value) is not dict:
            raise self.wrong(value, where or "the request")
        inside = where + "." if where else ""
        taken = {}
        for name, given in value.items():
            kind = self.fields.get(name)
            if kind is None and given is not None and self.extra is None:
                raise self._unknown(name, inside)
            if kind is not None and given is not None:
                item = kind.check(given, inside + name)
                if item is not None:
                    taken[name] = item
        for name in self.required:
            if value.get(name) is None:
                raise refused(
                    f"{inside}{name}: is missing; it is {self.fields[name].allowed()}",
                    inside + name,
                    "missing_required_parameter",
                )
        return taken

    def _unknown(self, name: str, inside: str) -> ApiError:
        place = f"{inside}{name:.80}"
        known = ", ".join(self.fields)
        return refused(
            f"{place}: is not a field that edgert knows; there are {known}", place, "unknown_parameter"
        )

    def schema(self) -> Schema:
        properties = {
            name: kind.schema() if name in self.required else nullable(kind.schema())
            for name, kind in self.fields.items()
        }
        schema: Schema = {"type": "object", "properties": properties}
        if self.required:
            schema["required"] = list(self.required)
        if self.extra is None:
            schema["additionalProperties"] = {"type": "null"}
        return schema

    def allowed(self) -> str:
        return f"an object with {', '.join(self.required)}" if self.required else "an object"


@dataclass(frozen=True)
class Tagged(Kind):
    """Objects that say by one of their fields which they are; `refused`: those that have a reason of their own."""

    tag: str
    kinds: Mapping[str, Object]
    refused: Mapping[str, str] | None = None
    default: str | None = None
    types = frozenset({dict})

    def check(self, value: Any, where: str) -> dict[str, Any]:
        if type(value) is not dict:
            raise self.wrong(value, where)
        tag = value.get(self.tag, self.default)
        place = f"{where}.{self.tag}"
        if type(tag) is str and self.refused and tag in self.refused:
            raise refused(
                f"{place}: {tag!r} is not supported: {self.refused[tag]}", place, "unsupported_value"
            )
        if type(tag) is not str or tag not in self.kinds:
            raise refused(f"{place}: found {shown(tag)}, allowed is {self._tags()}", place)
        rest = {name: item for name, item in value.items() if name != self.tag}
        return {self.tag: tag, **self.kinds[tag].check(rest, where)}

    def _tags(self) -> str:
        return " or ".join(map(repr, self.kinds))

    def schema(self) -> Schema:
        options = []
        for tag, kind in self.kinds.items():
            schema = kind.schema()
            schema["properties"] = {self.tag: {"const": tag}, **schema["properties"]}
            if tag != self.default:
                schema["required"] = [self.tag, *schema.get("required", ())]
            options.append(schema)
        return {"anyOf": options} if len(options) > 1 else options[0]

    def allowed(self) -> str:
        return f"an object with {self.tag} {self._tags()}"


class AnyOf(Kind):
    """Kinds that JSON's types tell apart; of lists, the first item tells."""

    def __init__(self, *kinds: Kind) -> None:
        self.kinds = kinds
        self.types = frozenset().union(*(kind.types for kind in kinds))

    def check(self, value: Any, where: str) -> Any:
        fitting = [kind for kind in self.kinds if type(value) in kind.types]
        if len(fitting) > 1 and type(value) is list and value:
            lists = [kind for kind in fitting if isinstance(kind, ListOf)]
            fitting = [kind for kind in lists if type(value[0]) in kind.item.types] or fitting
        if not fitting:
            raise self.wrong(value, where)
        return fitting[0].check(value, where)

    def schema(self) -> Schema:
        return {"anyOf": [kind.schema() for kind in self.kinds]}

    def allowed(self) -> str:
        return ", or ".join(kind.allowed() for kind in self.kinds)


def nullable(schema: Schema) -> Schema:
    if not schema:
        return schema
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    return (
        {"anyOf": [*schema["anyOf"], {"type": "null"}]}
        if "anyOf" in schema
        else {"anyOf": [schema, {"type": "null"}]}
    )
