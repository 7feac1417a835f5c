"""Health, statistics, metrics, adapters and the dashboard."""

import base64
import hashlib
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgert.converters.strict_json import parse_json
from edgert.errors import CorruptError
from edgert.server import telemetry
from edgert.server.errors import ApiError
from edgert.server.openai_requests import MAX_SCALE
from edgert.server.state import ServerState
from edgert.server.threads import on_thread

_DASHBOARD = Path(__file__).with_name("dashboard.html")


def routes(state: ServerState) -> list[Route]:
    pages = Pages(state)
    return [
        Route("/", pages.dashboard),
        Route("/health", pages.health),
        Route("/ready", pages.ready),
        Route("/metrics", pages.metrics),
        Route("/stats", pages.stats),
        Route("/lora-adapters", pages.adapters, methods=["GET"]),
        Route("/lora-adapters", pages.set_adapters, methods=["POST"]),
    ]


class Pages:
    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def health(self, request: Request) -> Response:
        """The process answers; whether it takes requests, /ready tells."""
        return _json({"status": "stopping" if self._state.draining else "ok"})

    async def ready(self, request: Request) -> Response:
        state = self._state
        if state.ready:
            return _json({"status": "ready"})
        if state.draining:
            return _json({"status": "stopping"}, 503)
        if state.failure is not None:
            return _json({"status": "failed", "message": state.failure}, 503)
        return _json({"status": "loading"}, 503)

    async def metrics(self, request: Request) -> Response:
        return Response(
            telemetry.text(self._state),
            media_type="text/plain; version=0.0.4",
            headers={"Cache-Control": "no-store"},
        )

    async def stats(self, request: Request) -> Response:
        return _json(telemetry.stats(self._state))

    async def dashboard(self, request: Request) -> Response:
        content, policy = _dashboard()
        headers = {
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return Response(content, media_type="text/html", headers=headers)

    async def adapters(self, request: Request) -> Response:
        """[{"id", "name", "path", "scale"}, …] of ?model=NAME, by default the first."""
        async with self._state.acquire(request.query_params.get("model")) as loaded:
            return _json(_listed(loaded.model.adapters() if loaded.adapters else []))

    async def set_adapters(self, request: Request) -> Response:
        """[{"id", "scale"}, …]: with which scales adapters are on for requests to come; those that are not named are
        off."""
        raw = await request.body()
        try:
            wanted = parse_json(raw, "body", max_depth=8, max_values=10_000)
        except CorruptError as error:
            raise ApiError(400, str(error), code="invalid_json") from None
        async with self._state.acquire(request.query_params.get("model")) as loaded:
            there = loaded.model.adapters() if loaded.adapters else []
            scales = _scales(wanted, [info.name for info in there])
            if there:
                await on_thread(loaded.model.set_adapter, scales)  # reads, and waits for a step
            return _json(_listed(loaded.model.adapters() if there else []))


def _scales(wanted: object, names: list[str]) -> dict[str, float]:
    if not isinstance(wanted, list):
        raise ApiError(400, "body: allowed is a list of objects with id and scale", code="invalid_value")
    scales: dict[str, float] = {}
    for index, row in enumerate(wanted):
        where = f"[{index}]"
        if not isinstance(row, dict) or not row.keys() <= {"id", "scale", "name", "path"}:
            raise ApiError(
                400, f"body{where}: allowed is an object of id and scale", param=where, code="invalid_value"
            )
        number, scale = row.get("id"), row.get("scale")
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(names):
            raise ApiError(
                400,
                f"body{where}.id: found {number!r:.40}; there are {len(names)} adapters, from 0",
                param=f"{where}.id",
                code="invalid_value",
            )
        if (
            isinstance(scale, bool)
            or not isinstance(scale, int | float)
            or not (math.isfinite(scale) and abs(scale) <= MAX_SCALE)
        ):
            raise ApiError(
                400,
                f"body{where}.scale: found {scale!r:.40}, allowed is a number from {-MAX_SCALE:g} to {MAX_SCALE:g}",
                param=f"{where}.scale",
                code="invalid_value",
            )
        if names[number] in scales:
            raise ApiError(
                400,
                f"body{where}.id: adapter {number} comes twice",
                param=f"{where}.id",
                code="invalid_value",
            )
        scales[names[number]] = float(scale)
    return {name: scale for name, scale in scales.items() if scale}


def _listed(adapters: Any) -> list[dict[str, Any]]:
    return [
        {"id": number, "name": info.name, "path": info.path.name, "kind": info.kind, "scale": info.scale}
        for number, info in enumerate(adapters)
    ]


@cache
def _dashboard() -> tuple[bytes, str]:
    """The page, and the policy that allows it its own script and style and nothing else."""
    content = _DASHBOARD.read_bytes()

    def sources(tag: bytes) -> str:
        parts = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), content, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(part).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{one}'" for one in hashes)

    return content, (
        f"default-src 'none'; script-src {sources(b'script')}; style-src {sources(b'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _json(value: object, status: int = 200) -> Response:
    return Response(
        json.dumps(value), status, media_type="application/json", headers={"Cache-Control": "no-store"}
    )
