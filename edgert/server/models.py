"""Several models under one budget.

A model with stated memory gets this; an only one gets the whole budget; any other asks for what keeps its weights
resident, at most the whole budget. Before one is loaded, idle ones are unloaded, the least recently used first, until
that is free. When all others are at work it gets what is left if it can run in that, and otherwise waits.
A pinned model is never unloaded, and none is while a request uses it. Used from one event loop; models are loaded and
closed on a thread.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgert.errors import (
    BudgetError,
    EdgertError,
    InvalidArgumentError,
    NotFoundError,
    StorageError,
    UnsupportedError,
)
from edgert.server.configuration import ServedModel
from edgert.server.threads import on_thread
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.controlling import Control
    from edgert.engine import Engine
    from edgert.model import Model

_WAIT_FOR_ROOM_S = 30.0
_RETRY_FAILED_S = 5.0
_RESCAN_S = 1.0


class UnknownModelError(NotFoundError):
    """A request names a model, or an adapter of one, that is not served."""


@dataclass(frozen=True)
class ModelCard:
    """What /v1/models tells. `id` is NAME or NAME:ADAPTER."""

    id: str
    created: int
    state: str  # unloaded | loading | ready | failed
    parent: str | None = None  # of an adapter: its model


@dataclass(frozen=True)
class LoadedModel:
    """A model while a request uses it: it is not unloaded meanwhile. `engine` is None where the model only embeds."""

    id: str  # as asked for
    name: str
    model: "Model"
    engine: "Engine | None"
    adapter: str | None  # of NAME:ADAPTER; None: those that are on
    adapters: tuple[str, ...]  # those that are loaded


@dataclass(frozen=True)
class Opened:
    """A model in memory."""

    model: "Model"
    engine: "Engine | None"
    budget_bytes: int
    adapters: tuple[str, ...] = ()
    control: "Control | None" = None  # of its knobs while it runs

    def progress(self) -> tuple[float, ...] | None:
        """What changes whenever the engine gets on: its steps, and of a long one the experts that it looked up and read.
        None while it has nothing to do, and for another engine than edgert's own."""
        if self.engine is None or self.model.backend != "edgert":
            return None
        told = self.engine.stats()
        if not told["requests_running"]:
            return None
        counts = self.model.native.statistics()
        looked_up = counts["expert_hits"] + counts["expert_prefetch_hits"] + counts["expert_misses"]
        return told["steps"], told["prompt_tokens"], looked_up, counts["bytes_read"]

    def close(self) -> None:
        if self.control is not None:
            self.control.stop()
        if self.engine is not None:
            self.engine.close()
        self.model.close()


@dataclass
class Entry:
    """A model that is served. `users` are the requests that have it or wait for it."""

    served: ServedModel
    created: int
    opened: Opened | None = None
    loading: "asyncio.Task[Opened] | None" = None
    error: Exception | None = None
    failed_at: float = 0.0
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)

    @property
    def state(self) -> str:
        if self.opened is not None:
            return "ready"
        if self.loading is not None:
            return "loading"
        return "unloaded" if self.error is None else "failed"


@dataclass(frozen=True)
class Opener:
    """How models are opened. Called on threads. needs() gives the smallest budget that works and the one that keeps
    every weight resident."""

    needs: Callable[[ServedModel], tuple[int, int]]
    open: Callable[[ServedModel, int], Opened]


class ModelRegistry:
    """By name; a request never names a path. `found` tells the models to serve where none is named: it is asked
    again when a request names an unknown one."""

    def __init__(
        self,
        served: Sequence[ServedModel],
        opener: Opener,
        *,
        budget_bytes: int,
        keep_alive_s: float = 0.0,
        found: Callable[[], Sequence[ServedModel]] | None = None,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._opener = opener
        self._keep_alive_s = keep_alive_s
        self._found = found
        self._scanned = 0.0
        self._entries: dict[str, Entry] = {}
        self._add(served)
        self._turn = asyncio.Lock()  # of loading and unloading
        self._idle = asyncio.Event()  # set when a request lets go of a model
        self._closed = False

    # --- for requests -------------------------------------------------------------------------------

    @asynccontextmanager
    async def acquire(self, name: str | None) -> AsyncIterator[LoadedModel]:
        """The model of an id, NAME or NAME:ADAPTER (None: the first), loaded if it is not. Raises NotFoundError naming
        the known ones, BudgetError, and what loading raises."""
        entry, adapter = self._find(name)
        entry.users += 1
        try:
            opened = entry.opened or await self._load(entry)
            loaded = _loaded(entry, opened, name or entry.served.name, adapter)
            if adapter is not None and adapter not in loaded.adapters:
                there = ", ".join(loaded.adapters) or "none"
                raise UnknownModelError(
                    f"model {name!r:.120}: {entry.served.name} has no adapter of this name; there are {there}"
                )
            yield loaded
        finally:
            entry.users -= 1
            entry.used_at = time.monotonic()
            self._idle.set()

    def cards(self) -> list[ModelCard]:
        """Every id that a request may name."""
        self._rescan()
        cards = []
        for name, entry in self._entries.items():
            cards.append(ModelCard(name, entry.created, entry.state))
            cards += [
                ModelCard(f"{name}:{adapter}", entry.created, entry.state, name)
                for adapter in _adapters(entry)
            ]
        return cards

    # --- for the daemon -----------------------------------------------------------------------------

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def failure(self, names: Sequence[str]) -> str | None:
        """Why one of these, which are to be there from the start, is not."""
        failed = (self._entries[name] for name in names if name in self._entries)
        return next((str(one.error) for one in failed if one.error is not None), None)

    def opened(self) -> Iterator[tuple[str, Opened]]:
        """The models in memory, at this moment."""
        for name, entry in list(self._entries.items()):
            if entry.opened is not None:
                yield name, entry.opened

    def to_preload(self) -> list[str]:
        """What is loaded at the start: the first, unless the models are those that happen to be installed, and the pinned
        ones."""
        names = [name for name, entry in self._entries.items() if entry.served.pinned]
        if self._entries and (self._found is None or len(self._entries) == 1):
            names.insert(0, next(iter(self._entries)))
        return list(dict.fromkeys(names))

    async def load(self, name: str) -> None:
        """Load without using."""
        async with self.acquire(name):
            pass

    async def unload_idle(self) -> None:
        """Unload what nobody has used for the keep-alive time."""
        if self._keep_alive_s <= 0:
            return
        async with self._turn:
            while (entry := self._least_recent()) and time.monotonic() - entry.used_at >= self._keep_alive_s:
                await self._unload(entry)

    async def cancel_all(self) -> None:
        """End every generation, within a token."""
        await asyncio.gather(
            *(on_thread(opened.engine.close) for _, opened in self.opened() if opened.engine is not None)
        )

    async def close(self) -> None:
        """Unload everything, whoever uses it."""
        self._closed = True
        async with self._turn:
            for entry in self._entries.values():
                await self._unload(entry)

    @property
    def is_loading(self) -> bool:
        return any(entry.loading is not None for entry in self._entries.values())

    # --- finding ------------------------------------------------------------------------------------

    def _find(self, name: str | None) -> tuple[Entry, str | None]:
        if name is None and self._entries:
            return next(iter(self._entries.values())), None
        for again in (False, True):
            if again:
                self._rescan()
            known, _, adapter = (name or "").partition(":")
            if name in self._entries:
                return self._entries[name], None
            if known in self._entries and adapter:
                return self._entries[known], adapter
        there = ", ".join(list(self._entries)[:20]) or "none"
        raise UnknownModelError(f"model {name!r:.120}: is not served here; there are {there}")

    def _rescan(self) -> None:
        if self._found is not None and time.monotonic() - self._scanned > _RESCAN_S:
            self._scanned = time.monotonic()
            with contextlib.suppress(OSError):
                self._add([one for one in self._found() if one.name not in self._entries])

    def _add(self, served: Sequence[ServedModel]) -> None:
        now = int(time.time())
        self._entries.update({one.name: Entry(one, now) for one in served})

    # --- loading ------------------------------------------------------------------------------------

    async def _load(self, entry: Entry) -> Opened:
        if entry.loading is None:
            if entry.error is not None and time.monotonic() - entry.failed_at < _RETRY_FAILED_S:
                raise entry.error
            entry.loading = asyncio.create_task(self._open(entry))
            entry.loading.add_done_callback(_retrieve)
        return await asyncio.shield(entry.loading)  # a client that leaves ends nobody's loading

    async def _open(self, entry: Entry) -> Opened:
        try:
            async with self._turn:
                budget = await self._make_room(entry)
                opened = await on_thread(self._opener.open, entry.served, budget)
                if self._closed:
                    await on_thread(opened.close)
                    raise EdgertError("the server is stopping")
                entry.opened, entry.error = opened, None
                return opened
        except Exception as error:
            entry.error, entry.failed_at = _told(error), time.monotonic()
            raise entry.error from error
        finally:
            entry.loading = None
            entry.used_at = time.monotonic()

    async def _make_room(self, entry: Entry) -> int:
        """The budget for `entry`, after unloading what is in its way. Raises BudgetError."""
        if len(self._entries) == 1 and entry.served.memory_bytes is None:
            return self.budget_bytes
        minimum, resident = await on_thread(self._opener.needs, entry.served)
        wanted = min(entry.served.memory_bytes or resident, self.budget_bytes)
        minimum = entry.served.memory_bytes or minimum
        until = time.monotonic() + _WAIT_FOR_ROOM_S
        while True:
            self._idle.clear()
            free = self.budget_bytes - sum(opened.budget_bytes for _, opened in self.opened())
            if free >= wanted:
                return wanted
            if (idle := self._least_recent()) is not None:
                await self._unload(idle)
            elif free >= minimum:
                return free
            elif minimum > self.budget_bytes or not await self._someone_leaves(until):
                raise BudgetError(self._no_room(entry, free, minimum))

    async def _someone_leaves(self, until: float) -> bool:
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _no_room(self, entry: Entry, free: int, minimum: int) -> str:
        others = ", ".join(name for name, _ in self.opened()) or "none"
        return (
            f"{entry.served.name}: needs at least {format_bytes(minimum)}, {format_bytes(max(0, free))} of the budget's "
            f"{format_bytes(self.budget_bytes)} are free, and the other loaded models are at work or pinned: {others}"
        )

    def _least_recent(self) -> Entry | None:
        idle = [e for e in self._entries.values() if e.opened and not e.users and not e.served.pinned]
        return min(idle, key=lambda entry: entry.used_at, default=None)

    async def _unload(self, entry: Entry) -> None:
        opened, entry.opened = entry.opened, None
        if opened is not None:
            await on_thread(opened.close)


def _loaded(entry: Entry, opened: Opened, asked: str, adapter: str | None) -> LoadedModel:
    return LoadedModel(asked, entry.served.name, opened.model, opened.engine, adapter, _adapters(entry))


def _adapters(entry: Entry) -> tuple[str, ...]:
    if entry.opened is None:
        return tuple(adapter.name for adapter in entry.served.adapters)
    if not entry.opened.adapters:
        return ()
    return tuple(info.name for info in entry.opened.model.adapters())


def _told(error: Exception) -> Exception:
    """As a request for the model is told: what is wrong is the server's, whatever the request says."""
    if isinstance(error, NotFoundError | InvalidArgumentError | UnsupportedError):
        return StorageError(str(error))
    return error


def _retrieve(task: "asyncio.Task[Opened]") -> None:
    """So that a failure that nobody waits for any more is not reported as lost."""
    if not task.cancelled():
        task.exception()
