"""Opening a model: which engine runs it, and with which knobs."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import backends, caches, lossy
from edgert.bundle import Bundle, locate
from edgert.converters import checkpoint
from edgert.errors import InvalidArgumentError, UnsupportedError
from edgert.machine import measured
from edgert.settings import Layers, knobs

if TYPE_CHECKING:
    from edgert.model import Model


def load(
    path_or_name: str | os.PathLike[str] | None = None,
    *,
    memory: int | str | None = None,
    threads: int | str | None = None,
    context: int | str | None = None,
    backend: str | None = None,
    exact: bool = False,
    **others: Any,
) -> "Model":
    """Load a bundle: a path, a name (see `edgert list`), or None for the embedded model. A GGUF file is converted into
    a bundle the first time, which is kept in the cache until the file changes; hf:ORG/NAME:FILE and ollama:NAME stand for
    one in the cache of Hugging Face or ollama (see `edgert list --all`).

    `memory` bounds all native memory and the tokenizer's: bytes, "10MiB", "1.5GB", or "auto" (what the machine can
    spare); `threads` and `context` (tokens) likewise take a number or "auto"; `others` are the remaining knobs, such as
    io_threads. What is not given comes from the variable EDGERT_<NAME>, the configuration file, the bundle's own
    defaults, what `edgert devices probe` found best here, or the knob's default, in this order.

    `backend` names the engine: "edgert", "llama.cpp" (extra gguf), which also runs a GGUF file that edgert's own decoder
    has no place for, or "onnx" (extra onnx); by default what the model needs. `exact` refuses every lossy mode (knobs that
    give up quality for speed, such as skip_experts), wherever it is turned on.

    Raises InvalidArgumentError for a knob outside its range and for a lossy mode where `exact`, BudgetError naming the smallest budget that works,
    NotFoundError, CorruptError, UnsupportedError or StorageError for the bundle.
    """
    given = {"memory": memory, "threads": threads, "context": context, **others}
    values = knob_values(given)
    if exact:
        lossy.refuse(given)
    return load_with(values, path_or_name, backend)


def load_with(
    values: dict[str, Any],
    path_or_name: str | os.PathLike[str] | None,
    backend: str | None = None,
    *,
    moments: str = "none",
) -> "Model":
    """load() with knob_values(); with `moments` edgert's own engine measures what it runs (_native.Model.observed)."""
    if backend not in (None, *backends.NAMES):
        raise InvalidArgumentError(f"backend: found {backend!r:.60}, allowed are {', '.join(backends.NAMES)}")
    if isinstance(path_or_name, str) and caches.is_name(path_or_name):
        path_or_name = caches.resolve(path_or_name)
    path = None if path_or_name is None else Path(path_or_name)
    is_gguf = path is not None and path.is_file() and checkpoint.is_gguf(path)
    if path is not None and is_gguf and backend == "llama.cpp":
        return _load_gguf(path, values)
    try:
        bundle = Bundle.open(locate(path_or_name))
    except UnsupportedError as error:
        if path is None or not is_gguf or backend is not None or not backends.is_there("llama.cpp"):
            raise
        warnings.warn(f"llama.cpp runs this model, because {error}", RuntimeWarning, stacklevel=3)
        return _load_gguf(path, values)
    runs = "edgert" if bundle.component is None else backends.OF_KIND[bundle.component["kind"]]
    if backend not in (None, runs):
        raise UnsupportedError(f"{bundle.path}: {runs} runs this bundle, not {backend}")
    machine = measured()
    stated = {} if machine is None else machine.knobs(bundle.path)
    for name, value in bundle.knobs().items():
        if values[name] is None:
            values[name] = value
    for name, value in stated.items():
        if values[name] in (None, "auto"):
            values[name] = value
    if bundle.component is not None:
        return _load_component(bundle, values)
    from edgert.backends.native import NativeModel

    return NativeModel(bundle, values, moments=moments)


def _load_component(bundle: Bundle, values: Mapping[str, Any]) -> "Model":
    assert bundle.component is not None
    if bundle.component["kind"] == "gguf":
        from edgert.backends.llama_cpp import GgufModel, LlamaCppModel

        return LlamaCppModel(GgufModel.of_bundle(bundle), values)
    from edgert.backends.onnx import Encoder

    return Encoder(bundle, values)


def _load_gguf(path: Path, values: Mapping[str, Any]) -> "Model":
    from edgert.backends.llama_cpp import GgufModel, LlamaCppModel

    source = GgufModel.of_file(path)
    for note in source.notes:
        warnings.warn(note, RuntimeWarning, stacklevel=4)
    return LlamaCppModel(source, values)


def knob_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs as flag, variable and file say; None where none does."""
    rows = {setting.name: setting for setting in knobs()}
    for name in given:
        if name not in rows:
            raise InvalidArgumentError(f"unknown knob {name!r}; the knobs are {', '.join(sorted(rows))}")
    layers = Layers.read()
    return {name: layers.value(setting, given.get(name)) for name, setting in rows.items()}
