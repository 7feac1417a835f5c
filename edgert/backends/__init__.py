"""The engines behind edgert.load(), one file each; every one makes a Model.

    native     edgert's own: decoders from a bundle, experts in storage
    llama_cpp  llama-cpp-python (extra `gguf`): GGUF files whose architecture the decoder lacks
    onnx       ONNX Runtime (extra `onnx`): encoders

An engine that comes with an extra is imported when a model needs it.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from edgert.errors import UnsupportedError

NAMES = ("edgert", "llama.cpp", "onnx")
OF_KIND = {"gguf": "llama.cpp", "onnx": "onnx"}  # of a component in a bundle
_MODULES = {"llama.cpp": "llama_cpp", "onnx": "onnxruntime"}
_PACKAGES = {"llama_cpp": ("llama-cpp-python", "gguf"), "onnxruntime": ("onnxruntime", "onnx")}


def is_there(name: str) -> bool:
    """Whether the library of an engine is installed."""
    return sys.modules.get(_MODULES[name]) is not None or find_spec(_MODULES[name]) is not None


def library(module: str, needed_by: str) -> Any:
    """Import an engine's library. Raises UnsupportedError naming the extra that brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        package, extra = _PACKAGES[module]
        raise UnsupportedError(
            f"{needed_by}: this model is run by {package}, which cannot be imported ({error}): pip install 'edgert[{extra}]'"
        ) from None
