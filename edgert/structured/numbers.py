"""Numbers in JSON have as many digits as a grammar lets them: a weak model writes zeros for ever. Here they end.

The grammars allow more (JSON has no bound on digits), so this takes tokens out of their masks, and only where the number
can end: what is left is a reply of the same form.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

MAX_INTEGER_DIGITS = 19  # as many as 64 bits need
MAX_FRACTION_DIGITS = 17  # as many as tell any two doubles apart
MAX_EXPONENT_DIGITS = 2  # with those before the point: never more than a double holds

_KEPT = 64  # bytes of the reply's end: more than the digits of any part
_PART = re.compile(
    rb"(?:(?<=[0-9])[eE][+-]?(?P<exponent>[0-9]+)|\.(?P<fraction>[0-9]+)|(?P<integer>[0-9]+))\Z"
)
_LIMITS = {
    "exponent": MAX_EXPONENT_DIGITS,
    "fraction": MAX_FRACTION_DIGITS,
    "integer": MAX_INTEGER_DIGITS,
}
_LEADING = re.compile(rb"[0-9]*")
_OF_NUMBERS = re.compile(rb"[0-9.eE+-]+|.*[0-9].*", re.DOTALL)
_ENDS = (b",", b"}", b"]", b" ", b"\n", b"<")  # what comes behind a number, also in calls between tags


class Digits:
    """What a vocabulary's tokens have to do with numbers."""

    def __init__(self, tokens: Sequence[bytes], special: Iterable[int]) -> None:
        special = frozenset(special)
        self.of_numbers: Mapping[int, bytes] = {
            number: token
            for number, token in enumerate(tokens)
            if number not in special and _OF_NUMBERS.fullmatch(token)
        }
        self._leading = {n: len(_LEADING.match(token)[0]) for n, token in self.of_numbers.items()}  # type: ignore[index]
        self.most = max(self._leading.values(), default=0)
        self.quote = _bits(n for n, token in enumerate(tokens) if token == b'"')
        self.ends = _bits([*special, *(n for n, token in enumerate(tokens) if token in _ENDS)])
        self._beginning: dict[int, int] = {}

    def beginning_with(self, digits: int) -> int:
        """The tokens that begin with at least so many, as bits."""
        if digits not in self._beginning:
            self._beginning[digits] = _bits(n for n, count in self._leading.items() if count >= digits)
        return self._beginning[digits]


class NumberGuard:
    """Of one reply: accept() each token, narrowed() each mask."""

    def __init__(self, digits: Digits) -> None:
        self._digits = digits
        self._tail = b""

    def accept(self, token: int) -> None:
        """What is no part of a number ends one."""
        text = self._digits.of_numbers.get(token)
        self._tail = b"" if text is None else (self._tail + text)[-_KEPT:]

    def narrowed(self, mask: memoryview) -> memoryview:
        """Without the tokens that would give a number too many digits. A string, where a quotation mark may follow, and
        digits that cannot end yet are left alone."""
        if not self._tail:
            return mask
        found = _PART.search(self._tail)
        if found is None or found.lastgroup is None:
            return mask
        left = _LIMITS[found.lastgroup] - len(found[found.lastgroup])
        if left >= self._digits.most:
            return mask
        allowed = int.from_bytes(mask, "little")
        if allowed & self._digits.quote or not allowed & self._digits.ends:
            return mask
        allowed &= ~self._digits.beginning_with(max(0, left) + 1)
        return memoryview(allowed.to_bytes(len(mask), "little"))


def _bits(tokens: Iterable[int]) -> int:
    """One bit a token, as in a mask."""
    bits = bytearray()
    for token in tokens:
        if token // 8 >= len(bits):
            bits.extend(bytes(token // 8 + 1 - len(bits)))
        bits[token // 8] |= 1 << token % 8
    return int.from_bytes(bits, "little")
