"""edgert runs mixture-of-experts language models that are larger than the memory they are given.

    import edgert

    model = edgert.load("docs-moe.edgert", memory="10MiB")
    for piece in model.stream("The os.path module", max_tokens=64):
        print(piece.text, end="")

Importing the package is cheap: the engine and the tokenizer load with the first name that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgert import errors
    from edgert._native import __version__
    from edgert.calibrating import calibrate
    from edgert.errors import EdgertError
    from edgert.generation import Generation, Piece, Stream
    from edgert.loading import load
    from edgert.model import Model
    from edgert.tokenizer import Tokenizer

__all__ = [
    "EdgertError",
    "Generation",
    "Model",
    "Piece",
    "Stream",
    "Tokenizer",
    "__version__",
    "calibrate",
    "errors",
    "load",
]

_HOME = {
    "EdgertError": "edgert.errors",
    "Generation": "edgert.generation",
    "Model": "edgert.model",
    "Piece": "edgert.generation",
    "Stream": "edgert.generation",
    "Tokenizer": "edgert.tokenizer",
    "__version__": "edgert._native",
    "calibrate": "edgert.calibrating",
    "load": "edgert.loading",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("edgert.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'edgert' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
