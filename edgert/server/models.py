"""Several models under one budget."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgert.engine import Engine
    from edgert.model import Model


@dataclass(frozen=True)
class ModelCard:
    """What /v1/models tells. `id` is NAME or NAME:ADAPTER."""

    id: str
    created: int
    state: str  # unloaded | loading | ready | failed
    parent: str | None = None  # of an adapter: its model


@dataclass(frozen=True)
class LoadedModel:
    """A model while a request uses it: it is not unloaded meanwhile."""

    id: str  # as asked for
    name: str
    model: "Model"
    engine: "Engine"
    adapter: str | None  # of NAME:ADAPTER; None: those that are on
    adapters: tuple[str, ...]  # those that are loaded


class ModelRegistry:
    """By name; a request never names a path."""

    @asynccontextmanager
    async def acquire(self, name: str | None) -> AsyncIterator[LoadedModel]:
        """The model of an id, NAME or NAME:ADAPTER (None: the first), loaded if it is not. Raises NotFoundError naming
        the known ones, BudgetError, and what loading raises."""
        raise NotImplementedError
        yield

    def cards(self) -> list[ModelCard]:
        """Every id that a request may name."""
        raise NotImplementedError
