"""Write a checkpoint as a Hugging Face directory: Qwen3MoeForCausalLM in bf16, with its tokenizer and chat template.

usage: export.py RUN/checkpoint.pt DATA/tokenizer.json OUTPUT
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from model import LanguageModel, ModelConfig
from safetensors.torch import load_file, save_file
from tokenizer import END_OF_TEXT, END_OF_TEXT_ID, IM_END, IM_END_ID
from train import load_model

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def named_parameters(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The model's own, by the names of Qwen3MoeForCausalLM, each expert's matrices apart."""
    named: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": model.embed_tokens,
        "model.norm.weight": model.norm.weight,
    }
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            named[f"{prefix}{norm}.weight"] = layer.get_parameter(f"{norm}.weight")
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            named[f"{prefix}self_attn.{projection}.weight"] = layer.get_parameter(f"self_attn.{projection}")
        named[f"{prefix}mlp.gate.weight"] = layer.get_parameter("mlp.router")
        for projection in ("gate_proj", "up_proj", "down_proj"):
            for expert, matrix in enumerate(layer.get_parameter(f"mlp.{projection}").unbind()):
                named[f"{prefix}mlp.experts.{expert}.{projection}.weight"] = matrix
    return named


def tensors(model: LanguageModel) -> dict[str, torch.Tensor]:
    """As they are stored."""
    # clone: safetensors refuses tensors that share memory, as the slices of stacked experts do.
    return {
        name: tensor.detach().to(torch.bfloat16, copy=True)
        for name, tensor in named_parameters(model).items()
    }


def read_model(directory: Path) -> LanguageModel:
    """The model in such a directory, in f32."""
    stated = json.loads((directory / "config.json").read_text(encoding="utf8"))
    model = LanguageModel(ModelConfig(**{field.name: stated[field.name] for field in fields(ModelConfig)}))
    stored = load_file(directory / "model.safetensors")
    with torch.no_grad():
        for name, tensor in named_parameters(model).items():
            tensor.copy_(stored[name])
    return model


def model_config(model: LanguageModel) -> dict[str, Any]:
    config = model.config
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **asdict(config),
        "intermediate_size": config.moe_intermediate_size * config.num_experts_per_tok,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": IM_END_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "torch_dtype": "bfloat16",
    }


def tokenizer_config(model: LanguageModel) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


GENERATION_CONFIG = {
    "bos_token_id": END_OF_TEXT_ID,
    "eos_token_id": [IM_END_ID, END_OF_TEXT_ID],
    "pad_token_id": END_OF_TEXT_ID,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.95,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint as a Hugging Face directory.")
    parser.add_argument("checkpoint", type=Path, help="the checkpoint.pt that train.py wrote")
    parser.add_argument("tokenizer", type=Path, help="the tokenizer.json that tokenizer.py wrote")
    parser.add_argument("output", type=Path, help="folder to write into")
    options = parser.parse_args()

    model = load_model(options.checkpoint)
    options.output.mkdir(parents=True, exist_ok=True)
    save_file(tensors(model), options.output / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(options.tokenizer, options.output / "tokenizer.json")
    for name, content in (
        ("config.json", model_config(model)),
        ("tokenizer_config.json", tokenizer_config(model)),
        ("generation_config.json", GENERATION_CONFIG),
    ):
        (options.output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf8")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in {options.output}")


if __name__ == "__main__":
    main()
