"""Settings as tools write them into config.json: nothing in them is refused that leaves the weights as they are."""

from __future__ import annotations

from typing import Any

import pytest

from edgert.converters.schemes import read_scheme
from edgert.errors import UnsupportedError

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
WEIGHTS: dict[str, Any] = {
    "actorder": None, "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4, "observer": "minmax",
    "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "AutoGPTQ": GPTQ | {
        "damp_percent": 0.01, "static_groups": False, "true_sequential": True, "model_name_or_path": None,
        "model_file_base_name": "model",
    },
    "transformers' GPTQ": GPTQ | {
        "batch_size": 1, "block_name_to_quantize": None, "cache_block_outputs": True, "dataset": None,
        "exllama_config": {"version": 1}, "max_input_length": None, "model_seqlen": None, "pad_token_id": None,
        "tokenizer": None, "use_cuda_fp16": False, "use_exllama": True,
    },
    "GPTQModel": GPTQ | {
        "checkpoint_format": "gptq", "format": "gptq", "method": "gptq", "hyb_act": False, "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:5.0.0"]}, "pack_dtype": "int32", "dynamic": {"-:.*gate$": {}},
    },
    "AutoRound as GPTQ": GPTQ | {
        "provider": "auto-round", "autoround_version": "0.6.0", "iters": 200, "nsamples": 512, "true_sequential": False,
        "damp_percent": 0.01, "packing_format": "auto_round:auto_gptq", "data_type": "int", "scale_dtype": "torch.float16",
    },
    "AutoAWQ": {
        "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True, "backend": "autoawq",
        "do_fuse": False, "fuse_max_seq_len": None, "modules_to_fuse": None, "modules_to_not_convert": ["gate"],
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"input_activations": None, "output_activations": None, "targets": ["Linear"],
                                      "weights": WEIGHTS | {"scale_dtype": None, "zp_dtype": None}}},
        "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None, "version": "0.12.2",
        "sparsity_config": {}, "transform_config": {},
    },
    "FBGEMM": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    "DeepSeek-V3.1": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "Ministral 3": {
        "quant_method": "fp8", "activation_scheme": "static", "dequantize": False, "weight_block_size": None,
        "modules_to_not_convert": ["model.vision_tower", "lm_head"],
    },
    "gpt-oss": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    "MLX of mixed bits": {
        "group_size": 64, "bits": 4, "model.layers.0.mlp.gate": {"group_size": 64, "bits": 8}, "lm_head": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_read(name: str) -> None:
    assert read_scheme(PUBLISHED[name], {}, "config.json: quantization_config") == {}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "MLX of mixed bits"])
def test_another_key_beside_them_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="rotation"):
        read_scheme(PUBLISHED[name] | {"rotation": "hadamard"}, {}, "config.json: quantization_config")
