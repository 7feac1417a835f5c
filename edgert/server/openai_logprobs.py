"""Log-probabilities as the two routes that have them write them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgert.generation import Piece
    from edgert.scoring import Scored
    from edgert.tokenizer import Tokenizer

_LEAST = -9999.0  # what JSON has for minus infinity


def finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def entry(tokenizer: "Tokenizer", piece: "Piece") -> dict[str, Any]:
    """Of one token, for a chat: the likeliest in its place with it."""
    assert piece.token is not None and piece.logprob is not None
    top = piece.top_logprobs or ()
    return {
        **_token(tokenizer, piece.token, dict(top).get(piece.token, piece.logprob)),
        "top_logprobs": [_token(tokenizer, token, logprob) for token, logprob in top],
    }


def _token(tokenizer: "Tokenizer", token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.bytes_of(token)
    return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}


class CompletionLogprobs:
    """The four lists of a completion, grown token by token."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._offset = 0
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token: int, scored: "Scored | None") -> None:
        """`scored` is None of the first token of a prompt, which nothing foretells."""
        name = self._name(token)
        self._tokens.append(name)
        self._offsets.append(self._offset)
        self._offset += len(self._stream.push(token))
        if scored is None:
            self._logprobs.append(None)
            self._top.append(None)
            return
        best = {self._name(other): finite(value) for other, value in scored[1]}
        self._logprobs.append(best.setdefault(name, finite(scored[0])))
        self._top.append(best)

    def take(self) -> dict[str, Any]:
        """What was added since the last time."""
        lists = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }
        self._clear()
        return lists

    def _name(self, token: int) -> str:
        """As OpenAI has it: its text, or the bytes of a part of a character."""
        data = self._tokenizer.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
