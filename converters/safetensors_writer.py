"""Writing safetensors files: beside their place, synced, then renamed."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.errors import StorageError

from .output import sync_directory

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DTYPES = {
    "f2": "F16", "u2": "BF16", "u1": "U8", "f4": "F32", "f8": "F64", "i1": "I8", "i4": "I32", "i8": "I64",
}  # fmt: skip


def write_safetensors(path: Path, tensors: "Mapping[str, NDArray[Any]]", metadata: Mapping[str, str]) -> None:
    """Write little-endian arrays of f16, f32, f64, i8, i32, i64 or u8, and of bf16 as uint16, in the order given. Raises
    StorageError."""
    path = Path(os.path.abspath(path))
    beside = path.parent / f".{path.name}.new"
    try:
        with suppress(FileNotFoundError):
            beside.unlink()  # of a run that was killed
        _write(beside, tensors, metadata)
        os.replace(beside, path)
        sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def _write(path: Path, tensors: "Mapping[str, NDArray[Any]]", metadata: Mapping[str, str]) -> None:
    import numpy as np

    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        dtype = _DTYPES[array.dtype.str.lstrip("<|=")]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())
