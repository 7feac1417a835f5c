"""Sparse adapters as patches of packed codes: what they compute, when they are taken, and what the file and the reports say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import bits, convert
from checkpoints import TINY_CONFIG, qwen3_moe_shapes, random_weights, tiny_checkpoint, write_weights
from peft_directories import PREFIX, base_weights, loaded, lora, shira
from peft_directories import faithful_shira as faithful
from shell import Shell, assert_fails

import edgert
from edgert import _native
from edgert.errors import BudgetError, CorruptError, InvalidArgumentError, UnsupportedError

TOKENS = list(range(3, 33))
INTEGERS: dict[str, Any] = {"dense_format": "int8", "expert_format": "int4"}


@pytest.fixture
def shell(edgert: Shell) -> Shell:
    return edgert


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return convert(checkpoint, checkpoint.parent / "plain.edgert", **INTEGERS)


@pytest.fixture(scope="module")
def keeping(checkpoint: Path) -> Path:
    """A bundle with remainders."""
    return convert(checkpoint, checkpoint.parent / "keeping.edgert", remainders=True, **INTEGERS)


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faithful().write(tmp_path_factory.mktemp("peft") / "shira")


def test_a_patched_model_is_the_changed_model_quantised(keeping: Path, tmp_path: Path) -> None:
    """As near to the changed floats, quantised, as the overlay is; neither is another model."""
    made = faithful(size=0.6)
    merged = convert(made.merged(tmp_path / "merged"), tmp_path / "merged.edgert", **INTEGERS)
    with edgert.load(merged, memory="64MiB", threads=1) as model:
        expected = model.logits(TOKENS)
    with edgert.load(keeping, memory="64MiB", threads=1) as model:
        plain = model.logits(TOKENS)
        model.load_adapter(made.write(tmp_path / "peft"), "a")
        model.set_adapter("a")
        (info,) = model.adapters()
        assert (info.mode, info.why) == ("patch", "")
        patched = model.logits(TOKENS)
        np.testing.assert_array_equal(bits(model.logits(TOKENS)), bits(patched))
        beside = model.logits(TOKENS, adapter="a")
        model.disable_adapters()
        np.testing.assert_array_equal(bits(model.logits(TOKENS)), bits(plain))
        assert model.native.check_weights() > 20

    def apart(logits: Any) -> float:
        return float(np.linalg.norm(logits - expected) / np.linalg.norm(plain - expected))

    assert 0 < apart(patched) < 0.7 and apart(patched) < 1.5 * apart(beside)


def test_patches_leave_the_rows_of_added_tokens_beside(keeping: Path, tmp_path: Path) -> None:
    """They have no codes: sparse values of a head that has some are added, and those of other matrices patched."""
    made, rng = faithful(), np.random.default_rng(0)
    head = base_weights()["lm_head.weight"]
    new = (rng.standard_normal((2, head.shape[1])) * 0.3).astype(np.float32)
    rows, cols = np.array([5, len(head), len(head) + 1, 9]), np.array([1, 2, 3, 4])
    made.tensors |= {
        f"{PREFIX}lm_head.base_layer.weight": np.vstack([head, new]),
        f"{PREFIX}lm_head.shira_weight": np.full(4, 0.5, np.float32),
        f"{PREFIX}lm_head.shira_indices": np.stack([rows, cols]).astype(np.int32),
    }
    with loaded(keeping, {"a": made.write(tmp_path / "a"), "b": faithful().write(tmp_path / "b")}) as model:
        tokens = [*TOKENS, model.vocab_size + 1]
        plain = model.logits(TOKENS)
        model.set_adapter("a")
        assert model.adapters()[0].mode == "patch"
        patched, beside = model.logits(tokens), model.logits(tokens, adapter="a")
        assert patched.shape == beside.shape == (len(tokens), model.vocab_size + 2)
        model.set_adapter("b")
        same = np.setdiff1d(np.arange(model.vocab_size), [5, 9])  # what the head's values leave alone
        np.testing.assert_array_equal(bits(model.logits(TOKENS)[:, same]), bits(patched[:-1, same]))
        model.disable_adapters()
        np.testing.assert_array_equal(bits(model.logits(TOKENS)), bits(plain))
        assert model.native.check_weights() > 20
    assert np.linalg.norm(patched - beside) < 0.5 * np.linalg.norm(beside[:-1, :-2] - plain)


@pytest.mark.parametrize(("asked", "left"), [("overlay", "overlay"), ("patch", "patch"), ("auto", "patch")])
def test_what_is_left_when_one_is_unloaded_runs_as_was_asked(
    keeping: Path, peft: Path, tmp_path: Path, asked: Any, left: str
) -> None:
    other = faithful(1).write(tmp_path / "other")
    with loaded(keeping, {"a": peft, "b": other}) as model:
        model.set_adapter("b", mode=asked)
        expected = bits(model.logits(TOKENS))
        model.set_adapter(["a", "b"], mode=asked)
        model.unload_adapter("a")
        assert [info.mode for info in model.adapters()] == [left]
        np.testing.assert_array_equal(bits(model.logits(TOKENS)), expected)


def test_remainders_of_a_checkpoint_do_what_the_bundles_own_do(
    bundle: Path, keeping: Path, checkpoint: Path, peft: Path, tmp_path: Path, shell: Shell
) -> None:
    file = tmp_path / "a.adapter"
    done = shell("adapter", "convert", peft, file, "--base", bundle, "--weights", checkpoint, "--json")
    report = {row["kind"]: row for row in json.loads(done.stdout)["patches"]}
    assert set(report) == {f"attention.{x}" for x in "qkvo"} | {
        f"experts.{x}" for x in ("gate", "up", "down")
    }
    assert all(row["patched"] == row["matrices"] and 0 < row["fidelity"] < 0.5 for row in report.values())
    outputs = []
    for base, path in ((bundle, file), (keeping, peft)):
        with edgert.load(base, memory="64MiB", threads=1) as model:
            model.load_adapter(path, "a")
            model.set_adapter("a", mode="patch")
            outputs.append(model.logits(TOKENS))
    scale = np.abs(outputs[0]).max()
    assert np.abs(outputs[0] - outputs[1]).max() < 0.1 * scale  # remainders are rounded
    with edgert.load(bundle, memory="64MiB", threads=1) as model:
        model.load_adapter(peft, "a")
        model.set_adapter("a")
        (info,) = model.adapters()
        assert info.mode == "overlay" and "remainders" in info.why
        with pytest.raises(InvalidArgumentError, match="--weights"):
            model.set_adapter("a", mode="patch")


def test_remainders_are_of_one_bundle(
    bundle: Path, keeping: Path, checkpoint: Path, peft: Path, tmp_path: Path
) -> None:
    """In another bundle of the checkpoint the adapter runs beside the weights."""
    from edgert.adapter_sources import read_adapter
    from edgert.bundle import Bundle
    from edgert.converters.adapter_file import write_adapter

    opened = Bundle.open(keeping)
    read = read_adapter(peft, opened.path, opened.manifest)
    kind, parts = read.kind, read.parts
    write_adapter(tmp_path / "a.adapter", kind, parts, opened.manifest)
    for base, mode in (
        (keeping, "patch"),
        (convert(checkpoint, tmp_path / "o.edgert", expert_format="int3"), "overlay"),
    ):
        with edgert.load(base, memory="64MiB", threads=1) as model:
            model.load_adapter(tmp_path / "a.adapter", "a")
            model.set_adapter("a")
            assert model.adapters()[0].mode == mode


def test_when_patches_are_taken(keeping: Path, peft: Path, tmp_path: Path) -> None:
    with edgert.load(keeping, memory="64MiB", threads=1) as model:
        model.load_adapter(peft, "a")
        model.load_adapter(faithful(1).write(tmp_path / "b"), "b")
        model.load_adapter(faithful(2, size=1e-3).write(tmp_path / "faint"), "faint")
        model.load_adapter(faithful(3, size=3).write(tmp_path / "loud"), "loud")
        model.load_adapter(lora().write(tmp_path / "lora"), "lora")

        def mode_of(choice: Any, mode: Any = "auto") -> tuple[str, str]:
            model.set_adapter(choice, mode)
            (info,) = [info for info in model.adapters() if info.scale][:1]
            return info.mode, info.why

        assert mode_of("a") == ("patch", "")
        assert mode_of({"a": 0.5}) == ("overlay", "its scale was changed")
        assert mode_of({"a": 1}) == ("patch", "")  # which is compiled
        assert mode_of({"a": 0.5}, "patch") == ("patch", "")
        assert mode_of({"a": 0.5, "b": 1}) == ("patch", "")
        assert mode_of("b", "overlay") == ("overlay", "asked for")
        assert mode_of("faint") == ("patch", "")
        assert "to clamped codes" in mode_of("loud")[1]
        assert mode_of("lora") == ("overlay", "")
        assert mode_of({"lora": 1, "a": 1})[0] == "patch"  # a's; lora has no sparse values
        assert [info.mode for info in model.adapters()] == ["patch", "", "", "", "overlay"]
        with pytest.raises(InvalidArgumentError, match="mode: found 'fast'"):
            model.set_adapter("a", mode="fast")  # type: ignore[arg-type]


def test_what_begins_under_a_set_keeps_it(keeping: Path, peft: Path, tmp_path: Path) -> None:
    with edgert.load(keeping, memory="64MiB", threads=1) as model:
        model.load_adapter(peft, "a")
        model.load_adapter(faithful(1).write(tmp_path / "b"), "b")
        model.set_adapter("a")
        expected = model.generate(TOKENS, max_tokens=12, temperature=0, ignore_eos=True).tokens
        stream = model.stream(TOKENS, max_tokens=12, temperature=0, ignore_eos=True)
        begun = [next(stream).token for _ in range(5)]
        model.set_adapter("b")
        other = model.generate(TOKENS, max_tokens=12, temperature=0, ignore_eos=True).tokens
        model.unload_adapter("a")
        begun += [piece.token for piece in stream]
        assert begun[: len(expected)] == list(expected)
        assert other == model.generate(TOKENS, max_tokens=12, temperature=0, ignore_eos=True).tokens
        model.disable_adapters()
        assert model.native.check_weights() > 20


def test_patches_give_their_memory_back(keeping: Path, peft: Path) -> None:
    with edgert.load(keeping, memory="64MiB", threads=1) as model:
        model.logits(TOKENS)
        used = model.stats()["used_bytes"]
        model.load_adapter(peft, "a")
        model.set_adapter("a")
        model.logits(TOKENS)
        assert model.stats()["used_bytes"] > used
        model.unload_adapter("a")
        left = model.stats()["used_bytes"] - used
        assert left <= 1 << 20  # the scratch of adapters
        assert model.native.check_weights() > 20


def test_without_memory_for_patches_the_overlay_runs(keeping: Path, peft: Path) -> None:
    with edgert.load(keeping, memory="64MiB", threads=1, chunk=1) as model:
        model.load_adapter(peft, "a")
        model.set_adapter("a", mode="overlay")
        expected = model.logits(TOKENS)
        used = model.stats()["used_bytes"]
    with edgert.load(keeping, memory=used, threads=1, chunk=1) as model:
        model.load_adapter(peft, "a")
        model.set_adapter("a")
        (info,) = model.adapters()
        assert info.mode == "overlay" and "budget" in info.why
        np.testing.assert_array_equal(bits(model.logits(TOKENS)), bits(expected))
        with pytest.raises(BudgetError):
            model.set_adapter("a", mode="patch")


def test_fused_adapters_keep_their_remainders(
    keeping: Path, peft: Path, tmp_path: Path, shell: Shell
) -> None:
    two = faithful(1).write(tmp_path / "two")
    shell("adapter", "fuse", f"{peft}:1", f"{two}:0.5", "-o", tmp_path / "both.adapter", "--base", keeping)
    with edgert.load(keeping, memory="64MiB", threads=1) as model:
        model.load_adapter(tmp_path / "both.adapter", "both")
        model.load_adapter(peft, "one")
        model.load_adapter(two, "two")
        model.set_adapter("both", mode="patch")
        fused = model.logits(TOKENS)
        model.set_adapter({"one": 1, "two": 0.5}, mode="patch")
        np.testing.assert_allclose(fused, model.logits(TOKENS), atol=1e-3 * np.abs(fused).max())


def test_weights_that_the_base_was_not_made_of_are_refused(
    bundle: Path, peft: Path, tmp_path: Path, shell: Shell
) -> None:
    other = tiny_checkpoint(tmp_path / "other")
    write_weights(other, random_weights(qwen3_moe_shapes(TINY_CONFIG), 99))
    done = shell("adapter", "convert", peft, tmp_path / "a.adapter", "--base", bundle, "--weights", other)
    assert_fails(done, "are not those that the base was made of")


def test_damaged_remainders_are_found(keeping: Path, peft: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy.edgert"
    shutil.copytree(keeping, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    name = manifest["files"][manifest["remainders"]["file"]]["name"]
    offset = next(row[1] for row in manifest["remainders"]["tensors"] if row[0] == "layers.0.attention.q")
    raw = bytearray((copy / name).read_bytes())
    raw[offset] ^= 1
    (copy / name).write_bytes(raw)
    with (
        edgert.load(copy, memory="64MiB", threads=1) as model,
        pytest.raises(CorruptError, match="remainders of"),
    ):
        model.load_adapter(peft, "a")


def test_a_patch_on_paged_experts_is_the_same_as_on_resident_ones(keeping: Path, peft: Path) -> None:
    from edgert.bundle import Bundle
    from edgert.footprint import memory_needs

    least = memory_needs(Bundle.open(keeping))["minimum_bytes"]
    outputs: list[list[Any]] = []
    for memory in (64 << 20, least + (3 << 20)):
        with edgert.load(keeping, memory=memory, threads=2, adapter_memory="3MiB") as model:
            model.load_adapter(peft, "a")
            outputs.append([])
            for _ in range(2):
                model.set_adapter("a", mode="patch")
                outputs[-1].append(bits(model.logits(TOKENS)))
                model.set_adapter(None)
                outputs[-1].append(bits(model.logits(TOKENS)))
            assert model.native.check_weights() > 10
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_matrix_patch_refuses_what_does_not_fit() -> None:
    packed = bytearray(_native.packed_bytes("int4", 16, 64))
    index, value = np.zeros(1, np.int32).data, np.ones(1, np.float32).data
    outside = np.full(1, 16, np.int32).data
    with pytest.raises(InvalidArgumentError, match="outside the matrix"):
        _native.matrix_patch("int4", packed, (16, 64), outside, index, value, None)
    with pytest.raises(InvalidArgumentError, match="do not fit together"):
        _native.matrix_patch("int4", packed, (16, 65), index, index, value[:0], None)
    with pytest.raises(UnsupportedError, match="not evenly spaced"):
        _native.remainders("nl4", packed, (16, 64), index, index, value)


def test_the_shira_of_peft_itself_runs_beside_an_f32_base(tiny_f32_bundle: Path, tmp_path: Path) -> None:
    with edgert.load(tiny_f32_bundle, memory="64MiB", threads=1) as model:
        model.load_adapter(shira().write(tmp_path / "a"), "a")
        model.set_adapter("a")
        assert model.adapters()[0].mode == "overlay"
