"""Adapters that the PEFT library made, against transformers with PEFT; reference.py says how logits are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, convert
from checkpoints import prompt_tokens
from reference import Reference, assert_close, compared, near_ties
from variants import VARIANTS, by_name, make_checkpoint

import edgert

peft = pytest.importorskip("peft", reason="peft is not installed: adapters that it makes are not compared")

LENGTH = 32
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

CASES: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION),
    "LoRA of the head and the queries": lambda: peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "rsLoRA with patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=ATTENTION,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
    ),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, use_dora=True),
    "LoRA of experts": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=[GATE_UP, DOWN]
    ),
    "LoRA of experts' gate and up": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=[GATE_UP]
    ),
    "LoRA of experts' down": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=[DOWN]
    ),
    "LoRA of all that is linear": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "LoRA of experts with patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=[GATE_UP, DOWN],
        rank_pattern={"experts.gate_up_proj": 2},
        alpha_pattern={r".*\.(1|2)\..*down_proj": 5, "experts": 3},
    ),
    "LoRA of the router": lambda: peft.LoraConfig(
        r=4, target_modules=[], target_parameters=["mlp.gate.weight"], alpha_pattern={"gate.weight": 6}
    ),
    "LoRA of some layers": lambda: peft.LoraConfig(
        r=4, target_modules=ATTENTION, layers_to_transform=[1], exclude_modules=r".*k_proj"
    ),
    "LoHa": lambda: peft.LoHaConfig(r=3, alpha=6, target_modules=ATTENTION, rank_pattern={"q_proj": 2}),
    "MiSS": lambda: peft.MissConfig(r=5, target_modules=ATTENTION),
    "MiSS, mini": lambda: peft.MissConfig(r=4, mini_r=4, init_weights="mini", target_modules=ATTENTION),
    "Super-tuning": lambda: peft.SupertuningConfig(sparsity=0.9, target_modules=ATTENTION),
    "Super-tuning with LoRA": lambda: peft.SupertuningConfig(sparsity=0.9, r=3, target_modules=ATTENTION),
    "PVeRA": lambda: peft.PveraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "BEFT": lambda: peft.BeftConfig(target_modules=["q_proj", "v_proj"]),
    "SHiRA": lambda: peft.ShiraConfig(r=4, target_modules=ATTENTION),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=6, target_modules=ATTENTION, total_step=10),
    "LoRA with its own biases": lambda: peft.LoraConfig(r=4, target_modules=ATTENTION, lora_bias=True),
    "LoRA and trained biases": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], bias="all"),
    "modules trained whole": lambda: peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["lm_head", "embed_tokens", "o_proj", "input_layernorm"],
    ),
    "tokens trained beside LoRA": lambda: peft.LoraConfig(
        r=4, target_modules=ATTENTION, trainable_token_indices=[9, 2, 30, 77]
    ),
    "trained tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[5, 3, 60], target_modules=["embed_tokens"]
    ),
    "norms": lambda: peft.LNTuningConfig(
        target_modules=["input_layernorm", "post_attention_layernorm", "model.norm"]
    ),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "P-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8
    ),
    "CPT": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]
    ),
    "cartridge": lambda: peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "kept equal": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}
TRAINED = (
    "hada_",
    "miss_block",
    "supertuning_",
    "beft_bias",
    "lora_",
    "shira_",
    "ia3_",
    "vera_lambda",  # and pvera_lambda
    "modules_to_save",
    "trainable_tokens",
    "ln_tuning",
    "prompt_encoder",
)


@pytest.fixture(scope="module", params=["qwen3_moe", "olmoe-MHA", "olmoe-square", "olmoe-bias", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its f32 bundle; "square" where an expert's gate and up together are."""
    from dataclasses import replace

    directory = tmp_path_factory.mktemp("variant")
    if request.param == "olmoe-square":
        plain = by_name(VARIANTS, "olmoe-MHA")
        variant = replace(plain, name="olmoe-square", config={**plain.config, "intermediate_size": 36})
    elif request.param == "olmoe-bias":
        plain = by_name(VARIANTS, "olmoe-MHA")
        variant = replace(plain, name="olmoe-bias", config={**plain.config, "attention_bias": True})
    elif request.param == "tied":
        plain = by_name(VARIANTS, "qwen3_moe")
        variant = replace(plain, name="tied", config={**plain.config, "tie_word_embeddings": True})
    else:
        variant = by_name(VARIANTS, request.param)
    source = make_checkpoint(directory / "checkpoint", variant)
    return source, convert(source, directory / "model.edgert", **F32)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_with_peft(
    checkpoint: tuple[Path, Path], tmp_path: Path, case: str, record_property: Callable[..., None]
) -> None:
    import torch

    source, bundle = checkpoint
    torch.manual_seed(0)
    reference = Reference.load(source)
    tokens = prompt_tokens(LENGTH, reference.model.config.vocab_size)
    plain, _, _ = reference.forward(tokens)
    adapted = peft.get_peft_model(reference.model, CASES[case]()).eval()
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in TRAINED) or (parameter.requires_grad and name.endswith(".bias")):
            parameter.data += torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    expected, margins, _ = Reference(adapted).forward(tokens)
    expected, margins = expected[-LENGTH:], margins[-LENGTH:]
    positions = compared(case, LENGTH, near_ties(expected, margins), record_property)

    with edgert.load(bundle, memory="64MiB", threads=1) as model:
        model.load_adapter(tmp_path / "adapter")
        assert_close(model.logits(tokens, adapter="adapter"), expected, positions)
    assert np.abs(expected - plain).max() > 1e-2 * np.abs(plain).max()


# --- vocabularies that were cut: test_resized_vocabularies.py has those that have grown ------------------

CUT: dict[str, Callable[[], Any]] = {
    "rows that come along": lambda: peft.LoraConfig(r=4, target_modules=ATTENTION),
    "rows trained whole": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
}


@pytest.mark.parametrize("case", CUT)
@pytest.mark.parametrize("family", ["qwen3_moe", "tied"])
def test_added_tokens_within_the_rows_that_the_base_has(
    tmp_path: Path, case: str, family: str, record_property: Callable[..., None]
) -> None:
    """A vocabulary cut to its tokens, the last five of which are new."""
    from dataclasses import replace

    import torch

    variant = by_name(VARIANTS, "qwen3_moe")
    if family == "tied":
        variant = replace(variant, config={**variant.config, "tie_word_embeddings": True})
    source = make_checkpoint(tmp_path / "checkpoint", variant)
    torch.manual_seed(1)
    model = Reference.load(source).model
    rows = model.config.vocab_size - 4
    model.resize_token_embeddings(rows)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        embeddings.weight.data[-5:] = torch.randn(5, model.config.hidden_size) * 0.3
    tokens = [*prompt_tokens(LENGTH - 4, rows - 5), rows - 1, 7, rows - 3, rows - 5]
    adapted = peft.get_peft_model(model, CUT[case]()).eval()
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in TRAINED):
            parameter.data += torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    expected, margins, _ = Reference(adapted).forward(tokens)
    positions = compared(case, LENGTH, near_ties(expected, margins), record_property)
    with edgert.load(convert(source, tmp_path / "model.edgert", **F32), memory="64MiB", threads=1) as loaded:
        loaded.load_adapter(tmp_path / "adapter")
        found = loaded.logits(tokens, adapter="adapter")
    assert_close(found[:, :rows], expected, positions)


def test_lora_of_a_head_with_fewer_rows(tmp_path: Path) -> None:
    import torch

    source = make_checkpoint(tmp_path / "checkpoint", by_name(VARIANTS, "qwen3_moe"))
    torch.manual_seed(0)
    model = Reference.load(source).model
    rows = model.config.vocab_size - 4
    model.resize_token_embeddings(rows)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokens = prompt_tokens(LENGTH, rows)
    expected, _, _ = Reference(adapted).forward(tokens)
    with edgert.load(convert(source, tmp_path / "model.edgert", **F32), memory="64MiB", threads=1) as loaded:
        loaded.load_adapter(tmp_path / "adapter")
        found = loaded.logits(tokens, adapter="adapter")
    assert_close(found[:, :rows], expected, list(range(LENGTH)))
