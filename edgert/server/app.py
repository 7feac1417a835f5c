"""The application: routes behind the guard."""

from importlib import import_module
from importlib.util import find_spec

from starlette.datastructures import State
from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from edgert.server import pages
from edgert.server.errors import ApiError
from edgert.server.guard import Guard
from edgert.server.log import RequestLog
from edgert.server.state import ServerState


def create_app(state: ServerState, log: RequestLog | None = None) -> Guard:
    routes = pages.routes(state)
    if find_spec("edgert.server.openai_routes") is not None:
        routes += import_module("edgert.server.openai_routes").routes(state)
    return Guard(
        _App(Router(routes, redirect_slashes=False, default=_nothing_here), state), state, log or RequestLog()
    )


class _App:
    """What requests know as their app."""

    def __init__(self, router: Router, state: ServerState) -> None:
        self._router = router
        self.state = State()
        self.state.server = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self._router(scope, receive, send)


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(404, f"there is no route {scope['path'][:80]!r}", code="not_found")
