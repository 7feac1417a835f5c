"""Adapters that PEFT trained for a few steps, saved and loads again, on families whose modules are not like the others'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, convert
from checkpoints import prompt_tokens
from reference import Reference, assert_close, compared, near_ties
from variants import VARIANTS, by_name, make_checkpoint

import edgert
from edgert.errors import EdgertError

peft = pytest.importorskip("peft", reason="peft is not installed: adapters that it trains are not compared")

LENGTH = 24
STEPS = 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora(*modules: str, **options: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(modules), **options)


def pruned() -> Any:
    return peft.AdaLoraConfig(
        init_r=6,
        target_r=2,
        tinit=0,
        tfinal=1,
        deltaT=1,
        total_step=STEPS,
        lora_alpha=9,
        alpha_pattern={"q_proj": 2},  # AdaLoRA pays it no heed
        target_modules=ATTENTION,
    )


def norms() -> Any:
    return peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "model.norm"])


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "AdaLoRA whose ranks were pruned, some to nothing": ("qwen3_moe", pruned),
    "embeddings are scaled behind a soft prompt": (
        "granitemoe",
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    ),
    "or before it": (
        "gemma4_text",
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    ),
    "norms that are zero-centred": ("qwen3_next", norms),
    "experts that stand in the layer itself": (
        "gemma4_text",
        lambda: lora(target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "a router trained whole beside its correction": ("deepseek_v3", lambda: lora("o_proj", modules_to_save=["gate"])),
    "a correction with a module of its own": ("ernie4_5_moe", lambda: lora("o_proj", modules_to_save=["gate"])),
    "a router with a bias": ("gpt_oss", lambda: lora("o_proj", modules_to_save=["router"])),
    "biases, the router's too": ("gpt_oss", lambda: lora("o_proj", bias="all")),
    "a router that is called one": ("granitemoe", lambda: lora(target_parameters=["router.weight"])),
    "a name that ends in the middle of a word": ("qwen2_moe", lambda: lora("o_proj", modules_to_save=["expert_gate"])),
    "a module of modules trained whole": ("mixtral", lambda: lora("lm_head", modules_to_save=["self_attn"])),
    "DoRA of a head that is tied": ("llama-llama3_rope-tied", lambda: lora("lm_head", "o_proj", use_dora=True)),
    "a head with a bias": ("phimoe", lambda: lora("lm_head", "o_proj")),
}  # fmt: skip


def train(model: Any, vocabulary: int) -> None:
    import torch

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        tokens = torch.randint(4, vocabulary, (2, 16), generator=generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def made(place: Path, variant: str, config: Callable[[], Any]) -> tuple[Path, Path]:
    """A checkpoint, and an adapter that was trained on it."""
    import torch

    torch.manual_seed(0)
    source = make_checkpoint(place / "checkpoint", replace(by_name(VARIANTS, variant), dtype="float32"))
    model = Reference.load(source).model
    adapted = peft.get_peft_model(model, config())
    train(adapted, model.config.vocab_size)
    adapted.save_pretrained(place / "adapter")
    return source, place / "adapter"


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_with_peft(
    tmp_path: Path, case: str, record_property: Callable[..., None]
) -> None:
    source, adapter = made(tmp_path, *CASES[case])
    reference = Reference.load(source)
    tokens = prompt_tokens(LENGTH, reference.model.config.vocab_size)
    plain, _, _ = reference.forward(tokens)
    adapted = peft.PeftModel.from_pretrained(reference.model, adapter).eval()
    expected, margins, _ = Reference(adapted).forward(tokens)
    expected, margins = expected[-LENGTH:], margins[-LENGTH:]
    positions = compared(case, LENGTH, near_ties(expected, margins), record_property)
    bundle = convert(source, tmp_path / "model.edgert", **F32)
    with edgert.load(bundle, memory="64MiB", threads=1) as model:
        model.load_adapter(adapter)
        assert_close(model.logits(tokens, adapter="adapter"), expected, positions)
    assert np.abs(expected - plain).max() > 1e-3 * np.abs(plain).max()


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "layers that attend with heads of several sizes": (
        "gemma4_text",
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "PREFIX_TUNING is run by models that attend in every layer, all alike",
    ),
    "sinks": (
        "gpt_oss",
        lambda: lora("lm_head", modules_to_save=["self_attn"]),
        "self_attn.sinks: is not the base's own",
    ),
    "biases of norms": (
        "phimoe",
        lambda: lora("o_proj", bias="all"),
        "layernorm.bias: is not the base's own",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_run_is_refused(tmp_path: Path, case: str) -> None:
    variant, config, message = REFUSED[case]
    source, adapter = made(tmp_path, variant, config)
    bundle = convert(source, tmp_path / "model.edgert", **F32)
    with (
        edgert.load(bundle, memory="64MiB", threads=1) as model,
        pytest.raises(EdgertError, match=message),
    ):
        model.load_adapter(adapter)


OF_GGUF: dict[str, tuple[str, Callable[[], Any]]] = {
    "norms": ("olmoe", norms),
    "norms that are zero-centred": ("qwen3_5_moe_text", norms),
    "a matrix beside the experts": ("gemma4_text", lambda: lora("down_proj")),
    "a router beside its correction": ("glm4_moe", lambda: lora("o_proj", modules_to_save=["gate"])),
}


@pytest.mark.parametrize("case", OF_GGUF)
def test_on_bases_that_were_gguf_files(
    tmp_path: Path, case: str, record_property: Callable[..., None]
) -> None:
    """Whose tensors have other names."""
    import torch
    from gguf_models import MODELS, write_pair

    family, config = OF_GGUF[case]
    torch.manual_seed(0)
    source, gguf = write_pair(tmp_path, next(pair for pair in MODELS if pair.variant.family == family))
    model = Reference.load(source).model
    adapted = peft.get_peft_model(model, config())
    train(adapted, model.config.vocab_size)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = prompt_tokens(LENGTH, model.config.vocab_size)
    expected, margins, _ = Reference(adapted).forward(tokens)
    positions = compared(case, LENGTH, near_ties(expected, margins), record_property)
    bundle = convert(gguf, tmp_path / "model.edgert", **F32)
    with edgert.load(bundle, memory="64MiB", threads=1) as loaded:
        loaded.load_adapter(tmp_path / "adapter")
        assert_close(loaded.logits(tokens, adapter="adapter"), expected, positions)
