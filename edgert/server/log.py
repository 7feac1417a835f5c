"""What the daemon writes to stderr, for people, journald or a program. Never a prompt, an answer or a key."""

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

_MAX_PATH = 100


class RequestLog:
    """One line a request, and what else there is to say. `form` is text or json."""

    def __init__(self, form: str = "text") -> None:
        self._json = form == "json"

    def request(
        self,
        request_id: str,
        scope: Mapping[str, Any],
        status: int,
        seconds: float,
        summary: Mapping[str, Any],
    ) -> None:
        client = scope.get("client")
        self._write(
            {
                "event": "request",
                "id": request_id,
                "client": client[0] if client else "",
                "method": scope["method"],
                "path": scope["path"][:_MAX_PATH],
                "status": status,
                "seconds": round(seconds, 4),
                **summary,
            }
        )

    def event(self, event: str, message: str, **more: Any) -> None:
        self._write({"event": event, "message": message, **more})

    def failure(self, request_id: str, error: BaseException) -> None:
        """An error that is ours; where it arose is told, what the request said is not."""
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = " < ".join(
            f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames)
        )
        self._write(
            {
                "event": "error",
                "id": request_id,
                "kind": type(error).__name__,
                "message": str(error)[:500],
                "at": where,
            }
        )

    def _write(self, row: dict[str, Any]) -> None:
        if self._json:
            line = json.dumps({"time": round(time.time(), 3), **row})
        else:
            name = row.pop("event")
            said = row.pop("message", "")
            rest = " ".join(f"{key}={_plain(value)}" for key, value in row.items())
            line = " ".join(part for part in (f"edgert: {name}:", said, rest) if part)
        with suppress(OSError):  # a full disk or a reader that has gone must not stop the service
            print("".join(c if c.isprintable() else "\ufffd" for c in line), file=sys.stderr, flush=True)


class Handler(logging.Handler):
    """What libraries log, as lines of a RequestLog."""

    def __init__(self, log: RequestLog) -> None:
        super().__init__(logging.WARNING)
        self._to = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            self._to.failure(record.name, error)
        else:
            self._to.event("library", record.getMessage()[:500], source=record.name)


def _plain(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if any(c in ' "=' for c in text) or not text else text
