"""The life of the daemon: sockets, loading, readiness, signals, drain."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from edgert.allocator import return_free_memory, share_one_heap
from edgert.errors import BudgetError, EdgertError, StorageError
from edgert.server import notify
from edgert.server.app import create_app
from edgert.server.configuration import Configuration
from edgert.server.connections import protocol
from edgert.server.log import Handler, RequestLog
from edgert.server.metrics import Metrics
from edgert.server.models import ModelRegistry
from edgert.server.opening import Loading, every_installed
from edgert.server.state import Limits, ServerState
from edgert.server.watchdog import Watchdog

if TYPE_CHECKING:
    from edgert.controlling import Bounds

_MAX_HEAD_BYTES = 32 << 10
_SWEEP_S = 1.0
_BACKLOG = 512


def run(
    configuration: Configuration,
    knobs: dict[str, Any],
    bounds: "Bounds | None" = None,
    control_log: Path | None = None,
    control_log_bytes: int = 0,
) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. With `bounds` models are controlled while they are loaded.

    Raises StorageError where the address cannot be had, and what loading the only model raises."""
    share_one_heap()
    sockets = notify.activation_sockets() or [listen(configuration.host, configuration.port)]
    loading = Loading(knobs, configuration.queue, bounds, control_log, control_log_bytes)
    return asyncio.run(Daemon(configuration, loading).serve(sockets))


def listen(host: str, port: int) -> socket.socket:
    """Raises StorageError saying why the address cannot be had."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        one = socket.socket(family, kind, number)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(address)
            one.listen(_BACKLOG)
        except OSError:
            one.close()
            raise
    except (OSError, UnicodeError) as error:
        raise StorageError(
            f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error} (see --host and --port)"
        ) from None
    one.setblocking(False)
    return one


class _Server(uvicorn.Server):
    """Signals are the daemon's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Daemon:
    def __init__(self, configuration: Configuration, loading: Loading) -> None:
        self._configuration = configuration
        self._log = RequestLog(configuration.log_format)
        logging.getLogger().handlers = [Handler(self._log)]
        found = None if configuration.models else every_installed
        self.state = ServerState(
            configuration,
            ModelRegistry(
                configuration.models or every_installed(),
                loading.opener(),
                budget_bytes=loading.budget_bytes(),
                keep_alive_s=configuration.keep_alive,
                found=found,
            ),
            Metrics(),
            Limits(body_bytes=configuration.max_body),
        )
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def serve(self, sockets: Sequence[socket.socket]) -> int:
        server = _Server(
            uvicorn.Config(
                create_app(self.state, self._log),
                http=protocol(self._configuration.max_connections, self._configuration.header_timeout),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
                timeout_graceful_shutdown=2,
            )
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        serving = asyncio.create_task(server.serve(list(sockets)))
        others = [asyncio.create_task(work) for work in (self._load(sockets), self._sweep(), self._watch())]
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait((serving, stopping, others[0]), return_when=asyncio.FIRST_COMPLETED)
        if others[0].done() and not self._stop.is_set() and others[0].result() is not None:
            self._stop.set()
        await self._drain()
        server.should_exit = True
        await serving
        for task in (*others[1:], stopping):
            task.cancel()
        failure = others[0].result() if others[0].done() else None
        await self._free()
        if failure is not None:
            raise failure
        self._log.event("stopped", "all requests have ended")
        return 0

    def stop(self) -> None:
        """Once: end in order. Twice: at once."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def _load(self, sockets: Sequence[socket.socket]) -> Exception | None:
        """Load what is to be there from the start; returns the error that ends the daemon: of an only model."""
        for one in sockets:
            self._log.event("listening", address_of(one))
        self.state.preloaded = self.state.models.to_preload()
        for name in self.state.preloaded:
            begun = time.monotonic()
            try:
                await self.state.models.load(name)
            except (EdgertError, OSError, MemoryError) as error:
                if len(self.state.models.entries) == 1:
                    return error
                self._log.event("model", f"{name} cannot be loaded: {error}")
            else:
                self._log.event("model", f"{name} is loaded", seconds=round(time.monotonic() - begun, 3))
        gc.collect()
        gc.freeze()  # what is there now stays; collections look at the rest
        return_free_memory()
        self.state.loaded = True
        if self.state.failure is None:
            self._log.event("ready", f"after {time.monotonic() - self.state.started:.2f} s")
        notify.notify("READY=1\nSTATUS=" + (self.state.failure or "ready").replace("\n", " "))
        await self._stop.wait()
        return None

    async def _drain(self) -> None:
        state = self.state
        state.draining = True
        notify.notify("STOPPING=1")
        self._log.event("stopping", f"{state.active} requests are under way")
        until = time.monotonic() + self._configuration.drain_timeout
        while state.active and time.monotonic() < until and not self._hurry.is_set():
            await asyncio.sleep(0.02)
        if state.active:
            self._log.event("stopping", f"{state.active} requests are cancelled")
            await state.models.cancel_all()
            until = time.monotonic() + 2
            while state.active and time.monotonic() < until:
                await asyncio.sleep(0.02)

    async def _free(self) -> None:
        """Close the models. What is being loaded is left to the end of the process, which waits for nothing."""
        if self.state.models.is_loading:
            sys.stderr.flush()
            os._exit(0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self.state.models.close()

    async def _sweep(self) -> None:
        served = 0.0
        while True:
            await asyncio.sleep(_SWEEP_S)
            with contextlib.suppress(BudgetError):
                await self.state.models.unload_idle()
            if not self.state.active and served != (served := self.state.metrics.finished.total()):
                return_free_memory()

    async def _watch(self) -> None:
        """Tell the manager that all is well, until an engine stands still: then it ends this process and starts another."""
        interval = notify.watchdog_interval_s()
        watchdog = Watchdog()
        said: list[str] = []
        while interval is not None:
            stuck = watchdog.stuck(self.state.models.opened())
            if stuck and stuck != said:
                self._log.event("stuck", f"the engine of {', '.join(stuck)} gets nowhere with its requests")
            if not stuck:
                notify.notify("WATCHDOG=1")
            said = stuck
            await asyncio.sleep(interval)


def address_of(one: socket.socket) -> str:
    """As a browser takes it."""
    address = one.getsockname()
    if one.family == socket.AF_UNIX:
        return f"unix:{address}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{host}:{address[1]}/"
