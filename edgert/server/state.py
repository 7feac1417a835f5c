"""What the routes share."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from edgert.converters.strict_json import parse_json
from edgert.errors import CorruptError
from edgert.server.configuration import Configuration
from edgert.server.errors import ApiError, unavailable
from edgert.server.metrics import Metrics
from edgert.server.models import LoadedModel, ModelRegistry
from edgert.server.threads import on_thread

_LARGE_BODY_BYTES = 64 << 10  # what is larger is not read on the event loop
# What the log says of the request at hand besides its route: counts and the model, no text.
SUMMARY: ContextVar[dict[str, int | str]] = ContextVar("summary")


def summarise(**counts: int) -> None:
    """Add to what the log says of this request."""
    summary = SUMMARY.get({})
    for name, count in counts.items():
        summary[name] = int(summary.get(name, 0)) + count


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    body_bytes: int = 4 << 20
    json_depth: int = 64
    json_values: int = 300_000
    max_tokens: int = 1 << 20  # as stated; the context bounds what is drawn
    choices: int = 16  # n
    prompts: int = 64  # in one completion or embedding request


@dataclass
class ServerState:
    """`request.app.state.server` of every request, and the argument of each module's routes()."""

    configuration: Configuration
    models: ModelRegistry
    metrics: Metrics
    limits: Limits
    started: float = field(default_factory=time.monotonic)
    draining: bool = False
    preloaded: Sequence[str] = ()  # the models that are to be there from the start
    loaded: bool = False  # loading them has ended
    active: int = 0  # requests under way

    @property
    def failure(self) -> str | None:
        """Why a model is not there that is to be there from the start, until it is."""
        return self.models.failure(self.preloaded)

    @property
    def ready(self) -> bool:
        return self.loaded and not self.draining and self.failure is None

    @asynccontextmanager
    async def acquire(self, model: str | None) -> AsyncIterator[LoadedModel]:
        """models.acquire() while requests are taken. Raises ApiError 503 once the daemon is stopping."""
        if self.draining:
            raise unavailable("the server is stopping", "stopping")
        async with self.models.acquire(model) as loaded:
            SUMMARY.get({})["model"] = loaded.id
            yield loaded


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The object in a request's body, bounded in size, depth and number of values. Raises ApiError 400."""
    raw = await request.body()
    if len(raw) > _LARGE_BODY_BYTES:
        return await on_thread(_object, raw, limits)
    return _object(raw, limits)


def _object(raw: bytes, limits: Limits) -> dict[str, Any]:
    try:
        value = parse_json(raw, "body", max_depth=limits.json_depth, max_values=limits.json_values)
    except CorruptError as error:
        raise ApiError(400, str(error), code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(
            400, f"body: holds a JSON {type(value).__name__}; an object is needed", code="invalid_json"
        )
    return value
