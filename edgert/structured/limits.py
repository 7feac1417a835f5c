"""What a schema or a grammar may be: checked before the library that compiles it sees it.

The library bounds its own work, but recurses as deep as a schema nests, also through `$ref`, and takes memory that is
quadratic in the length of a pattern.
"""

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from edgert.errors import InvalidArgumentError, UnsupportedError

MAX_SCHEMA_CHARACTERS = 128 << 10
MAX_DEPTH = 64  # of brackets in a schema
MAX_TOTAL_DEPTH = 1000  # summed over what is referred to: how deep a chain of references can lead
MAX_LARK_CHARACTERS = 16 << 10
MAX_PATTERN_CHARACTERS = 2048
MAX_CHOICES = 1000
MAX_MULTIPLE = 100_000  # of all multipleOf together: the compiler makes a state of each remainder
MAX_EXACT_INTEGER = 1 << 53  # the compiler reads bounds as doubles
MIN_BOUND = 1e-15  # of no more digits than it writes

_BOUND_KEYS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_PATTERN_KEYS = ("pattern", "whitespace_pattern")
_STRING_OR_PATTERN = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)*/|//[^\n]*|(?<![^\s])#[^\n]*')


def check_schema(schema: object, where: str) -> Mapping[str, Any] | bool:
    """`schema`, if it is one in bounds. Raises InvalidArgumentError for what is none, is not plain JSON or refers to
    anything outside itself, UnsupportedError for what is too large."""
    if not isinstance(schema, Mapping | bool):
        raise InvalidArgumentError(f"{where}: found {type(schema).__name__}, allowed is a JSON schema")
    _check_depth(schema, where)
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"{where}: holds a lone surrogate") from None
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{where}: not plain JSON: {error}") from None
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise UnsupportedError(f"{where}: found {len(text)} characters, allowed are {MAX_SCHEMA_CHARACTERS}")
    _check_references(schema, where)
    return schema


def _check_depth(value: object, where: str) -> None:
    """Nothing in here recurses, nor what sees the schema later beyond this depth."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
        if len(level) > MAX_SCHEMA_CHARACTERS:
            raise UnsupportedError(f"{where}: found more than {MAX_SCHEMA_CHARACTERS} values")
    raise UnsupportedError(f"{where}: nested deeper than {MAX_DEPTH}")


def _children(value: object) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _depth(value: object) -> int:
    level, depth = [value], 0
    while level := [child for item in level for child in _children(item)]:
        depth += 1
    return depth


def _check_references(schema: Mapping[str, Any] | bool, where: str) -> None:
    """References stay inside the document, and cannot chain up without bound; patterns are short, numbers have bounds
    that hold."""
    total, targets = _depth(schema), set()
    multiples: list[Decimal] = []
    todo: list[Any] = [schema]
    while todo:
        value = todo.pop()
        todo.extend(_children(value))
        if not isinstance(value, Mapping):
            continue
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            target = value.get(key)
            if not isinstance(target, str):
                continue  # such as a property of this name
            if not target.startswith("#"):
                raise InvalidArgumentError(
                    f"{where}: {key}: found {target[:100]!r}: nothing is fetched; allowed are references within the schema"
                )
            if target not in targets:
                targets.add(target)
                total += 1 + _depth(_resolved(schema, target))
        for key in _BOUND_KEYS:
            if _is_number(value.get(key)):
                _check_bound(key, value[key], where)
        if _is_number(value.get("multipleOf")):
            multiples.append(_checked_multiple(value["multipleOf"], where))
        for key in _PATTERN_KEYS:
            if isinstance(value.get(key), str):
                check_pattern(value[key], f"{where}: {key}")
        if isinstance(value.get("patternProperties"), Mapping):
            for pattern in value["patternProperties"]:
                check_pattern(str(pattern), f"{where}: patternProperties")
    if total > MAX_TOTAL_DEPTH:
        raise UnsupportedError(f"{where}: references lead deeper than {MAX_TOTAL_DEPTH}")
    if (together := _common_multiple(multiples)) > MAX_MULTIPLE:
        raise UnsupportedError(
            f"{where}: multipleOf: all together lead to {together}, allowed is {MAX_MULTIPLE} (times a power of ten)"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_bound(key: str, bound: float, where: str) -> None:
    """Bounds that the compiler takes at their word."""
    if 0 < abs(bound) < MIN_BOUND:
        raise UnsupportedError(f"{where}: {key}: found {bound!r}, allowed are 0, and {MIN_BOUND!r} or more")
    if abs(bound) < MAX_EXACT_INTEGER:
        return
    # Between them and what 64 bits hold, those that a double holds; past it the bound holds by itself.
    loose = bound >= (1 << 63) - 1 if key == "maximum" else bound <= -(1 << 63)
    exact = abs(bound) < 1 << 63 and float(bound) == bound
    if key.startswith("exclusive") or not (exact or loose):
        raise UnsupportedError(f"{where}: {key}: found {bound!r}, allowed is less than 2^53")


def _checked_multiple(value: float, where: str) -> Decimal:
    if value <= 0:
        raise InvalidArgumentError(f"{where}: multipleOf: found {value!r}, allowed is more than 0")
    return Decimal(repr(value))


def _common_multiple(multiples: list[Decimal]) -> int:
    """In units of the smallest decimal place there is, less powers of ten; of the first ones, where it is too large."""
    place = min((int(one.as_tuple().exponent) for one in multiples), default=0)
    together = reduced = 1
    for one in multiples:
        together = reduced = math.lcm(together, int(Fraction(one) / Fraction(10) ** place))
        while reduced % 10 == 0:
            reduced //= 10
        if reduced > MAX_MULTIPLE:
            break
    return reduced


def _resolved(schema: object, pointer: str) -> object:
    """What a reference means; None where it is no JSON pointer into the schema, which the compiler will say."""
    value = schema
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def check_pattern(pattern: object, where: str) -> str:
    """Raises InvalidArgumentError, or UnsupportedError where it is too long."""
    text = _text(pattern, where)
    if len(text) > MAX_PATTERN_CHARACTERS:
        raise UnsupportedError(f"{where}: found {len(text)} characters, allowed are {MAX_PATTERN_CHARACTERS}")
    return text


def check_lark(grammar: object, where: str) -> str:
    """Raises InvalidArgumentError, or UnsupportedError for what is too large or takes unbounded work to compile."""
    text = _text(grammar, where)
    if len(text) > MAX_LARK_CHARACTERS:
        raise UnsupportedError(f"{where}: found {len(text)} characters, allowed are {MAX_LARK_CHARACTERS}")
    for match in _STRING_OR_PATTERN.finditer(text):
        check_pattern(match[0], f"{where}: a terminal")
    bare = _STRING_OR_PATTERN.sub("", text)
    for operator in "&~":
        if operator in bare:
            raise UnsupportedError(
                f"{where}: the operator {operator} takes unbounded work and is not allowed"
            )
    return text


def check_choices(choices: object, where: str) -> list[str]:
    """Raises InvalidArgumentError for what is no list of some strings."""
    if isinstance(choices, str) or not isinstance(choices, list | tuple) or not choices:
        raise InvalidArgumentError(f"{where}: allowed is a list of 1 to {MAX_CHOICES} strings")
    if len(choices) > MAX_CHOICES or sum(len(str(one)) for one in choices) > MAX_LARK_CHARACTERS:
        raise UnsupportedError(
            f"{where}: allowed are {MAX_CHOICES} strings of together {MAX_LARK_CHARACTERS} characters"
        )
    return [_text(one, where) for one in choices]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidArgumentError(f"{where}: found {value!r:.60}, allowed is a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{where}: character {error.start} is a lone surrogate") from None
    if "\0" in value:
        raise InvalidArgumentError(f"{where}: holds a NUL")
    return value
