"""Small tensors of a safetensors file as arrays."""

from typing import TYPE_CHECKING, Any

from edgert.errors import UnsupportedError

from .files import InputFile
from .tensor import TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "|i1"}


def values_of(info: TensorInfo) -> "Any":
    """A small tensor as an array: floats as f32, whole numbers as int8, int32 or int64."""
    return as_floats(stored_values_of(info))


def stored_values_of(info: TensorInfo, data: bytes | bytearray | memoryview | None = None) -> "Any":
    """A small tensor as the file has it: f32, f16, int8, int32 or int64, bf16 as uint16. `data`: the file's bytes from
    info.begin on, where they have been read."""
    import numpy as np

    dtype = _DTYPES.get(info.dtype)
    if dtype is None:
        raise UnsupportedError(
            f"{info.path}: tensor {info.name!r}: dtype {info.dtype}; read are {', '.join(_DTYPES)}"
        )
    if data is None:
        with InputFile(info.path) as file:
            data = file.read(info.begin, info.end - info.begin)
    return np.frombuffer(data, dtype).reshape(info.shape)


def as_floats(values: "NDArray[Any]") -> "Any":
    """What stored_values_of() returned, with floats as f32."""
    import numpy as np

    if values.dtype == np.uint16:  # bf16
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) if values.dtype == np.float16 else values


def same_type(a: "NDArray[Any]", b: "NDArray[Any]") -> "tuple[NDArray[Any], NDArray[Any]]":
    """Both as stored, or as f32 where they are stored otherwise than each other."""
    return (a, b) if a.dtype == b.dtype else (as_floats(a), as_floats(b))
