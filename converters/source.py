"""Converting whatever is given: a decoder to edgert's own format, an encoder as the ONNX model it is."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgert.errors import InvalidArgumentError

from .component import ComponentReport
from .convert import ConversionReport, convert
from .encoder import convert_encoder, find_onnx

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def convert_source(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> ConversionReport | ComponentReport:
    """convert(), or convert_encoder() for an .onnx file and for a directory that holds one and no decoder's weights.

    A directory of sentence-transformers (it has a modules.json) is an encoder whatever else it holds. Raises
    InvalidArgumentError for options of a decoder's weights with an encoder.
    """
    path = Path(source)
    model = _encoder_in(path)
    if model is None:
        return convert(path, output, threads=threads, progress=progress, **options)
    given = [name for name, value in options.items() if value not in (None, False)]
    if given:
        raise InvalidArgumentError(f"{given[0]}: an ONNX encoder is kept as it is; this option has no effect")
    return convert_encoder(model, output, progress=progress)


def _encoder_in(path: Path) -> Path | None:
    if path.suffix == ".onnx":
        return path
    if not path.is_dir():
        return None
    if any(os.path.lexists(path / name) for name in _WEIGHTS) and not os.path.lexists(path / "modules.json"):
        return None
    return find_onnx(path)
