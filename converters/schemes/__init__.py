"""Checkpoints that are quantised already: each scheme is a file here and a line in SCHEMES.

A scheme's read() takes the tensors of a checkpoint and hands them out under the names that an unquantised checkpoint
has, each quantised one made of its parts. What it does not take is a tensor like any other.
"""

from collections.abc import Callable, Mapping
from typing import Any

from edgert.errors import CorruptError, UnsupportedError

from ..config import Config
from ..tensor import Tensor, TensorInfo
from . import awq, compressed_tensors, fp8, gptq, mlx, mxfp4

Read = Callable[[Config, Mapping[str, TensorInfo]], dict[str, Tensor]]

# By quantization_config's quant_method: what reads the tensors, and the keys that change nothing for it.
SCHEMES: dict[str, tuple[Read, frozenset[str]]] = {
    "awq": (awq.read, awq.KEYS_WITHOUT_EFFECT),
    "compressed-tensors": (compressed_tensors.read, compressed_tensors.KEYS_WITHOUT_EFFECT),
    "fbgemm_fp8": (fp8.read, fp8.KEYS_WITHOUT_EFFECT),
    "fp8": (fp8.read, fp8.KEYS_WITHOUT_EFFECT),
    "gptq": (gptq.read, gptq.KEYS_WITHOUT_EFFECT),
    "mlx": (mlx.read, mlx.KEYS_WITHOUT_EFFECT),
    "mxfp4": (mxfp4.read, mxfp4.KEYS_WITHOUT_EFFECT),
}


def read_scheme(settings: Any, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors as a checkpoint names them that was never quantised. `settings` is its quantization_config, which lies
    at `where`; MLX's own states no quant_method.

    Raises UnsupportedError for a scheme that is not read, by its name, and for settings that are not understood;
    CorruptError for parts of tensors that are missing or disagree with each other or with the settings.
    """
    if not isinstance(settings, dict):
        raise CorruptError(f"{where}: {str(settings)[:80]}; an object is needed")
    method = settings.get("quant_method", "mlx")
    if not isinstance(method, str) or method not in SCHEMES:
        raise UnsupportedError(
            f"{where}: quant_method {str(method)[:80]!r} is not read by this version; "
            f"{', '.join(SCHEMES)} are; use the bf16, f16 or f32 checkpoint"
        )
    read, without_effect = SCHEMES[method]
    stated = {key: value for key, value in settings.items() if value is not None}
    config = Config({"quant_method": method, **stated}, where)
    found = read(config, {name: tensor for name, tensor in tensors.items() if isinstance(tensor, TensorInfo)})
    config.finish(without_effect)
    return found
