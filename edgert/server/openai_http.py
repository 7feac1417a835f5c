"""A route as one coroutine from the request to the last byte of its reply, whole or streamed; it ends when the client leaves.

Errors before the reply begins are raised (the application turns them into a reply); later ones are the stream's last event.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from edgert.errors import InvalidArgumentError
from edgert.server import errors
from edgert.server.openai_fields import Object, refused
from edgert.server.state import ServerState, read_json
from edgert.server.threads import on_thread

_KEEP_ALIVE_S = 15.0  # a comment while a long prompt is run, for proxies that give up on silence
_LOG = logging.getLogger("edgert.server")


def dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class Reply:
    """Where a route writes to: json() once, or event() again and again and end()."""

    def __init__(self, send: Send) -> None:
        self._to = send
        self._broken = False
        self._lock = asyncio.Lock()
        self.streaming = False
        self.finished = False
        self._alive: asyncio.Task[None] | None = None

    @property
    def can_fail(self) -> bool:
        """Whether an error can still be told as an event."""
        return self.streaming and not self.finished and not self._broken

    async def _send(self, message: Message) -> None:
        try:
            await self._to(message)
        except BaseException:
            self._broken = True
            raise

    async def json(self, value: object, *, large: bool = False) -> None:
        """The whole reply; a large one is not written on the event loop."""
        data = (await on_thread(dumps, value) if large else dumps(value)).encode()
        self.finished = True
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data})

    async def begin_events(self) -> None:
        """Say that it is a stream, now that nothing is left that could refuse the request."""
        self.streaming = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self._alive = asyncio.create_task(self._keep_alive())

    async def event(self, data: str) -> None:
        """One or more events, each with its empty line."""
        async with self._lock:
            await self._send({"type": "http.response.body", "body": data.encode(), "more_body": True})

    async def end(self) -> None:
        self.quiet()
        self.finished = True
        async with self._lock:
            await self._send({"type": "http.response.body", "body": b""})

    def quiet(self) -> None:
        if self._alive is not None:
            self._alive.cancel()

    async def _keep_alive(self) -> None:
        while not self._broken:
            await asyncio.sleep(_KEEP_ALIVE_S)
            with contextlib.suppress(Exception):  # the next event meets it too
                await self.event(": still at work\n\n")


Handler = Callable[[ServerState, Request, dict[str, Any], Reply], Coroutine[Any, Any, None]]


class Route:
    """An ASGI application for one POST route: reads and checks the body, then lets `handler` write the reply."""

    def __init__(self, state: ServerState, fields: Object, handler: Handler) -> None:
        self._state = state
        self._fields = fields
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        given = await read_json(request, self._state.limits)
        if b"\\u0000" in await request.body():
            _refuse_nul(given, "")
        values = self._fields.check(given, "")
        reply = Reply(send)
        await _until_left(receive, self._answer(request, values, reply), reply)

    async def _answer(self, request: Request, values: dict[str, Any], reply: Reply) -> None:
        try:
            await self._handler(self._state, request, values, reply)
        except Exception as error:
            if not reply.can_fail:
                placed = self._placed(error)
                if placed is error:
                    raise
                raise placed from error
            if errors.of(error).status == 500:
                _LOG.exception("%s failed within its reply", request.url.path)
            await reply.event(f"data: {dumps(errors.body(error))}\n\n")
            await reply.end()
        finally:
            reply.quiet()

    def _placed(self, error: Exception) -> Exception:
        """With the field that the message opens with as its param."""
        field = str(error).partition(":")[0]
        if isinstance(error, InvalidArgumentError) and field in self._fields.fields:
            return refused(str(error), field)
        return error


def _refuse_nul(value: object, where: str) -> None:
    if isinstance(value, str) and "\0" in value:
        raise refused(f"{where}: character {value.index(chr(0))} is NUL", where)
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_nul(name, f"{where} (a key)")
            _refuse_nul(item, f"{where}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_nul(item, f"{where}[{index}]")


async def _until_left(receive: Receive, work: Coroutine[Any, Any, None], reply: Reply) -> None:
    """Run `work`; cancel it once the client has gone, which the server also says after the reply's last byte."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_leaving(receive))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        gone = left.done() and not reply.finished
        if gone:
            task.cancel()
        try:
            await task
        except (asyncio.CancelledError, OSError):  # OSError: writing to a client that has left
            if not gone or not task.done():
                raise
    finally:
        for one in (task, left):
            one.cancel()
        await asyncio.wait((task, left))


async def _leaving(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()
