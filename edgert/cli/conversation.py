"""A conversation on the terminal: what `edgert run` does when nobody gives it a prompt."""

import argparse
from typing import TYPE_CHECKING, Any

from edgert.cli.terminal import fail, note, say
from edgert.errors import InvalidArgumentError

if TYPE_CHECKING:
    from edgert.generation import Generation, Stream
    from edgert.model import Model

_HELP = "Ctrl-D ends, Ctrl-C stops an answer, /clear begins anew"


def converse(model: "Model", args: argparse.Namespace, sampling: dict[str, Any]) -> int:
    """Take turns until the input ends. Without a chat template, or with --raw, each line is continued by itself."""
    import readline  # noqa: F401 - gives input() its line editing

    from edgert.cli.run import cancelled_by_ctrl_c

    note(_HELP)
    turns = _Turns(model, args, sampling)
    while True:
        try:
            line = input(">>> ").strip()
        except EOFError:
            say("")
            return 0
        if line == "/clear":
            turns = _Turns(model, args, sampling)
        elif line:
            try:
                stream = turns.ask(line)
            except InvalidArgumentError as error:  # such as a conversation that outgrew the context
                fail(error)
                continue
            with cancelled_by_ctrl_c(stream):
                for piece in stream:
                    say(piece.text, end="")
            say("")
            turns.answered(line, stream.result)


class _Turns:
    """The conversation so far."""

    def __init__(self, model: "Model", args: argparse.Namespace, sampling: dict[str, Any]) -> None:
        self._model = model
        self._sampling = sampling
        self._plain = args.raw or model.tokenizer.chat_template is None
        self._messages = [{"role": "system", "content": args.system}] if args.system else []

    def ask(self, text: str) -> "Stream":
        if self._plain:
            return self._model.stream(text, **self._sampling)
        asked = {"role": "user", "content": text}
        return self._model.chat([*self._messages, asked], stream=True, **self._sampling)

    def answered(self, text: str, result: "Generation") -> None:
        note(
            f"[{result.statistics['generated_tokens']} tokens at {result.statistics['decode_tokens_per_s']:.1f} tok/s, "
            f"{result.finish_reason}]"
        )
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": result.text}]
