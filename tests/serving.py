"""The daemon's application on a thread of the tests', which see its models and its state."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from onnx_models import text_encoder

from edgert.converters.source import convert_source
from edgert.engine import Engine
from edgert.loading import load
from edgert.server.app import create_app
from edgert.server.configuration import Configuration, ServedAdapter, ServedModel
from edgert.server.log import RequestLog
from edgert.server.metrics import Metrics
from edgert.server.models import ModelRegistry, Opened, Opener
from edgert.server.state import Limits, ServerState

MEMORY = 256 << 20


class _Silent(RequestLog):
    def _write(self, row: Mapping[str, Any]) -> None:
        pass


class Daemon:
    """A server on a thread of its own. `url` is where it listens; `models` are those that requests have opened."""

    def __init__(
        self,
        sources: Mapping[str, Path],
        queue: int = 64,
        adapters: Mapping[str, Path] | None = None,
        **knobs: Any,
    ) -> None:
        self.models: dict[str, Opened] = {}
        self._knobs = knobs
        self._queue = queue
        added = tuple(ServedAdapter(name, path, 0.0) for name, path in (adapters or {}).items())
        served = [ServedModel(name, str(path), adapters=added) for name, path in sources.items()]
        opener = Opener(lambda _: (1 << 20, MEMORY), self._open)
        registry = ModelRegistry(served, opener, budget_bytes=MEMORY * max(1, len(served)))
        self.state = ServerState(Configuration(), registry, Metrics(), Limits(), loaded=True)
        self._server = uvicorn.Server(
            uvicorn.Config(create_app(self.state, _Silent()), port=0, lifespan="off", log_config=None)
        )
        self._thread = threading.Thread(target=self._server.run)

    def _open(self, served: ServedModel, _: int) -> Opened:
        model = load(served.source, memory=MEMORY, threads=1, **self._knobs)
        for adapter in served.adapters:
            model.load_adapter(adapter.path, adapter.name)
        engine = None if model.backend == "onnx" else Engine(model, queue=self._queue)
        self.models[served.name] = Opened(
            model, engine, MEMORY, tuple(adapter.name for adapter in served.adapters)
        )
        return self.models[served.name]

    def __enter__(self) -> Daemon:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        (socket,) = self._server.servers[0].sockets
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join()
        for opened in self.models.values():
            opened.close()

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def events(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """The data of each event of a stream, and of the last one that there is no more."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            for block in _blocks(response):
                lines = dict(line.split(": ", 1) for line in block if not line.startswith(":"))
                yield {} if lines["data"] == "[DONE]" else json.loads(lines["data"])


def _blocks(response: httpx.Response) -> Iterator[list[str]]:
    lines: list[str] = []
    for line in response.iter_lines():
        if line:
            lines.append(line)
        elif lines:
            yield lines
            lines = []
    assert not lines


@contextlib.contextmanager
def served(sources: Mapping[str, Path], **knobs: Any) -> Iterator[Daemon]:
    with Daemon(sources, **knobs) as daemon:
        yield daemon


def words(directory: Path) -> Path:
    """A bundle that embeds texts of the words w0, w1, …"""
    return convert_source(text_encoder(directory / "source"), directory / "words.edgert").path
