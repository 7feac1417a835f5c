"""What holds the tokens of one reply to a form: the protocol between the engine and a grammar."""

from typing import Protocol


class Constraint(Protocol):
    """The form of one reply. Belongs to one request; its methods are called in turn, from any thread.

    Both raise UnsupportedError where the form turns out to need more work than is allowed: that ends this request alone.
    """

    def mask(self) -> bytes | bytearray | memoryview | None:
        """The tokens that the next draw may take: bit t % 32 of little-endian uint32 word t // 32, ceil(vocab_size / 32)
        words; valid until the next call. None: all of them."""

    def accept(self, token: int) -> bool:
        """Take the token that was drawn. False: the form is complete, and the reply ends with finish_reason "stop"."""
