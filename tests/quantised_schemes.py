"""Every quantised format that is read: its settings, how its parts are made, and the format that carries it over."""

from __future__ import annotations

from typing import Any

from quantised import Scheme, awq, fp8, gptq, mlx, mlx_mxfp4, packed_integers, plain_int8


def gptq_scheme(
    bits: int,
    group: int,
    format: str | None,
    *,
    symmetric: bool = True,
    version: int = 1,
    order: bool = False,
) -> Scheme:
    settings = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": order,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "damp_percent": 0.1, "true_sequential": True, "adapter": None,
    }  # fmt: skip
    name = f"gptq-{bits}-{group}{'' if symmetric else '-zeros'}-v{version}{'-order' if order else ''}"
    return Scheme(
        name, settings, gptq(bits, group, symmetric=symmetric, version=version, order=order), format
    )


def mlx_scheme(bits: int, group: int, format: str | None, dtype: str = "F16") -> Scheme:
    settings = {"group_size": group, "bits": bits, "mode": "affine"}
    return Scheme(
        f"mlx-{bits}-{group}-{dtype}", settings, mlx(bits, group, dtype), format, "quantization",
        {"quantization_config": settings}, stacked=True,
    )  # fmt: skip


def compressed(kind: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"], "kv_cache_scheme": None, "quantization_status": "compressed",
        "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {}, "version": "0.12.0",
    }  # fmt: skip


def packed_scheme(bits: int, group: int, format: str | None, dtype: str, *, symmetric: bool = True) -> Scheme:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": None if group == -1 else group,
        "strategy": "channel" if group == -1 else "group", "actorder": None, "dynamic": False,
    }  # fmt: skip
    return Scheme(
        f"compressed-{bits}-{group}-{dtype}{'' if symmetric else '-zeros'}",
        compressed("pack-quantized", weights),
        packed_integers(bits, group, dtype, symmetric=symmetric),
        format,
    )


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
SCHEMES = [
    gptq_scheme(4, 128, "int4"),
    gptq_scheme(4, 64, "int4", symmetric=False),
    gptq_scheme(4, 32, "q4_0"),
    gptq_scheme(4, 32, "int4_32", symmetric=False, version=2),
    gptq_scheme(4, -1, "int4", version=2),
    gptq_scheme(3, 64, "int3", symmetric=False),
    gptq_scheme(2, 32, "int2", symmetric=False, version=2),
    gptq_scheme(2, 64, "int2"),
    gptq_scheme(8, 64, "int8"),
    gptq_scheme(4, 64, None, order=True),
    Scheme("awq", {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True, "modules_to_not_convert": None}, awq(64), "int4"),
    packed_scheme(4, 64, "int4", "BF16"),
    packed_scheme(4, -1, "int4", "F16", symmetric=False),
    packed_scheme(8, 32, "int8", "BF16"),
    Scheme("compressed-int8", compressed("int-quantized", CHANNEL | {"type": "int"}), plain_int8, "int8"),
    Scheme("compressed-fp8", compressed("float-quantized", CHANNEL), fp8((1, 0), "weight_scale", "BF16"), None),
    Scheme("fp8-blocks", FP8 | {"weight_block_size": [128, 128]}, fp8((128, 128), "weight_scale_inv"), None),
    Scheme("fp8-one_scale", FP8, fp8(None, "weight_scale_inv"), None),
    Scheme("mlx-mxfp4", {"group_size": 32, "bits": 4, "mode": "mxfp4"}, mlx_mxfp4, "mxfp4", "quantization", stacked=True),
    mlx_scheme(4, 32, "q4_1"),
    mlx_scheme(5, 32, "q5_1", "BF16"),
    *(mlx_scheme(bits, 64, f"affine{bits}", "BF16") for bits in (2, 3, 4, 5, 6, 8)),
    *(mlx_scheme(bits, 32, f"affine{bits}_32") for bits in (2, 3, 6, 8)),
]  # fmt: skip
