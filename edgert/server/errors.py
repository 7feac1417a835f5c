"""What a client is told when something fails: {"error": {"message", "type", "param", "code"}}, as OpenAI's."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from edgert.errors import (
    BudgetError,
    CancelledError,
    EdgertError,
    InvalidArgumentError,
    NotFoundError,
    QueueFullError,
    UnsupportedError,
)
from edgert.server.models import UnknownModelError

RETRY_AFTER_S = 1


class ApiError(Exception):
    """A reply other than success, decided by a route. `kind` is the shape's "type"."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


def body(error: BaseException) -> dict[str, Any]:
    """The object that says `error`; the last event of a stream that fails holds it too."""
    known = of(error)
    return {"error": {"message": known.message, "type": known.kind, "param": known.param, "code": known.code}}


def response(error: BaseException) -> Response:
    """The whole reply for `error`, which may be of any kind: what is not known is 500 without its text."""
    known = of(error)
    return Response(
        json.dumps(body(known)), known.status, headers=known.headers, media_type="application/json"
    )


def of(error: BaseException) -> ApiError:
    """`error` as a client is to see it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # the router's: no such method
        return ApiError(error.status_code, error.detail, code="http", headers=error.headers)
    if isinstance(error, QueueFullError):
        return unavailable(str(error), "queue_full")
    if isinstance(error, BudgetError):
        return unavailable(str(error), "insufficient_memory")
    if isinstance(error, CancelledError):
        return unavailable(str(error), "cancelled")
    if isinstance(error, UnknownModelError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, NotFoundError):
        return ApiError(404, str(error), code="not_found")
    if isinstance(error, InvalidArgumentError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, UnsupportedError):
        return ApiError(400, str(error), code="unsupported")
    if isinstance(error, EdgertError):  # damaged or unreadable weights: the machine's, not the client's
        return ApiError(500, str(error), kind="server_error", code="storage")
    return ApiError(500, "internal error; the log says more", kind="server_error", code="internal")


def unavailable(message: str, code: str) -> ApiError:
    """503: the same request may succeed soon."""
    return ApiError(503, message, kind="server_error", code=code, headers={"Retry-After": str(RETRY_AFTER_S)})
