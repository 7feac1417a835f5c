"""What every request passes before a route sees it: where it comes from, its key, its size, its time.

A page in a browser on this machine must not reach the server by a name that its author points here (Host), nor send a
request across origins (Origin). Bodies are read whole before routes run, so that no route waits for a slow sender.
"""

import asyncio
import hmac
import ipaddress
import itertools
import re
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgert.server import errors
from edgert.server.configuration import Configuration
from edgert.server.errors import ApiError
from edgert.server.log import RequestLog
from edgert.server.state import SUMMARY, ServerState

# Needs no key: what a balancer asks, and a page without data.
OPEN = frozenset({"/", "/health", "/ready"})
# Answered to the end, whatever else: what tells how the server is.
ALWAYS = frozenset({"/", "/health", "/ready", "/metrics", "/stats"})
_MAX_HEADERS = 100
_MAX_HEAD_BYTES = 32 << 10
_MAX_HELD_BYTES = 32 << 20  # of bodies at a time
_CORS = {
    b"access-control-allow-methods": b"GET, POST, OPTIONS",
    b"access-control-allow-headers": b"authorization, content-type, x-api-key, x-request-id",
    b"access-control-max-age": b"600",
}

_HOST = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9._-]{1,253}))(?::\d{1,5})?")

Headers = Mapping[bytes, list[bytes]]


class Guard:
    """The outermost ASGI application: checks, then `app`; every failure becomes a reply, every request a line in the log."""

    def __init__(self, app: ASGIApp, state: ServerState, log: RequestLog) -> None:
        self._app = app
        self._state = state
        self._log = log
        self._rules = Rules(state.configuration)
        self._held_bytes = 0
        self._numbers = itertools.count()
        self._session = secrets.token_hex(4)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = scope.setdefault("state", {})
        request["id"] = f"{self._session}-{next(self._numbers):x}"
        request["summary"] = {}
        SUMMARY.set(request["summary"])
        request["arrived"] = time.monotonic()
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        reply = _Reply(send, request["id"], self._state.configuration.send_timeout)
        counted = scope["path"] not in ALWAYS
        self._state.active += counted
        body: list[bytes] = []
        try:
            reply.added = self._rules.check(scope, headers)
            if counted and self._state.draining:
                raise errors.unavailable("the server is stopping", "stopping")
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await reply.preflight()
                return
            await self._read(receive, headers, body)
            await self._app(scope, _Replayed(b"".join(body), receive), reply)
        except _GoneError:
            pass
        except Exception as error:  # noqa: BLE001 - one request's failure is its own
            await self._fail(error, reply, request["id"])
        finally:
            self._held_bytes -= sum(map(len, body))
            self._state.active -= counted
            self._note(scope, reply)

    async def _read(self, receive: Receive, headers: Headers, body: list[bytes]) -> None:
        """The whole body, in parts. Raises ApiError 400, 408, 413 or 503, and _GoneError where the client leaves."""
        limit = self._state.configuration.max_body
        stated = headers.get(b"content-length", [b"0"])[0]
        if not stated.isdigit() or len(stated) > 18:
            raise ApiError(400, "content-length: found no number", code="invalid_http")
        if int(stated) > limit:
            raise _too_large(limit)
        size = 0
        try:
            async with asyncio.timeout(self._state.configuration.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    body.append(message.get("body", b""))
                    size += len(body[-1])
                    self._held_bytes += len(body[-1])
                    if size > limit:
                        raise _too_large(limit)
                    if self._held_bytes > max(_MAX_HELD_BYTES, limit):
                        raise errors.unavailable("too much is being sent at a time", "bodies")
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            raise ApiError(
                408, "the request's body took too long", code="timeout", headers={"Connection": "close"}
            ) from None

    async def _fail(self, error: Exception, reply: "_Reply", request_id: str) -> None:
        known = errors.of(error)
        if known.status == 500:
            self._log.failure(request_id, error)
        if reply.status is None and not reply.gone:
            await reply.whole(errors.response(known))

    def _note(self, scope: Scope, reply: "_Reply") -> None:
        request = scope["state"]
        seconds = time.monotonic() - request["arrived"]
        route = scope.get("route")
        path = getattr(route, "path", None) or "other"
        status = reply.status or 499
        self._state.metrics.requests.add(1, path, str(status))
        if scope["path"] not in ALWAYS:
            self._state.metrics.request_seconds.observe(seconds)
            self._log.request(request["id"], scope, status, seconds, request["summary"])


class Rules:
    """Who may ask."""

    def __init__(self, configuration: Configuration) -> None:
        self._keys = configuration.keys
        self._origins = frozenset(origin.lower() for origin in configuration.cors_origins)
        name = socket.gethostname().lower()
        self._names = {"localhost", name, f"{name}.local", configuration.host.lower()}
        self._names.update(host.lower() for host in configuration.allowed_hosts)

    def check(self, scope: Scope, headers: Headers) -> dict[bytes, bytes]:
        """The headers that a reply gets besides its own. Raises ApiError 400, 401 or 403."""
        if sum(map(len, headers.values())) > _MAX_HEADERS:
            raise ApiError(400, f"found more than {_MAX_HEADERS} headers", code="headers")
        size = len(scope["path"]) + len(scope.get("query_string", b""))
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > _MAX_HEAD_BYTES:
            raise ApiError(
                431, f"found {size} bytes of headers, allowed are {_MAX_HEAD_BYTES}", code="headers"
            )
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise ApiError(
                400, "found two lengths of the body", code="invalid_http", headers={"Connection": "close"}
            )
        if (encodings := headers.get(b"content-encoding", [b"identity"])) != [b"identity"]:
            raise ApiError(
                415,
                f"content-encoding: found {encodings[0].decode('latin-1')!r:.40}; send the body as it is",
                code="content_encoding",
            )
        host = self._host(scope, headers)
        added = self._origin(scope, headers, host)
        preflight = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        if self._keys and scope["path"] not in OPEN and not preflight:
            self._key(headers)
        return added

    def _host(self, scope: Scope, headers: Headers) -> str:
        found = headers.get(b"host", [])
        if not found and scope.get("http_version") == "1.0":  # which no browser speaks
            return ""
        if len(found) != 1:
            raise ApiError(400, f"host: found {len(found)} of this header, one is needed", code="host")
        text = found[0].decode("latin-1").lower()
        name = host_name(text)
        if name not in self._names and not name.endswith(".localhost") and not _is_address(name):
            raise ApiError(
                403,
                f"host: {name[:80]!r} is no name of this server; `edgert serve --allowed-hosts` adds one",
                code="host",
            )
        return text

    def _origin(self, scope: Scope, headers: Headers, host: str) -> dict[bytes, bytes]:
        found = headers.get(b"origin", [])
        if not found:
            return {}
        origin = found[0].decode("latin-1").lower()
        if len(found) == 1 and origin == f"{scope['scheme']}://{host}":
            return {}
        if len(found) == 1 and ("*" in self._origins or origin in self._origins):
            return {b"access-control-allow-origin": found[0], b"vary": b"origin"}
        raise ApiError(
            403,
            f"origin: pages of {origin[:80]!r} may not use this server; `edgert serve --cors-origins` allows them",
            code="origin",
        )

    def _key(self, headers: Headers) -> None:
        given = [value.partition(b" ") for value in headers.get(b"authorization", [])[:1]]
        key = next((rest.strip() for scheme, _, rest in given if scheme.lower() == b"bearer"), b"")
        key = key or headers.get(b"x-api-key", [b""])[0]
        right = False
        for known in self._keys:  # all of them, so that the time tells nothing
            right |= hmac.compare_digest(known, key)
        if not right:
            raise ApiError(
                401,
                "a key is needed: Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def host_name(host: str) -> str:
    """A Host header without its port, and an IPv6 address without its brackets; empty for what is none."""
    match = _HOST.fullmatch(host)
    return "" if match is None else match[1] or match[2]


def _is_address(name: str) -> bool:
    """A name can be pointed at this machine by anybody, an address cannot."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit} bytes", code="too_large", headers={"Connection": "close"}
    )


class _GoneError(Exception):
    """The client left."""


class _Replayed:
    """receive() of a request whose body has been read."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Reply:
    """send() that adds headers, remembers the status and gives up on a client that does not read."""

    def __init__(self, send: Send, request_id: str, timeout_s: float) -> None:
        self._send = send
        self._id = request_id.encode()
        self._timeout_s = timeout_s
        self.added: dict[bytes, bytes] = {}
        self.status: int | None = None
        self.gone = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            more = {b"x-request-id": self._id, b"x-content-type-options": b"nosniff", **self.added}
            message = {**message, "headers": [*message.get("headers", ()), *more.items()]}
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:
            self.gone = True
            raise _GoneError from None

    async def preflight(self) -> None:
        self.added.update(_CORS if b"access-control-allow-origin" in self.added else {})
        await self({"type": "http.response.start", "status": 204, "headers": []})
        await self({"type": "http.response.body", "body": b""})

    async def whole(self, response: Any) -> None:
        await self(
            {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        )
        await self({"type": "http.response.body", "body": response.body})
