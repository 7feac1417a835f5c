"""HTTP connections with limits: their number, and the time that a request's head may take."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgert.server import errors
from edgert.server.errors import ApiError


def protocol(max_connections: int, header_timeout: float) -> type[H11Protocol]:
    """The protocol class for uvicorn."""

    class Bounded(H11Protocol):
        """Answers itself where no request arrives: 503 beyond the limit, 408 in place of a head that does not end, 400 for
        what is no HTTP."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self._refuse(errors.unavailable("too many connections", "connections"))
            else:
                self._expect_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self._serving():
                self._stop_waiting()
            elif self._deadline is None:
                self._expect_request()

        def send_400_response(self, msg: str) -> None:
            if self._serving():  # its body is no HTTP: the handler learns that the client has gone
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self._refuse(ApiError(400, "the request is no valid HTTP", code="invalid_http"))

        def _serving(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _expect_request(self) -> None:
            self._deadline = self.loop.call_later(header_timeout, self._too_slow)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _too_slow(self) -> None:
            if not self.transport.is_closing() and not self._serving():
                self._refuse(ApiError(408, "the request's head took too long", code="timeout"))

        def _refuse(self, error: ApiError) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(whole_reply(error))
            self.transport.close()

    return Bounded


def whole_reply(error: ApiError) -> bytes:
    reply: Any = errors.response(error)
    head = [f"HTTP/1.1 {error.status} {h11_reason(error.status)}".encode(), b"connection: close"]
    head += [name + b": " + value for name, value in reply.raw_headers]
    return b"\r\n".join(head) + b"\r\n\r\n" + bytes(reply.body)


def h11_reason(status: int) -> str:
    from http import HTTPStatus

    return HTTPStatus(status).phrase
