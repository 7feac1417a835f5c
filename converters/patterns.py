"""Regular expressions of other people's files, matched in bounded time: Python's own engine can take for ever."""

# Not google-re2: whoever reads adapters would need it built, and its syntax is not quite that of Python's re, which PEFT uses ([[:alpha:]]).

from collections.abc import Callable, Iterable

from edgert.errors import UnsupportedError

_MAX_LENGTH = 512
_MAX_STEPS = 1 << 20  # of one match, a step being one character at one place
_MAX_DEPTH = 16
_SPECIAL = frozenset("\\^$*+?{}[]()|")
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdigit,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
# From the places in a text that have been reached to those that are reached behind a part of a pattern.
_Step = Callable[["_Text", set[int]], set[int]]


class _Text:
    def __init__(self, text: str) -> None:
        self.text = text
        self.steps = 0


class Pattern:
    """Letters, ., [], \\d, \\w, \\s, groups, |, ^, $ and *, +, ?, {m,n}; UnsupportedError for anything else."""

    def __init__(self, pattern: str, where: str) -> None:
        self._where, self._pattern, self._at, self._depth = where, pattern, 0, 0
        if len(pattern) > _MAX_LENGTH:
            self._refuse()
        self._is_plain = _SPECIAL.isdisjoint(pattern)  # each letter, and ., stands for one
        self._match = self._alternatives()
        if self._at < len(pattern):
            self._refuse()

    def matches(self, text: str, starts: Iterable[int] = (0,)) -> bool:
        """Whether it matches from one of these places to the end."""
        state = _Text(text)
        reached = self._match(state, set(starts))
        if state.steps > _MAX_STEPS:
            self._refuse()
        return len(text) in reached

    def matches_end(self, name: str) -> bool:
        """Whether it matches a dotted name, or its last components, as PEFT's patterns do."""
        if self._is_plain:  # most are; there may be one for each of thousands of modules
            begin = len(name) - len(self._pattern)
            return (begin == 0 or (begin > 0 and name[begin - 1] == ".")) and all(
                one == other or (one == "." and other != "\n")
                for one, other in zip(self._pattern, name[begin:], strict=True)
            )
        return self.matches(name, [0, *(i + 1 for i, c in enumerate(name) if c == ".")])

    def _refuse(self) -> None:
        raise UnsupportedError(
            f"{self._where}: {self._pattern[:80]!r} is a regular expression that is not read; read are letters, ., [], \\d, \\w, "
            "groups, |, ^, $ and *, +, ?, {m,n}"
        )

    # --- parsing ------------------------------------------------------------------------------------

    def _next(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        if not self._pattern.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _alternatives(self) -> _Step:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._refuse()
        found = [self._sequence()]
        while self._take("|"):
            found.append(self._sequence())
        self._depth -= 1
        return (
            found[0] if len(found) == 1 else lambda text, at: set().union(*(one(text, at) for one in found))
        )

    def _sequence(self) -> _Step:
        steps: list[_Step] = []
        while self._next() not in ("", "|", ")"):
            steps.append(self._repeated(self._atom()))

        def run(text: _Text, at: set[int]) -> set[int]:
            for step in steps:
                at = step(text, at)
            return at

        return run

    def _repeated(self, atom: _Step) -> _Step:
        least, most = 1, 1
        if self._take("*"):
            least, most = 0, _MAX_LENGTH
        elif self._take("+"):
            least, most = 1, _MAX_LENGTH
        elif self._take("?"):
            least, most = 0, 1
        elif self._take("{"):
            counts, closed, _ = self._pattern[self._at :].partition("}")
            low, comma, high = counts.partition(",")
            if not closed or not low.isdigit() or not (high or "0").isdigit():
                self._refuse()
            self._at += len(counts) + 1
            least = int(low)
            most = int(high) if high else (_MAX_LENGTH if comma else least)
        else:
            return atom
        self._take("?")  # as short as can be, or as long: the same words
        if self._next() in ("*", "+", "?", "{") or most > _MAX_LENGTH:
            self._refuse()
        return lambda text, at: _repeat(atom, text, at, least, most)

    def _atom(self) -> _Step:
        at = self._at
        self._at += 1
        character = self._pattern[at]
        if character == "(":
            if self._next() == "?" and not self._take("?:"):
                self._refuse()
            inside = self._alternatives()
            if not self._take(")"):
                self._refuse()
            return inside
        if character == "[":
            return self._set()
        if character == "^":
            return lambda text, at: at & {0}
        if character == "$":
            return lambda text, at: at & {len(text.text)}
        if character in "*+?{":
            self._refuse()
        if character == ".":
            return _one(lambda c: c != "\n")
        return _one(self._escaped() if character == "\\" else character.__eq__)

    def _escaped(self) -> Callable[[str], bool]:
        character = self._next()
        self._at += 1
        if character in _CLASSES:
            return _CLASSES[character]
        if not character or character.isalnum():
            self._refuse()
        return character.__eq__

    def _set(self) -> _Step:
        negated = self._take("^")
        tests: list[Callable[[str], bool]] = []
        while self._next() != "]" or not tests:
            first = self._next()
            self._at += 1
            if first == "\\":
                tests.append(self._escaped())
            elif self._next() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                last = self._pattern[self._at + 1]
                self._at += 2
                tests.append(lambda c, first=first, last=last: first <= c <= last)  # type: ignore[misc]
            elif first:
                tests.append(first.__eq__)
            else:
                self._refuse()
        self._at += 1
        return _one(lambda c: any(test(c) for test in tests) != negated)


def _one(test: Callable[[str], bool]) -> _Step:
    def step(text: _Text, at: set[int]) -> set[int]:
        text.steps += len(at) + 1
        if text.steps > _MAX_STEPS:
            return set()
        return {i + 1 for i in at if i < len(text.text) and test(text.text[i])}

    return step


def _repeat(atom: _Step, text: _Text, at: set[int], least: int, most: int) -> set[int]:
    reached: set[int] = set()
    for count in range(most + 1):
        text.steps += 1
        if count >= least:
            at = at - reached
            reached |= at
        if not at or count == most or text.steps > _MAX_STEPS:
            break
        at = atom(text, at)
    return reached
