"""The whole way from checkpoint to logits against transformers; reference.py says how they are compared."""

from __future__ import annotations

import importlib
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, convert, draw, open_model
from checkpoints import prompt_tokens
from reference import Reference, assert_close, compared, near_ties
from variants import VARIANTS, Variant, by_name, make_checkpoint

LENGTH = 64
GENERATED = 48


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: v.name)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Reference, Any]:
    """A variant's name, the reference, and the native model of its f32 bundle."""
    variant: Variant = request.param
    directory = tmp_path_factory.mktemp("variant")
    source = make_checkpoint(directory / "checkpoint", variant)
    bundle = convert(source, directory / "model.edgert", **F32)
    return variant.name, Reference.load(source), open_model(bundle)


def test_prefill_at_once(pair: tuple[str, Reference, Any], record_property: Callable[..., None]) -> None:
    name, reference, model = pair
    tokens = prompt_tokens(LENGTH, model.vocab_size)
    expected, margins, _ = reference.forward(tokens)
    positions = compared(f"{name}, prefill", LENGTH, near_ties(expected, margins), record_property)
    assert_close(model.logits(model.sequence(), tokens), expected, positions)


def test_step_by_step(pair: tuple[str, Reference, Any], record_property: Callable[..., None]) -> None:
    name, reference, model = pair
    tokens = prompt_tokens(LENGTH, model.vocab_size)
    expected, margins = reference.step_by_step(tokens)
    positions = compared(f"{name}, step by step", LENGTH, near_ties(expected, margins), record_property)
    sequence = model.sequence()
    actual = np.concatenate([model.logits(sequence, [token]) for token in tokens])
    assert_close(actual, expected, positions)


def test_greedy_continuation(pair: tuple[str, Reference, Any], record_property: Callable[..., None]) -> None:
    """The reference's greedy tokens; each is ours too, given those before it."""
    name, reference, model = pair
    tokens = prompt_tokens(16, model.vocab_size, seed=1)
    logits, margins, cache = reference.forward(tokens)
    rows, all_margins = [logits[-1]], [margins[-1]]
    for _ in range(GENERATED - 1):
        logits, margins, cache = reference.forward([int(rows[-1].argmax())], cache)
        rows.append(logits[0])
        all_margins.append(margins[0])
    expected = [int(row.argmax()) for row in rows]
    ties = near_ties(np.stack(rows), np.array(all_margins))
    positions = compared(f"{name}, greedy", GENERATED, ties, record_property)

    sequence = model.sequence()
    ours = [int(model.logits(sequence, tokens)[-1].argmax())]
    ours += [int(model.logits(sequence, [token])[-1].argmax()) for token in expected[:-1]]
    sequence.close()  # the model holds one sequence at a time where layers keep a state of fixed size
    assert [ours[i] for i in positions] == [expected[i] for i in positions]
    if len(positions) == GENERATED:
        assert greedy(model, tokens, GENERATED) == expected


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The native sampler at temperature 0."""
    from edgert import _native

    options = _native.SamplerOptions()
    options.temperature = 0.0
    sampler = _native.Sampler(options)
    sequence = model.sequence()
    tokens = [model.step([(sequence, prompt, sampler)])[0].token]
    while len(tokens) < count:
        tokens.append(model.step([(sequence, tokens[-1:], sampler)])[0].token)
    return tokens


# --- quality ------------------------------------------------------------------------------------------


@dataclass
class Quality:
    """A checkpoint, text for it, and how far a format may move its perplexity."""

    reference: Reference
    source: Path
    windows: list[list[int]]
    int8: float
    int4: float


def documentation() -> str:
    """Docstrings of the standard library: technical prose that is on every machine."""
    text = []
    for name in (
        "os.path",
        "json",
        "argparse",
        "textwrap",
        "pathlib",
        "random",
        "statistics",
        "shutil",
        "csv",
    ):
        module = importlib.import_module(name)
        text.append(inspect.getdoc(module) or "")
        for item, value in sorted(vars(module).items()):
            if not item.startswith("_") and (inspect.isroutine(value) or inspect.isclass(value)):
                text.append(f"{item}\n{inspect.getdoc(value) or ''}")
    return "\n\n".join(text)


def docs_moe(directory: Path) -> Quality:
    """15 000 tokens: with fewer, the chance that a rounding moves a token up or down is more than the bound."""
    from tokenizers import Tokenizer

    source = Path(os.environ["EDGERT_REFERENCE_DIR"]) / "models" / "docs-moe"
    tokens = Tokenizer.from_file(str(source / "tokenizer.json")).encode(documentation()).ids
    windows = [tokens[i : i + 256] for i in range(0, 60 * 256, 256)]
    return Quality(Reference.load(source), source, windows, int8=1e-3, int4=2e-2)


def random_model(directory: Path) -> Quality:
    """A random model on text that it generated itself; with no redundancy in it, it takes rounding harder."""
    import random

    source = make_checkpoint(directory / "checkpoint", by_name(VARIANTS, "qwen3_moe"))
    reference = Reference.load(source)
    windows = []
    for seed in range(8):
        rng = random.Random(seed)
        window = prompt_tokens(1, reference.model.config.vocab_size, seed)
        cache = None
        while len(window) < 128:
            logits, _, cache = reference.forward(window[-1:], cache)
            window.append(draw(logits[-1], rng))
        windows.append(window)
    return Quality(reference, source, windows, int8=5e-2, int4=4e-1)


SOURCES = {"random": random_model}
if "EDGERT_REFERENCE_DIR" in os.environ:
    SOURCES["docs-moe"] = docs_moe


@pytest.fixture(scope="module", params=SOURCES)
def quality(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quality:
    return SOURCES[request.param](tmp_path_factory.mktemp("quality"))


def perplexity(windows: list[list[int]], logits_of: Callable[[list[int]], np.ndarray]) -> float:
    total, count = 0.0, 0
    for window in windows:
        logits = logits_of(window).astype(np.float64)[:-1]
        highest = logits.max(-1)
        log_sum = highest + np.log(np.exp(logits - highest[:, None]).sum(-1))
        total += float((log_sum - logits[np.arange(len(window) - 1), window[1:]]).sum())
        count += len(window) - 1
    return math.exp(total / count)


def test_perplexity(quality: Quality, tmp_path: Path, record_property: Callable[..., None]) -> None:
    expected = perplexity(quality.windows, lambda window: quality.reference.forward(window)[0])
    formats = {
        "f32": (F32, 5e-5),
        "int8": (dict.fromkeys(F32, "int8"), quality.int8),
        "int4 experts": (F32 | {"expert_format": "int4"}, quality.int4),
    }
    errors = {}
    for name, (options, _) in formats.items():
        model = open_model(convert(quality.source, tmp_path / f"{name}.edgert", **options), threads=2)
        ours = perplexity(quality.windows, lambda window: model.logits(model.sequence(), window))  # noqa: B023
        errors[name] = ours / expected - 1
        record_property(f"perplexity, {name}", ours)
    too_far = {name: errors[name] for name, (_, bound) in formats.items() if not abs(errors[name]) <= bound}
    assert not too_far, f"perplexity {expected:.4f} in the reference; relative differences {errors}"


def test_near_ties_are_named_and_few(record_property: Callable[..., None]) -> None:
    logits = np.array([[0, 1, 2], [0, 2, 2], [0, 1, 2]], np.float32)
    ties = near_ties(logits, np.array([1.0, 1.0, 9e-6]))
    assert ties.tolist() == [1, 2]
    with pytest.warns(UserWarning, match=r"\[1, 2\]"):
        assert compared("case", 3, ties, record_property) == [0]
    with pytest.raises(AssertionError), pytest.warns(UserWarning, match="ties"):
        compared("case", 10, np.arange(5), record_property)
