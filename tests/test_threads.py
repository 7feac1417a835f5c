"""What Python threads may do to one model at once: anything, without a crash and without a wrong answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import MIB, bits, minimum_bytes, open_model
from checkpoints import TINY_CONFIG, prompt_tokens

PROMPT = prompt_tokens(100, TINY_CONFIG["vocab_size"])


def answer(model: Any) -> np.ndarray:
    return bits(model.logits(model.sequence(), PROMPT))


def together(*bodies: Callable[[], Any]) -> None:
    threads = [threading.Thread(target=body) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_models_of_one_runtime_step_side_by_side(tiny_bundle: Path) -> None:
    from edgert import _native

    runtime = _native.Runtime(256 * MIB, threads=2)
    models = [_native.Model(runtime, str(tiny_bundle)) for _ in range(2)]
    expected = answer(models[0])
    answers: list[np.ndarray] = []
    together(*(lambda model=model: answers.extend(answer(model) for _ in range(5)) for model in models))
    assert len(answers) == 10
    assert all(np.array_equal(found, expected) for found in answers)


def test_one_sequence_in_many_threads(tiny_bundle: Path) -> None:
    """Refused or done, whatever meets a running step; then the model answers as ever."""
    from edgert import _native, errors

    model = open_model(tiny_bundle, memory=minimum_bytes(tiny_bundle, chunk=8), chunk=8)
    expected = answer(model)
    sequence, options = model.sequence(), _native.SamplerOptions()
    options.repetition_penalty = 2.0
    sampler = _native.Sampler(options)

    def repeatedly(act: Callable[[], Any]) -> Callable[[], None]:
        def body() -> None:
            for _ in range(20):
                with contextlib.suppress(errors.EdgertError):
                    act()

        return body

    together(
        repeatedly(lambda: model.step([(sequence, PROMPT, sampler)])),
        repeatedly(lambda: model.logits(sequence, PROMPT[:10])),
        repeatedly(lambda: (model.statistics(), model.store(), sequence.length)),
        repeatedly(lambda: sampler.accept(PROMPT)),
        repeatedly(model.cancel),
        repeatedly(lambda: sequence.rewind(0)),
        repeatedly(sequence.close),
    )
    sequence.close()
    with contextlib.suppress(errors.CancelledError):  # one that came too late meets the next step
        answer(model)
    assert np.array_equal(answer(model), expected)


def test_a_cancelled_step_can_be_run_again(tiny_bundle: Path) -> None:
    from edgert import errors

    model = open_model(tiny_bundle, chunk=8)
    expected, sequence = answer(model), model.sequence()
    model.cancel()
    with pytest.raises(errors.CancelledError):
        model.logits(sequence, PROMPT)
    assert sequence.length == 0
    assert np.array_equal(bits(model.logits(sequence, PROMPT)), expected)


def test_a_sequence_of_another_model_is_refused(tiny_bundle: Path) -> None:
    from edgert import errors

    first, second = open_model(tiny_bundle), open_model(tiny_bundle)
    with pytest.raises(errors.InvalidArgumentError, match="another model"):
        second.logits(first.sequence(), PROMPT)


def test_parts_may_outlive_the_whole(tiny_bundle: Path) -> None:
    model = open_model(tiny_bundle)
    sequence = model.sequence()
    model.logits(sequence, PROMPT)
    del model
    sequence.rewind(3)
    assert sequence.length == 3
    sequence.close()
