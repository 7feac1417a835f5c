"""Opening the models of the daemon within their parts of the budget."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import _native
from edgert.adapter_paths import locate_adapter
from edgert.bundle import Bundle, installed, locate
from edgert.errors import EdgertError, NotFoundError
from edgert.server.configuration import Configuration, ServedModel
from edgert.server.models import Opened, Opener

if TYPE_CHECKING:
    from edgert.controlling import Bounds, Control
    from edgert.model import Model

_SPARE_BYTES = 64 << 20  # of another engine than edgert's own, besides a model's files


@dataclass(frozen=True)
class Loading:
    """`knobs` as knob_values() gives them, for every model; `queue` of each engine; `bounds` within which models are kept
    while they run, on record in `control_log`."""

    knobs: Mapping[str, Any]
    queue: int
    bounds: "Bounds | None" = None
    control_log: Path | None = None
    control_log_bytes: int = 0

    def opener(self) -> Opener:
        return Opener(self.needs, self.open)

    def budget_bytes(self) -> int:
        """The daemon's: the knob memory, or what the machine can spare."""
        stated = self.knobs["memory"]
        if stated not in (None, "auto", 0):
            return int(stated)
        return _native.Runtime(threads=1, io_threads=1).budget_bytes

    def needs(self, served: ServedModel) -> tuple[int, int]:
        from edgert.footprint import memory_needs

        bundle = Bundle.open(locate(resolved(served.source)))
        if bundle.component is not None:
            size = bundle.bytes + _SPARE_BYTES
            return size, 2 * size
        needs = memory_needs(bundle)
        return needs["minimum_bytes"], max(needs["minimum_bytes"], needs["resident_bytes"])

    def open(self, served: ServedModel, budget_bytes: int) -> Opened:
        from edgert.engine import Engine
        from edgert.loading import load_with

        with ExitStack() as undo:
            model = undo.enter_context(load_with({**self.knobs, "memory": budget_bytes}, served.source))
            for adapter in served.adapters:
                model.load_adapter(adapter.path, adapter.name)
            on = {adapter.name: adapter.scale for adapter in served.adapters if adapter.scale}
            if on:
                model.set_adapter(on)
            engine = None if model.backend == "onnx" else Engine(model, queue=self.queue)
            if engine is not None:
                undo.callback(engine.close)
            control = self._controlled(model)
            undo.pop_all()
        return Opened(
            model, engine, budget_bytes, tuple(adapter.name for adapter in served.adapters), control
        )

    def _controlled(self, model: "Model") -> "Control | None":
        if self.bounds is None or model.backend != "edgert":
            return None
        from edgert.controlling import Control

        return Control.start(model, self.bounds, log=self.control_log, log_bytes=self.control_log_bytes)


def resolved(source: str) -> str:
    from edgert import caches

    return str(caches.resolve(source)) if caches.is_name(source) else source


def check_sources(configuration: Configuration) -> None:
    """Refuse, before anything is loaded, models and adapters that are not there. Raises NotFoundError."""
    for served in configuration.models:
        locate(resolved(served.source))
        for adapter in served.adapters:
            if not locate_adapter(adapter.path).exists():
                raise NotFoundError(f"{adapter.path}: no such adapter")


def every_installed() -> Sequence[ServedModel]:
    """The models of `edgert list`, by their names there."""
    models = []
    for name, path in installed():
        try:
            Bundle.open(path)
        except EdgertError:
            continue
        models.append(ServedModel(name, str(path)))
    return models
