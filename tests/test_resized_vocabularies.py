"""Adapters that PEFT made of models whose vocabulary was resized, against transformers with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import F32, convert
from checkpoints import prompt_tokens
from reference import Reference, assert_close, compared, near_ties
from variants import VARIANTS, by_name, make_checkpoint

import edgert

peft = pytest.importorskip("peft", reason="peft is not installed: adapters that it makes are not compared")

LENGTH = 24
ATTENTION = ["q_proj", "v_proj"]

CASES: dict[str, Callable[[int, int], Any]] = {
    "rows that come along": lambda rows, new: peft.LoraConfig(r=4, target_modules=ATTENTION),
    "rows trained whole": lambda rows, new: peft.LoraConfig(
        r=4, target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head"]
    ),
    "embeddings trained whole": lambda rows, new: peft.LoraConfig(
        r=4, target_modules=ATTENTION, modules_to_save=["embed_tokens"]
    ),
    "a head trained whole": lambda rows, new: peft.LoraConfig(
        r=4, target_modules=ATTENTION, modules_to_save=["lm_head"]
    ),
    "kept equal": lambda rows, new: peft.LoraConfig(
        r=4, target_modules=ATTENTION, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "LoRA of the head": lambda rows, new: peft.LoraConfig(r=4, target_modules=[*ATTENTION, "lm_head"]),
    "DoRA of the head": lambda rows, new: peft.LoraConfig(r=4, target_modules=["lm_head"], use_dora=True),
    "SHiRA of the head": lambda rows, new: peft.ShiraConfig(r=4, target_modules=[*ATTENTION, "lm_head"]),
    "IA3 of the head": lambda rows, new: peft.IA3Config(
        target_modules=["v_proj", "lm_head"], feedforward_modules=[]
    ),
    "trained tokens": lambda rows, new: peft.LoraConfig(
        r=4, target_modules=ATTENTION, trainable_token_indices=[5, *range(rows - new, rows)]
    ),
    "trained tokens of both": lambda rows, new: peft.LoraConfig(
        r=4,
        target_modules=ATTENTION,
        trainable_token_indices={name: list(range(rows - new, rows)) for name in ("embed_tokens", "lm_head")},
    ),
}
TRAINED = ("lora_", "shira_", "ia3_", "modules_to_save", "trainable_tokens")


@pytest.fixture(scope="module", params=["qwen3_moe", "olmoe-MHA", "mixtral", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its f32 bundle."""
    directory = tmp_path_factory.mktemp("variant")
    if request.param == "tied":
        plain = by_name(VARIANTS, "qwen3_moe")
        variant = replace(plain, config={**plain.config, "tie_word_embeddings": True})
    else:
        variant = by_name(VARIANTS, request.param)
    source = make_checkpoint(directory / "checkpoint", variant)
    return source, convert(source, directory / "model.edgert", **F32)


def resized(source: Path, rows: int, case: str, directory: Path, seed: int = 0) -> Any:
    """The model with a vocabulary of so many rows and an adapter that was trained, saved to `directory` by PEFT itself."""
    import torch

    torch.manual_seed(seed)
    model = Reference.load(source).model
    new = rows - model.config.vocab_size
    of_head = case.endswith("of the head") and not model.config.tie_word_embeddings
    model.resize_token_embeddings(rows)
    for embeddings in (model.get_output_embeddings(), model.get_input_embeddings()):
        weights = embeddings.weight.data
        if of_head and embeddings is model.get_input_embeddings():  # of which PEFT saves nothing then
            weights[-new:] = weights[:-new].mean(
                dim=0
            )  # what resizing makes of them, but for its noise of 3e-5
        elif case != "trained tokens":
            weights[-new:] = torch.randn(new, model.config.hidden_size) * 0.3
    adapted = peft.get_peft_model(model, CASES[case](rows, new)).eval()
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in TRAINED):
            parameter.data += torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(directory)
    return adapted


def some_tokens(rows: int, vocabulary: int) -> list[int]:
    """With those at the end of the vocabulary."""
    new = [*range(vocabulary, rows)][:3] or [rows - 1]
    return [*prompt_tokens(LENGTH - len(new) - 1, min(rows, vocabulary)), *new, 7]


WIDTHS = [(case, 2) for case in CASES]
WIDTHS += [(case, more) for case in ("rows that come along", "LoRA of the head") for more in (1, 64)]


@pytest.mark.parametrize(("case", "more"), WIDTHS)
def test_logits_equal_those_with_peft(
    checkpoint: tuple[Path, Path], tmp_path: Path, case: str, more: int, record_property: Callable[..., None]
) -> None:
    source, bundle = checkpoint
    with edgert.load(bundle, memory="64MiB", threads=1) as model:
        rows = model.vocab_size + more
        adapted = resized(source, rows, case, tmp_path / "adapter")
        tokens = some_tokens(rows, model.vocab_size)
        expected, margins, _ = Reference(adapted).forward(tokens)
        positions = compared(case, LENGTH, near_ties(expected, margins), record_property)
        model.load_adapter(tmp_path / "adapter")
        found = model.logits(tokens, adapter="adapter")
        assert found.shape == expected.shape == (LENGTH, rows)
        assert_close(found, expected, positions)
        assert model.logits(tokens[:4]).shape == (4, rows - more)


def test_rows_that_are_not_saved_are_the_mean_of_the_others(
    checkpoint: tuple[Path, Path], tmp_path: Path, record_property: Callable[..., None]
) -> None:
    """Trained tokens alone, without the embeddings and the head below them; of a padded vocabulary the last rows are nobody's."""
    import torch

    source, bundle = checkpoint
    torch.manual_seed(0)
    resized_model = Reference.load(source).model
    rows = resized_model.config.vocab_size + 2
    resized_model.resize_token_embeddings(rows)
    for embeddings in (resized_model.get_output_embeddings(), resized_model.get_input_embeddings()):
        embeddings.weight.data[-2:] = embeddings.weight.data[:-2].mean(dim=0)
    adapted = peft.get_peft_model(resized_model, CASES["trained tokens"](rows, 2)).eval()
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in TRAINED):
            parameter.data += torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokens = some_tokens(rows, rows - 2)
    expected, margins, _ = Reference(adapted).forward(tokens)
    positions = compared("unsaved", LENGTH, near_ties(expected, margins), record_property)
    with edgert.load(bundle, memory="64MiB", threads=1) as model:
        model.load_adapter(tmp_path / "adapter")
        assert_close(model.logits(tokens, adapter="adapter"), expected, positions)


@pytest.mark.parametrize("case", ["rows that come along", "LoRA of the head"])
def test_at_another_scale_the_new_rows_are_whole(
    checkpoint: tuple[Path, Path], tmp_path: Path, case: str, record_property: Callable[..., None]
) -> None:
    """As with PEFT, where a scale is LoRA's alone."""
    source, bundle = checkpoint
    with edgert.load(bundle, memory="64MiB", threads=1) as model:
        rows = model.vocab_size + 2
        adapted = resized(source, rows, case, tmp_path / "adapter")
        for module in adapted.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= 0.5
        tokens = some_tokens(rows, model.vocab_size)
        expected, margins, _ = Reference(adapted).forward(tokens)
        positions = compared(case, LENGTH, near_ties(expected, margins), record_property)
        model.load_adapter(tmp_path / "adapter")
        assert_close(model.logits(tokens, adapter={"adapter": 0.5}), expected, positions)


def test_one_of_several_adapters_has_new_rows(
    checkpoint: tuple[Path, Path], tmp_path: Path, record_property: Callable[..., None]
) -> None:
    import torch

    source, bundle = checkpoint
    with edgert.load(bundle, memory="64MiB", threads=1) as model:
        rows = model.vocab_size + 2
        adapted = resized(source, rows, "rows that come along", tmp_path / "one")
        adapted.add_adapter("two", peft.LoraConfig(r=4, target_modules=["v_proj", "o_proj"]))
        for name, parameter in adapted.named_parameters():
            if "two" in name:
                parameter.data += torch.randn_like(parameter) * 0.1
        adapted.save_pretrained(tmp_path, selected_adapters=["two"], save_embedding_layers=False)
        adapted.base_model.set_adapter(["default", "two"])
        tokens = some_tokens(rows, model.vocab_size)
        expected, margins, _ = Reference(adapted).forward(tokens)
        positions = compared("several", LENGTH, near_ties(expected, margins), record_property)
        for name in ("one", "two"):
            model.load_adapter(tmp_path / name, name)
        assert_close(model.logits(tokens, adapter=["one", "two"]), expected, positions)
        assert model.logits(tokens[:4], adapter="two").shape == (4, rows - 2)


def test_requests_with_and_without_new_rows_share_steps(
    checkpoint: tuple[Path, Path], tmp_path: Path
) -> None:
    """Each gets the very tokens that it gets alone."""
    from edgert.engine import Engine
    from edgert.sampling import Sampling

    source, bundle = checkpoint
    with edgert.load(bundle, memory="64MiB", threads=1, parallel=6) as model:
        rows = model.vocab_size + 2
        resized(source, rows, "rows that come along", tmp_path / "adapter")
        model.load_adapter(tmp_path / "adapter")
        tokens = some_tokens(rows, model.vocab_size)[:-4]
        sampling = Sampling(max_tokens=8, temperature=1.0, seed=5, logprobs=2)
        asked = [None, "adapter"] * 3
        options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "seed": 5}
        alone = [model.generate(tokens, adapter=adapter, **options).tokens for adapter in asked]
        drawn: list[list[int | None]] = [[] for _ in asked]

        def into(tokens: list[int | None]) -> Callable[[Any], None]:
            return lambda piece: tokens.append(piece.token)

        engine = Engine(model)
        jobs = [
            engine.submit(tokens, sampling, into(to), adapter=adapter)
            for adapter, to in zip(asked, drawn, strict=True)
        ]
        for job in jobs:
            assert job.done.wait(60)
        engine.close()
        assert drawn == alone
