"""A conversation on the terminal or over a pipe: what `edgert chat` does, and `edgert run` on a terminal without a prompt."""

import argparse
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from edgert.cli.lines import Lines
from edgert.cli.options import sampling_flags
from edgert.cli.terminal import fail, note, say
from edgert.errors import EdgertError, InvalidArgumentError

if TYPE_CHECKING:
    from edgert.generation import Generation, Stream
    from edgert.model import Model


def converse(args: argparse.Namespace, *, keep_history: bool = True) -> int:
    """Take turns until the input ends. What goes wrong in a turn is said, and ends no conversation."""
    from edgert.cli.slash import COMMANDS, obey

    with Conversation(args) as conversation:
        if sys.stdin.isatty():
            note("/help says what there is, Ctrl-C stops an answer, Ctrl-D leaves")
        for message in Lines([f"/{name}" for name in COMMANDS], keep_history=keep_history):
            try:
                if message.startswith("/"):
                    obey(conversation, message)
                else:
                    conversation.ask(message)
            except EOFError:
                break
            except (EdgertError, OSError) as error:  # such as a conversation that outgrew the context
                fail(error)
    return 0


class Conversation:
    """What was said, by which model, and how answers are drawn. Without a chat template, or with --raw, each message is
    continued by itself. A context manager that owns the model.

    Attributes: model; messages, as Model.chat() takes them; sampling; last, the newest answer.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.sampling: dict[str, Any] = sampling_flags(args)
        self.messages: list[dict[str, str]] = []
        self.last: Generation | None = None
        self._opened = ExitStack()
        self.set_system(args.system or "")

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    @property
    def model(self) -> "Model":
        return self._model

    @property
    def plain(self) -> bool:
        return self._args.raw or self.model.prompts().tokenizer.chat_template is None

    @property
    def system(self) -> str:
        return self.messages[0]["content"] if self.messages[:1] and _is_system(self.messages[0]) else ""

    def set_system(self, text: str) -> None:
        """For the answers to come; nothing takes it away."""
        if self.messages[:1] and _is_system(self.messages[0]):
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def clear(self) -> None:
        self.messages = self.messages[:1] if self.system else []
        self.last = None

    def ask(self, text: str, **sampling: Any) -> None:
        """Answer aloud, and remember both. A question that could not be asked is forgotten."""
        from edgert.cli.run import cancelled_by_ctrl_c

        asked = {"role": "user", "content": text}
        stream = self._start(asked, {**self.sampling, **sampling})
        with cancelled_by_ctrl_c(stream):
            for piece in stream:
                say(piece.text, end="")
        say("")
        self.last = stream.result
        statistics = self.last.statistics
        note(
            f"[{statistics['generated_tokens']} tokens at {statistics['decode_tokens_per_s']:.1f} tok/s, "
            f"{self.last.finish_reason}]"
        )
        self.messages += [asked, {"role": "assistant", "content": self.last.text}]

    def regenerate(self) -> None:
        """Answer the last question anew, with the next seed."""
        asked = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise InvalidArgumentError("/regenerate: nothing was asked yet")
        before = self.messages
        self.messages, text = before[: asked[-1]], before[asked[-1]]["content"]
        self.sampling["seed"] = (self.sampling["seed"] or 0) + 1
        try:
            self.ask(text)
        except EdgertError:
            self.messages = before
            raise

    def change_model(self, name: str) -> None:
        """Go on with another model. The one before is freed first, and comes back where the other cannot be had."""
        from edgert.bundle import locate
        from edgert.cli.options import find_model

        found = find_model(name, self._args.backend)
        if not os.path.isfile(found or ""):
            locate(found)  # so that a wrong name costs nothing
        before, self._args.model = self._args.model, name
        self._opened.close()
        try:
            self._open()
        except (EdgertError, OSError):
            self._args.model = before
            self._open()
            raise

    def _open(self) -> None:
        from edgert.cli.run import opened

        self._model = self._opened.enter_context(opened(self._args))

    def _start(self, asked: dict[str, str], sampling: dict[str, Any]) -> "Stream":
        if not self.plain:
            return self.model.chat([*self.messages, asked], stream=True, **sampling)
        if self.system:
            raise InvalidArgumentError(
                "a system message has no place without a chat template (and with --raw)"
            )
        return self.model.stream(asked["content"], **sampling)


def _is_system(message: dict[str, str]) -> bool:
    return message["role"] == "system"
