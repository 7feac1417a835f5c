"""edgert adapter with what cannot be converted or fused: one line that names it, and nothing written or overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundles import contents
from peft_directories import PREFIX, Adapter, lora, shira
from shell import Shell, assert_fails

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


def of_another_shape() -> Adapter:
    made = lora()
    made.tensors[f"{Q}.lora_B.weight"] = made.tensors[f"{Q}.lora_B.weight"][:60]
    return made


def of_an_expert_too_many() -> Adapter:
    made = lora()
    made.tensors = {name.replace("experts.3.", "experts.8."): array for name, array in made.tensors.items()}
    return made


def with_an_element_twice() -> Adapter:
    made = shira()
    indices = made.tensors[f"{Q}.shira_indices"]
    indices[:, 7] = indices[:, 3]
    return made


def out_of_the_matrix() -> Adapter:
    made = shira()
    made.tensors[f"{Q}.shira_indices"][1, 7] = 72
    return made


WRONG: dict[str, tuple[Callable[[], Adapter], str]] = {
    "another shape": (of_another_shape, "wrong: layers.0.attention.q: B is of 60 numbers, the base's matrix is [64, 72]"),
    "an expert too many": (of_an_expert_too_many, "wrong: the base has no matrix 'layers.1.experts.8.up'"),
    "an element twice": (with_an_element_twice, "layers.0.attention.q: two values stand at ["),
    "an element outside": (out_of_the_matrix, "wrong: layers.0.attention.q: value 7 stands at ["),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_not_converted(
    edgert: Shell, tiny_bundle: Path, tmp_path: Path, case: str
) -> None:
    make, complaint = WRONG[case]
    made = make().write(tmp_path / "wrong")
    before = contents(tmp_path)
    done = edgert("adapter", "convert", made, tmp_path / "out.adapter", "--base", tiny_bundle)
    assert_fails(done, complaint)
    assert contents(tmp_path) == before


def test_a_directory_of_several_adapters_and_a_pickle(
    edgert: Shell, tiny_bundle: Path, tmp_path: Path
) -> None:
    for name in ("two", "one"):
        lora().write(tmp_path / "both" / name)
    show = ("adapter", "show", "--base", tiny_bundle)
    assert_fails(edgert(*show, tmp_path / "both"), "there is no adapter_config.json, but in one, two")
    (tmp_path / "both" / "one" / "adapter_model.safetensors").rename(
        tmp_path / "both" / "one" / "adapter_model.bin"
    )
    assert_fails(
        edgert(*show, tmp_path / "both" / "one"), "missing; adapter_model.bin is a pickle and never read"
    )


def test_what_cannot_be_fused(edgert: Shell, tiny_bundle: Path, tmp_path: Path) -> None:
    one = lora().write(tmp_path / "one")
    file, out = tmp_path / "file.adapter", tmp_path / "out.adapter"
    assert edgert("adapter", "convert", one, file, "--base", tiny_bundle).returncode == 0
    shutil.copy(file, tmp_path / "kept.adapter")
    before = contents(tmp_path)
    for scale in ("nan", "-inf"):
        assert_fails(
            edgert("adapter", "fuse", f"{file}:{scale}", "-o", out, "--base", tiny_bundle),
            f"file.adapter: scale: found {scale}, allowed is a finite number",
        )
    assert_fails(
        edgert("adapter", "fuse", f"{file}:1e39", one, "-o", out, "--base", tiny_bundle),
        "fused at these scales, its numbers are not finite",
    )
    assert_fails(
        edgert("adapter", "fuse", file, one, "-o", file, "--base", tiny_bundle),
        "and the output too; give another",
    )
    assert contents(tmp_path) == before


def test_ranks_beyond_what_a_file_may_have() -> None:
    from edgert.converters.adapter_part import Part
    from edgert.converters.fuse import fuse
    from edgert.errors import UnsupportedError

    a, b = np.zeros((2100, 16), np.float32), np.zeros((16, 2100), np.float32)
    parts = [Part("layers.0.attention.q", a, b)]
    with pytest.raises(UnsupportedError, match="its rank is 4200; at most 4096"):
        fuse([(parts, 1.0), (parts, 0.5)])


def test_files_that_were_made_by_others(edgert: Shell, tiny_bundle: Path, tmp_path: Path) -> None:
    """What they hold is checked before it is shown or fused."""
    from test_hostile_adapters import rewrite

    good = tmp_path / "good.adapter"
    assert (
        edgert("adapter", "convert", lora().write(tmp_path / "one"), good, "--base", tiny_bundle).returncode
        == 0
    )
    a = "layers.0.attention.k.lora_A"
    changes: dict[str, tuple[Callable[[dict[str, np.ndarray]], None], str]] = {
        "narrow": (lambda t: t.update({a: t[a][:, :60].copy()}), "layers.0.attention.k: A is of 60 numbers"),
        "holed": (lambda t: t[a].__setitem__((0, 0), np.nan), "layers.0.attention.k: holds a number that is not finite"),
        "strange": (lambda t: t.update({"layers.0.nowhere.gain": np.ones(3, np.float32)}), "no matrix 'layers.0.nowhere'"),
    }  # fmt: skip
    for name, (change, complaint) in changes.items():
        bad = Path(shutil.copy(good, tmp_path / f"{name}.adapter"))
        rewrite(bad, lambda _, tensors, change=change: change(tensors))  # type: ignore[misc]
        for command in (("show", bad), ("fuse", good, bad, "-o", tmp_path / "out.adapter")):
            done = edgert("adapter", *command, "--base", tiny_bundle)
            assert_fails(done, complaint)
            assert str(bad) in done.stderr
    assert not (tmp_path / "out.adapter").exists()
