"""Faults while running: a bundle that is damaged, cut or replaced under a model that has it open.

Every read of an expert is checked before the expert counts; a request that cannot have its expert gets a typed
error, and every other one the bits that it always gets.
"""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import (
    EXPERTS,
    LONG,
    answer,
    bits,
    extents,
    first_tensor,
    flip_bit,
    minimum_bytes,
    open_model,
    use,
)


def paged(bundle: Path) -> Any:
    return open_model(bundle, memory=minimum_bytes(bundle))


def test_expert_file_truncated_while_open(copy: Path, bystander: tuple[Any, np.ndarray]) -> None:
    from edgert import errors

    model = paged(copy)
    expected = answer(model)
    whole = (copy / EXPERTS).read_bytes()
    os.truncate(copy / EXPERTS, len(whole) // 3)
    with pytest.raises(errors.EdgertError, match=EXPERTS):
        answer(model)
    assert np.array_equal(answer(bystander[0]), bystander[1])
    (copy / EXPERTS).write_bytes(whole)
    assert np.array_equal(answer(model), expected), "the model should serve again once its file is whole"


def test_bundle_replaced_while_open(copy: Path, other_bundle: Path) -> None:
    """Files that are open stay: the old bundle is served to its end, never a mixture."""
    model = paged(copy)
    expected = answer(model)
    for name in ("manifest.json", "dense.bin", EXPERTS):
        shutil.copy(other_bundle / name, copy / (name + ".new"))
        os.replace(copy / (name + ".new"), copy / name)
    assert np.array_equal(answer(model), expected)
    shutil.rmtree(copy)
    assert np.array_equal(answer(model), expected)


def test_expert_overwritten_in_place(copy: Path, other_bundle: Path) -> None:
    """Another bundle's experts written into the open file are refused, not computed with."""
    from edgert import errors

    model = paged(copy)
    expected, whole = answer(model), (copy / EXPERTS).read_bytes()
    with (copy / EXPERTS).open("r+b") as file:
        file.write((other_bundle / EXPERTS).read_bytes())
    with pytest.raises(errors.CorruptError, match=EXPERTS):
        answer(model)
    with (copy / EXPERTS).open("r+b") as file:
        file.write(whole)
    assert np.array_equal(answer(model), expected)


@pytest.mark.parametrize("where", ("first", "middle", "last"))
def test_bit_flipped_on_disk_while_open(copy: Path, where: str) -> None:
    """Only requests that need the damaged expert fail; the others get the same bits as ever."""
    from edgert import errors

    prompts = [[token] for token in range(3, 60)]
    sound = [answer(paged(copy), prompt) for prompt in prompts]
    offset, length = extents(copy)[5]
    flip_bit(copy / EXPERTS, offset + {"first": 0, "middle": length // 2, "last": length - 1}[where], 6)
    model = paged(copy)
    failed = 0
    for prompt, expected in zip(prompts, sound, strict=True):
        try:
            assert np.array_equal(answer(model, prompt), expected)
        except errors.CorruptError as error:
            failed += 1
            assert EXPERTS in str(error) and str(offset) in str(error)
    assert 0 < failed < len(prompts)


def test_a_failed_step_leaves_sequences_where_they_were(copy: Path) -> None:
    """It can go on from there once the file is sound."""
    from edgert import errors

    model = paged(copy)
    expected = answer(model)
    sequence = model.sequence()
    model.logits(sequence, LONG[:50])
    for offset, _ in extents(copy):
        flip_bit(copy / EXPERTS, offset)
    with pytest.raises(errors.CorruptError):
        model.logits(sequence, LONG[50:])
    length = sequence.length
    for offset, _ in extents(copy):
        flip_bit(copy / EXPERTS, offset)
    assert 50 <= length < len(LONG)
    assert np.array_equal(bits(model.logits(sequence, LONG[length:])), expected[length:])


def test_a_failed_request_does_not_harm_its_batch(copy: Path) -> None:
    """A row that needs a damaged expert fails the step; the others, tried again without it, are as ever."""
    from edgert import errors

    prompts = [[token] for token in range(3, 60)]
    sound = [answer(paged(copy), prompt) for prompt in prompts]
    flip_bit(copy / EXPERTS, extents(copy)[5][0])
    model = open_model(copy, memory=minimum_bytes(copy, parallel=2), parallel=2)

    def fails(prompt: list[int]) -> bool:
        try:
            answer(model, prompt)
        except errors.CorruptError:
            return True
        return False

    bad = next(i for i, prompt in enumerate(prompts) if fails(prompt))
    good = next(i for i, prompt in enumerate(prompts) if not fails(prompt))
    first, second = model.sequence(), model.sequence()
    with pytest.raises(errors.CorruptError):
        model.step([(first, prompts[good], None), (second, prompts[bad], None)])
    assert (first.length, second.length) == (0, 0)
    assert np.array_equal(bits(model.logits(first, prompts[good])), sound[good])


def test_no_file_descriptors_left(copy: Path) -> None:
    """Twenty bad loads hold no file open."""
    from edgert import errors

    flip_bit(copy / "dense.bin", first_tensor(copy))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(errors.EdgertError):
            use(copy)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_no_file_descriptors_to_be_had(copy: Path) -> None:
    """A process that may open no more files says so, and loads once it may."""
    from edgert import errors

    use(copy)  # what Python imports lazily is there
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    held = [os.open(copy, os.O_RDONLY)]
    while held[-1] <= highest:  # fill the gaps
        held.append(os.open(copy, os.O_RDONLY))
    try:
        for room in (0, 1):
            resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1] + 1 + room, limits[1]))
            with pytest.raises(errors.StorageError, match="open"):
                use(copy)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in held:
            os.close(fd)
    use(copy)
