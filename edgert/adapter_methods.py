"""What every model offers its users of adapters."""

import os
from pathlib import Path

from edgert.adapter_paths import adapter_name, locate_adapter
from edgert.adapters import AdapterChoice, AdapterInfo, AdapterSet
from edgert.errors import UnsupportedError
from edgert.patches import AdapterMode


class Adapters:
    """What a model does with adapters, for engines that take any: those give _adapter_set and _load_adapter()."""

    _adapter_set: AdapterSet | None = None

    def load_adapter(self, path: str | os.PathLike[str], name: str | None = None) -> AdapterInfo:
        """Load an adapter file (see `edgert adapter convert`) or a PEFT directory under `name`, by default the path's own;
        of the embedded model also "sql" or "rust", which the package carries. It is off until set_adapter() or a call's `adapter` turns it on; its memory counts towards the budget. Of a file the
        header alone is read, its numbers when a sequence first needs them, so that hundreds can be loaded; what is not
        in use leaves the memory where another needs it, and is read again.

        Raises UnsupportedError by name for what cannot be run, InvalidArgumentError for an adapter of another model or a
        name that is taken, BudgetError where it does not fit.
        """
        found = locate_adapter(path)
        return self._load_adapter(found, adapter_name(found) if name is None else name)

    def unload_adapter(self, name: str) -> None:
        """Raises NotFoundError. What runs with it runs on."""
        raise self._unable("it takes no adapters")

    def set_adapter(self, adapter: AdapterChoice, mode: AdapterMode = "auto", *, top_k: int = 2) -> None:
        """Turn these on, and no others, for what begins from now on: a name, several, or {name: scale}.

        `mode`: "patch" puts sparse values into the weights, where they cost nothing once they are there; "overlay" adds them to
        every product, exactly; "auto" takes patches where they are faithful (docs/adapters.md). adapters() says which it is. "gated": every token takes,
        of each matrix, the `top_k` whose gates suit its input best, by their shares; adapters need gates for that.

        Raises NotFoundError, what reading them raises, and InvalidArgumentError or BudgetError where `mode` is "patch" or
        "gated" and that cannot be.
        """
        raise self._unable("it takes no adapters")

    def disable_adapters(self) -> None:
        """Run as without them, until set_adapter() or enable_adapters()."""
        raise self._unable("it takes no adapters")

    def enable_adapters(self) -> None:
        raise self._unable("it takes no adapters")

    def adapters(self) -> list[AdapterInfo]:
        """Those that are loaded, and with which scale they are on."""
        return self._adapters().all()

    def _adapters(self) -> AdapterSet:
        if self._adapter_set is None:
            raise self._unable("it takes no adapters")
        return self._adapter_set

    def check_adapter(self, adapter: AdapterChoice) -> None:
        """Refuse names of adapters that are not there."""
        if adapter is not None:
            self._adapters().check(adapter)

    def _load_adapter(self, path: Path, name: str) -> AdapterInfo:
        raise self._unable("it takes no adapters")

    def _unable(self, why: str) -> UnsupportedError:
        raise NotImplementedError
