"""Converting whatever is given: a decoder to edgert's own format, an encoder as the ONNX model it is."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgert.errors import InvalidArgumentError

from .checkpoint import resolve
from .component import ComponentReport, write_component
from .convert import ConversionReport, convert
from .encoder import convert_encoder, find_onnx

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def convert_source(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
    stage: Callable[[str], None] | None = None,
    backend: str | None = None,
    **options: Any,
) -> ConversionReport | ComponentReport:
    """convert(), or convert_encoder() for an .onnx file and for a directory that holds one and no decoder's weights. `backend` "llama.cpp" keeps a GGUF file as it is, for that engine.

    A directory of sentence-transformers (it has a modules.json) is an encoder whatever else it holds. Raises
    InvalidArgumentError for options of a decoder's weights with an encoder.
    """
    path = Path(source)
    if backend == "llama.cpp":
        return _keep_gguf(path, output, options, progress)
    if backend not in (None, "edgert", "onnx"):
        raise InvalidArgumentError(f"backend: found {backend!r:.60}, allowed are edgert, llama.cpp, onnx")
    model = _encoder_in(path)
    if model is None:
        return convert(path, output, threads=threads, progress=progress, stage=stage, **options)
    _refuse_options(options, "an ONNX encoder")
    return convert_encoder(model, output, progress=progress)


def _keep_gguf(
    path: Path,
    output: str | os.PathLike[str],
    options: Mapping[str, Any],
    progress: Callable[[int, int], None] | None,
) -> ComponentReport:
    """A bundle of the GGUF file as it is, for llama.cpp."""
    from edgert.backends.llama_cpp import GgufModel

    from .gguf import GgufFile

    _refuse_options(options, "a GGUF file for llama.cpp")
    model = GgufModel.of_file(path)
    first = model.files[0]
    architecture = GgufFile(first, metadata_only=True).text("general.architecture", 80) or "unknown"
    component = {"kind": "gguf", "file": first.name, "architecture": architecture}
    files = {file.name: resolve(file.parent, file.name) for file in model.files}
    return write_component(
        first, output, component, files, model.assets, notes=model.notes, progress=progress
    )


def _refuse_options(options: Mapping[str, Any], what: str) -> None:
    for name, value in options.items():
        if value not in (None, False):
            raise InvalidArgumentError(f"{name}: {what} is kept as it is; this option has no effect")


def _encoder_in(path: Path) -> Path | None:
    if path.suffix == ".onnx":
        return path
    if not path.is_dir():
        return None
    if any(os.path.lexists(path / name) for name in _WEIGHTS) and not os.path.lexists(path / "modules.json"):
        return None
    return find_onnx(path)
