"""The one family of errors. Native code raises these classes too.

A message names the file, field or tensor, the byte offset where there is one, what was found, what is
allowed and what to do.
"""


class EdgertError(Exception):
    """Base of everything that edgert raises on purpose."""


class NotFoundError(EdgertError, FileNotFoundError):
    """A file, bundle, device profile or name that does not exist."""


class CorruptError(EdgertError):
    """Data that no version could read: a failed checksum, sizes that disagree, malformed structure."""


class UnsupportedError(EdgertError):
    """Well-formed, but this version or this machine cannot do it."""


class InvalidArgumentError(EdgertError, ValueError):
    """A value outside what is allowed; the message names it and its range."""


class ContextLengthError(InvalidArgumentError):
    """A prompt that leaves no room for an answer."""


class StorageError(EdgertError, OSError):
    """The system could not read or write."""


class BudgetError(EdgertError, MemoryError):
    """The memory budget does not suffice; the message names the number that works."""


class CancelledError(EdgertError):
    """The work was cancelled."""


class QueueFullError(EdgertError):
    """Too many requests wait already; try again later."""
