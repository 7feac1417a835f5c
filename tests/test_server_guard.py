"""The guard by itself: what is held of many bodies at a time, and names of hosts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from edgert.server import guard
from edgert.server.configuration import Configuration
from edgert.server.guard import Guard, host_name
from edgert.server.log import RequestLog
from edgert.server.metrics import Metrics
from edgert.server.models import ModelRegistry, Opener
from edgert.server.state import Limits, ServerState


def guarded(**settings: Any) -> tuple[Guard, ServerState]:
    """A guard before an application that answers how long the body is."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % len(body)})

    def nothing(*_: Any) -> Any:
        raise AssertionError

    configuration = Configuration(**settings)
    registry = ModelRegistry((), Opener(nothing, nothing), budget_bytes=1)
    state = ServerState(configuration, registry, Metrics(), Limits())
    return Guard(app, state, RequestLog()), state


async def ask(
    one: Guard, parts: list[bytes | asyncio.Event], path: str = "/v1/completions"
) -> tuple[int, bytes]:
    """The status and body of the reply to a POST in these parts; an event is waited for."""
    sent: list[Any] = []
    left = list(parts)

    async def receive() -> Any:
        part = left.pop(0)
        if isinstance(part, asyncio.Event):
            await part.wait()
            part = b""
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "scheme": "http",
        "headers": [(b"host", b"localhost")],
    }
    await one(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_what_many_send_at_a_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is small enough; together they would fill the memory."""
    monkeypatch.setattr(guard, "_MAX_HELD_BYTES", 1000)

    async def work() -> None:
        one, state = guarded(max_body=600)
        more = asyncio.Event()
        slow = [asyncio.create_task(ask(one, [b"x" * 450, more])) for _ in range(2)]
        await asyncio.sleep(0)
        status, body = await ask(one, [b"x" * 450])
        assert (status, json.loads(body)["error"]["code"]) == (503, "bodies")
        assert await ask(one, [b"x" * 50]) == (200, b"50")
        more.set()
        assert await asyncio.gather(*slow) == [(200, b"450")] * 2
        assert await ask(one, [b"x" * 450]) == (200, b"450")  # what was held has been let go
        assert state.active == 0

    asyncio.run(work())


def test_an_error_of_ours_is_500_without_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        one, _ = guarded()

        async def app(*_: Any) -> None:
            raise RuntimeError("the secret of the request")

        one._app = app
        status, body = await ask(one, [b""])
        assert status == 500 and b"secret" not in body

    asyncio.run(work())
    assert "RuntimeError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", "localhost"),
        ("a.b:80", "a.b"),
        ("[::1]:8343", "::1"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("[::1", ""),
        ("a:b", ""),
        ("a:999999", ""),
        ("user@host", ""),
        ("a/b", ""),
        ("", ""),
    ],
)
def test_the_name_in_a_host_header(host: str, name: str) -> None:
    assert host_name(host) == name
