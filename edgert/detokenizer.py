"""Text from tokens, one token at a time.

The pieces, joined, are exactly what the `tokenizers` library gives for the whole sequence; a piece never ends inside a
UTF-8 character, and a token costs the same however long the text already is. A Detokenizer is a chain of the steps that
the tokenizer's own decoder names; each step keeps what later tokens may still change.
"""

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from edgert.errors import UnsupportedError


class Step(Protocol):
    """Takes strings as they come and answers with those that are settled; finish() settles the rest."""

    def push(self, token: str) -> list[str]: ...
    def finish(self) -> list[str]: ...


class _EachToken:
    """A step that treats every token alike."""

    def __init__(self, convert: Callable[[str], str]) -> None:
        self._convert = convert

    def push(self, token: str) -> list[str]:
        return [self._convert(token)]

    def finish(self) -> list[str]:
        return []


class _FirstApart:
    """A step that treats the first token in its own way."""

    def __init__(self, first: Callable[[str], str], rest: Callable[[str], str]) -> None:
        self._convert, self._rest = first, rest

    def push(self, token: str) -> list[str]:
        text = self._convert(token)
        self._convert = self._rest
        return [text]

    def finish(self) -> list[str]:
        return []


class _ByteLevel:
    """Characters stand for bytes (GPT-2's alphabet); the bytes of all tokens are one UTF-8 text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str) -> list[str]:
        return [self._decoder.decode(self.bytes_of(token))]

    @staticmethod
    def bytes_of(token: str) -> bytes:
        try:
            return bytes(_BYTES[character] for character in token)
        except KeyError:  # an added token in plain letters
            return token.encode()

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


class _ByteFallback:
    """Tokens such as <0xE4> stand for bytes. A run of them is text if all of it is UTF-8, else one U+FFFD a byte; so a
    run is settled when it ends."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, token: str) -> list[str]:
        byte = self.byte_of(token)
        if byte is not None:
            self._run.append(byte)
            return []
        return [*self.finish(), token]

    @staticmethod
    def byte_of(token: str) -> int | None:
        match = _BYTE_TOKEN.fullmatch(token)
        return None if match is None else int(match[1], 16)

    def finish(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        if not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class _StripText:
    """Cuts up to `start` and `stop` of one character from the ends of the whole text."""

    def __init__(self, character: str, start: int, stop: int) -> None:
        self._character, self._start, self._stop = character, start, stop
        self._tail = ""  # what may turn out to be the end

    def push(self, token: str) -> list[str]:
        while self._start and token:
            if token[0] != self._character:
                self._start = 0
                break
            token, self._start = token[1:], self._start - 1
        text = self._tail + token
        kept = len(text)
        while kept and len(text) - kept < self._stop and text[kept - 1] == self._character:
            kept -= 1
        self._tail = text[kept:]
        return [text[:kept]]

    def finish(self) -> list[str]:
        return []  # the tail is what the end loses


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTES = _byte_alphabet()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _strip_token(config: Mapping[str, Any]) -> Callable[[str], str]:
    def strip(token: str) -> str:
        step = _StripText(config["content"], config["start"], config["stop"])
        return step.push(token)[0]

    return strip


def _replace_token(config: Mapping[str, Any]) -> Callable[[str], str]:
    pattern, content = config["pattern"], config["content"]
    if "String" not in pattern or not pattern["String"]:
        raise UnsupportedError(
            "tokenizer.json: decoder: Replace with a regular expression cannot be streamed"
        )
    literal = pattern["String"]
    return lambda token: token.replace(literal, content)


def plan(decoder: Mapping[str, Any] | None) -> list[Callable[[], Step]]:
    """Return makers of the steps for the `decoder` object of a tokenizer.json.

    Raises UnsupportedError naming a decoder that cannot be streamed.
    """
    if decoder is None:  # tokens are words
        return [lambda: _FirstApart(lambda token: token, lambda token: " " + token)]
    configs = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    makers: list[Callable[[], Step]] = []
    fused = False  # from here on there are no tokens, only one text
    for config in configs:
        kind = config["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Strip":
            makers.append(_maker_of_strip(config, fused))
        elif fused:
            raise UnsupportedError(
                f"tokenizer.json: decoder: {kind} after Fuse or ByteLevel cannot be streamed"
            )
        elif kind == "ByteLevel":
            makers.append(_ByteLevel)
            fused = True
        elif kind == "ByteFallback":
            makers.append(_ByteFallback)
        elif kind == "Replace":
            makers.append(_maker_of_each(_replace_token(config)))
        elif kind == "Metaspace":
            makers.append(_maker_of_metaspace(config))
        else:
            raise UnsupportedError(
                f"tokenizer.json: decoder: found {kind!r}, allowed are ByteLevel, ByteFallback, Fuse, Metaspace, Replace, "
                "Strip and a Sequence of them"
            )
    return makers


def _maker_of_strip(config: Mapping[str, Any], fused: bool) -> Callable[[], Step]:
    if fused:
        return lambda: _StripText(config["content"], config["start"], config["stop"])
    return _maker_of_each(_strip_token(config))


def _maker_of_each(convert: Callable[[str], str]) -> Callable[[], Step]:
    return lambda: _EachToken(convert)


def _maker_of_metaspace(config: Mapping[str, Any]) -> Callable[[], Step]:
    mark = config["replacement"]
    leading = " " if config.get("prepend_scheme", "always") == "never" else ""
    return lambda: _FirstApart(
        lambda token: token.replace(mark, leading), lambda token: token.replace(mark, " ")
    )


class Detokenizer:
    """One stream of text. `token_of` gives a token's string, None for those that have no text."""

    def __init__(self, token_of: Callable[[int], str | None], steps: Sequence[Callable[[], Step]]) -> None:
        self._token_of = token_of
        self._steps = [make() for make in steps]

    def push(self, token: int) -> str:
        """Return the text that `token` settles; often its own, sometimes none yet."""
        string = self._token_of(token)
        return "" if string is None else self._run([string], 0)

    def finish(self) -> str:
        """Return what was still held back; the stream is over."""
        return "".join(self._run(step.finish(), index + 1) for index, step in enumerate(self._steps))

    def _run(self, strings: list[str], first: int) -> str:
        for step in self._steps[first:]:
            strings = [out for string in strings for out in step.push(string)]
        return "".join(strings)


def bytes_of_tokens(steps: Sequence[Callable[[], Step]]) -> Callable[[str], bytes]:
    """What a token, given as a string, adds in the middle of a text: bytes, because it may end inside a character."""
    chain = [make() for make in steps if make not in (_ByteLevel, _ByteFallback)]
    chain = [step for step in chain if not isinstance(step, _StripText)]  # of the ends of a text
    for step in chain:
        step.push("")  # a text's first token may be treated in its own way

    def convert(token: str) -> bytes:
        byte = _ByteFallback.byte_of(token) if _ByteFallback in steps else None
        if byte is not None:
            return bytes([byte])
        for step in chain:
            token = "".join(step.push(token))
        return _ByteLevel.bytes_of(token) if _ByteLevel in steps else token.encode()

    return convert


class StopStrings:
    """Finds the first stop string in a stream of text, whatever the pieces.

    Text is held back while it could still be the beginning of a stop string. Of strings that end at the same character
    the longest counts. A character costs one comparison a stop string, amortised.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # how much of each stop string the text so far ends with
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return the text that is certain not to belong to a stop string; nothing more once `found` is set."""
        if self.found is not None:
            return ""
        for index, character in enumerate(text):
            complete = self._advance(character)
            if complete:
                self.found = max(complete, key=len)
                seen = self._held + text[: index + 1]
                self._held = ""
                return seen[: len(seen) - len(self.found)]
        seen = self._held + text
        kept = len(seen) - max(self._matched, default=0)
        self._held = seen[kept:]
        return seen[:kept]

    def finish(self) -> str:
        """Return what was held back: no stop string came."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> list[str]:
        complete = []
        for index, (stop, borders) in enumerate(self._stops):
            length = self._matched[index]
            while length and stop[length] != character:
                length = borders[length - 1]
            length += stop[length] == character
            if length == len(stop):
                complete.append(stop)
            self._matched[index] = length
        return complete


def _borders(text: str) -> list[int]:
    """For every prefix, the length of its longest proper prefix that is also its suffix (Knuth, Morris, Pratt)."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        length += text[index] == text[length]
        borders[index] = length
    return borders
