"""What runs on this machine: a daemon that answers, and processes that run edgert's commands."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgert.errors import CorruptError, InvalidArgumentError, StorageError
from edgert.server.configuration import SERVER, read_keys

DAEMON = tuple(setting for setting in SERVER if setting.name in ("host", "port", "api_key_file"))
_LASTING = ("run", "chat", "serve", "bench", "eval", "convert", "pull", "calibrate", "demo")
_TIMEOUT_S = 5.0
_MAX_REPLY_BYTES = 16 << 20


@dataclass(frozen=True)
class Process:
    """A process that runs a command of edgert's that takes its time."""

    pid: int
    command: str
    rss_bytes: int
    up_s: float

    def as_object(self) -> dict[str, Any]:
        return asdict(self)


def processes() -> Iterator[Process]:
    """In the order of their numbers. What a process does not tell is left out with it."""
    import psutil  # type: ignore[import-untyped]

    for process in psutil.process_iter():
        try:
            words = edgert_command(process.cmdline())
            if words:
                up = max(0.0, time.time() - process.create_time())
                yield Process(process.pid, " ".join(words), process.memory_info().rss, up)
        except psutil.Error:  # it has ended, or is another's
            continue


def edgert_command(words: Sequence[str]) -> list[str]:
    """The command and what it was told, of a process of those words; empty where it runs no lasting command of edgert's."""
    for index, word in enumerate(words[:4]):
        # a console script, which the interpreter is given as a file, or the module
        named = os.path.basename(word) == "edgert" or (word == "edgert" and words[index - 1] == "-m")
        if named and index + 1 < len(words) and words[index + 1] in _LASTING:
            return list(words[index + 1 :])
    return []


def ask_daemon(host: str, port: int, key_file: str | None) -> dict[str, Any] | None:
    """What the daemon there tells of itself (/stats); None where none listens.

    Raises StorageError where it does not answer, InvalidArgumentError where it wants another key, CorruptError where
    what answers is no daemon of edgert's.
    """
    from http.client import HTTPConnection, HTTPException  # which a look at --help need not wait for

    where = f"{host}:{port}"
    headers = {}
    if key_file is not None:
        headers["Authorization"] = f"Bearer {read_keys(Path(key_file))[0].decode()}"
    connection = HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/stats", headers=headers)
        reply = connection.getresponse()
        content = reply.read(_MAX_REPLY_BYTES)
    except ConnectionRefusedError:
        return None
    except (OSError, HTTPException) as error:
        raise StorageError(f"{where}: does not answer: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if reply.status in (401, 403):
        raise InvalidArgumentError(f"{where}: the daemon wants its key; say --api-key-file")
    stats = _object(content) if reply.status == 200 else {}
    if not {"state", "uptime_s", "budget_bytes", "models"} <= stats.keys():
        raise CorruptError(f"{where}: something else than edgert's daemon answers (status {reply.status})")
    return stats


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
