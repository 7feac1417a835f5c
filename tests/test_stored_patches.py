"""Patches in the adapter's file: read where they are wanted, in place of all else; the same as those compiled of its numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import bits, convert, flip_bit
from checkpoints import tiny_checkpoint
from peft_directories import faithful_shira, lora
from shell import Shell

import edgert
from edgert import _native
from edgert.adapter_sources import read_adapter
from edgert.bundle import Bundle
from edgert.converters.adapter_file import write_adapter
from edgert.converters.safetensors import read_header_and_metadata
from edgert.converters.stored_patches import pack_patches
from edgert.errors import CorruptError, NotFoundError
from edgert.footprint import memory_needs

TOKENS = list(range(3, 33))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With remainders, so that PEFT directories are compiled to patches too."""
    place = tmp_path_factory.mktemp("base")
    checkpoint = tiny_checkpoint(place / "checkpoint")
    return convert(checkpoint, place / "b.edgert", remainders=True, dense_format="int8", expert_format="int4")


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faithful_shira().write(tmp_path_factory.mktemp("peft") / "shira")


def converted(peft: Path, file: Path, bundle: Path) -> Path:
    opened = Bundle.open(bundle)
    read = read_adapter(peft, opened.path, opened.manifest)
    kind, parts = read.kind, read.parts
    patches = pack_patches(parts, opened.path, opened.manifest)
    assert patches is not None
    write_adapter(file, kind, parts, opened.manifest, patches=patches)
    return file


@pytest.fixture
def file(peft: Path, bundle: Path, tmp_path: Path) -> Path:
    return converted(peft, tmp_path / "a.adapter", bundle)


def least(bundle: Path) -> int:
    return int(memory_needs(Bundle.open(bundle))["minimum_bytes"])


def stored_of(file: Path, target: str) -> tuple[int, int]:
    """Where a patch begins in a file, and how many bytes it has."""
    infos = {info.name: info for info in read_header_and_metadata(file)[0]}
    info = infos[f"{target}.patch"]
    return info.begin, info.end - info.begin


def test_they_are_the_compiled_ones_and_nothing_else_is_read(bundle: Path, peft: Path, file: Path) -> None:
    """With experts in memory and in storage, where no memory was kept for adapters."""
    with edgert.load(bundle, memory="64MiB", threads=2) as model:
        model.load_adapter(peft, "a")
        model.set_adapter("a", mode="patch")
        expected, counts = bits(model.logits(TOKENS)), model.adapters()[0].patch_counts
    for memory in (64 << 20, least(bundle) + (64 << 10)):
        with edgert.load(bundle, memory=memory, threads=2) as model:
            assert model.resident == (memory == 64 << 20)
            plain = bits(model.logits(TOKENS))
            model.load_adapter(file, "a")
            for _ in range(2):
                model.set_adapter("a")
                (info,) = model.adapters()
                assert (info.mode, info.resident, info.why) == ("patch", True, "")
                assert info.patch_counts["values"] >= counts["values"]  # of all, not of what has run so far
                assert model.stats()["adapter_bytes"] == 0
                np.testing.assert_array_equal(bits(model.logits(TOKENS)), expected)
                model.set_adapter(None)
                np.testing.assert_array_equal(bits(model.logits(TOKENS)), plain)
            assert model.native.check_weights() > 5


def test_sequences_of_the_file_and_of_its_numbers_have_one_fingerprint(
    bundle: Path, peft: Path, file: Path
) -> None:
    found = []
    for path in (peft, file):
        with edgert.load(bundle, memory="64MiB", threads=1) as model:
            model.load_adapter(path, "a")
            model.set_adapter("a", mode="patch")
            found.append(model.session().sequence.fingerprint)
    assert found[0] == found[1] != 0


def test_what_the_file_has_no_patches_of_is_made_of_its_numbers(
    bundle: Path, peft: Path, file: Path, tmp_path: Path
) -> None:
    """Other scales, several together, and what a call names."""
    outputs: list[list[Any]] = []
    for one in (peft, file):
        with edgert.load(bundle, memory="64MiB", threads=1) as model:
            model.load_adapter(one, "a")
            model.load_adapter(lora().write(tmp_path / f"lora of {one.name}"), "lora")
            outputs.append([bits(model.logits(TOKENS, adapter="a"))])
            for choice in ({"a": 0.5}, {"a": 1, "lora": 1}, {"a": 1}, None):
                model.set_adapter(choice, "patch" if choice else "auto")
                outputs[-1].append(bits(model.logits(TOKENS)))
            model.native.check_weights()
    for left, right in zip(*outputs, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("resident", [True, False])
def test_switches_unloads_page_ins_and_sets_in_any_order_lose_no_byte(
    bundle: Path, file: Path, tmp_path: Path, resident: bool
) -> None:
    two = converted(faithful_shira(1).write(tmp_path / "two"), tmp_path / "b.adapter", bundle)
    files = {"a": file, "b": two}
    choices: list[Any] = [None, "a", "b", {"a": 0.5}, {"a": 1, "b": 1}]
    fresh = []
    for choice in choices:
        with edgert.load(bundle, memory="64MiB", threads=1) as model:
            for name, path in files.items():
                model.load_adapter(path, name)
            model.set_adapter(choice, "patch" if choice else "auto")
            fresh.append(bits(model.logits(TOKENS)))
    chance = random.Random(4)
    options: dict[str, Any] = {} if resident else {"adapter_memory": "1MiB"}
    memory = 64 << 20 if resident else least(bundle) + (1 << 20) + (96 << 10)
    with edgert.load(bundle, memory=memory, threads=2, **options) as model:
        assert model.resident == resident
        for name, path in files.items():
            model.load_adapter(path, name)
        for _ in range(80):
            at = chance.randrange(len(choices))
            model.set_adapter(choices[at], "patch" if choices[at] else "auto")
            match chance.randrange(6):
                case 0:
                    model.disable_adapters()
                    np.testing.assert_array_equal(bits(model.logits(TOKENS)), fresh[0])
                    model.enable_adapters()
                case 1:
                    name = chance.choice("ab")
                    model.unload_adapter(name)
                    model.load_adapter(files[name], name)
                    continue
                case 2:
                    continue
            np.testing.assert_array_equal(bits(model.logits(TOKENS)), fresh[at])
        model.set_adapter(None)
        assert model.native.check_weights() > 5
        np.testing.assert_array_equal(bits(model.logits(TOKENS)), fresh[0])


def test_in_another_bundle_they_are_left_alone(bundle: Path, file: Path, tmp_path: Path) -> None:
    other = convert(
        bundle.parent / "checkpoint", tmp_path / "o.edgert", dense_format="int8", expert_format="int3"
    )
    with edgert.load(other, memory="64MiB", threads=1) as model:
        model.load_adapter(file, "a")
        model.set_adapter("a")
        assert model.adapters()[0].mode == "overlay"


def test_convert_and_fuse_write_them(bundle: Path, peft: Path, tmp_path: Path, edgert: Shell) -> None:
    """Of what patches carry whole; a file of anything else has none, and is of the version that older readers know."""

    def names(file: Path) -> tuple[int, bool]:
        infos, metadata = read_header_and_metadata(file)
        version = json.loads(metadata["edgert.adapter"])["version"]
        return version, any(info.name.endswith(".patch") for info in infos)

    edgert("adapter", "convert", peft, tmp_path / "a.adapter", "--base", bundle)
    edgert("adapter", "fuse", f"{peft}:0.5", "-o", tmp_path / "half.adapter", "--base", bundle)
    edgert("adapter", "convert", lora().write(tmp_path / "l"), tmp_path / "l.adapter", "--base", bundle)
    shown = edgert("adapter", "show", tmp_path / "a.adapter", "--base", bundle).stdout
    assert "The file has the patches, " in shown
    assert "The file has" not in edgert("adapter", "show", tmp_path / "l.adapter", "--base", bundle).stdout
    assert names(tmp_path / "a.adapter") == names(tmp_path / "half.adapter") == (3, True)
    assert names(tmp_path / "l.adapter") == (2, False)


# --- damage -------------------------------------------------------------------------------------------------------------


def test_a_damaged_patch_of_a_dense_matrix_leaves_all_as_it_was(bundle: Path, file: Path) -> None:
    offset, size = stored_of(file, "layers.1.attention.q")
    with edgert.load(bundle, memory="64MiB", threads=1) as model:
        model.load_adapter(file, "a")
        plain = bits(model.logits(TOKENS))
        flip_bit(file, offset + size - 9)
        with pytest.raises(
            CorruptError, match=f"a.adapter: patch of layers.1.attention.q at offset {offset}: checksum"
        ):
            model.set_adapter("a")
        assert model.adapters()[0].mode == ""
        np.testing.assert_array_equal(bits(model.logits(TOKENS)), plain)
        flip_bit(file, offset + size - 9)
        model.set_adapter("a")
        assert (bits(model.logits(TOKENS)) != plain).any()
        model.set_adapter(None)
        assert model.native.check_weights() > 5


@pytest.mark.parametrize("resident", [True, False])
def test_a_damaged_patch_of_an_expert_stops_the_step_and_no_other(
    bundle: Path, file: Path, resident: bool
) -> None:
    offset, size = stored_of(file, "layers.2.experts.3.up")
    memory = 64 << 20 if resident else least(bundle) + (64 << 10)
    with edgert.load(bundle, memory=memory, threads=2) as model:
        plain = bits(model.logits(TOKENS))
        model.load_adapter(file, "a")
        model.set_adapter("a")
        expected = bits(model.logits(TOKENS))
        model.set_adapter(None)
        model.unload_adapter("a")
        flip_bit(file, offset + size - 9)
        model.load_adapter(file, "a")
        model.set_adapter("a")
        for _ in range(2):
            with pytest.raises(CorruptError, match="patch of layers.2.experts.3.up at offset"):
                model.logits(TOKENS)
        model.set_adapter(None)
        np.testing.assert_array_equal(bits(model.logits(TOKENS)), plain)
        flip_bit(file, offset + size - 9)
        model.set_adapter("a")
        np.testing.assert_array_equal(bits(model.logits(TOKENS)), expected)
        model.set_adapter(None)
        assert model.native.check_weights() > 5


def test_a_file_that_is_overwritten_while_its_patches_are_on(
    bundle: Path, file: Path, peft: Path, tmp_path: Path
) -> None:
    """What they were taken for is not there to take them off again: such experts are read anew."""
    other = converted(faithful_shira(7).write(tmp_path / "other"), tmp_path / "other.adapter", bundle)
    good = file.read_bytes()
    for content in (bytes(len(good)), other.read_bytes()[: len(good)].ljust(len(good), b"\0")):
        with edgert.load(bundle, memory=least(bundle) + (64 << 10), threads=2) as model:
            plain = bits(model.logits(TOKENS))
            model.load_adapter(file, "a")
            model.set_adapter("a")
            patched = bits(model.logits(TOKENS))
            with open(file, "r+b") as opened:
                opened.write(content)
            with pytest.raises(CorruptError, match="a.adapter: patch of"):
                model.logits(TOKENS)
            model.set_adapter(None)
            np.testing.assert_array_equal(bits(model.logits(TOKENS)), plain)
            with open(file, "r+b") as opened:
                opened.write(good)
            model.set_adapter("a")
            np.testing.assert_array_equal(bits(model.logits(TOKENS)), patched)
            with open(file, "r+b") as opened:
                opened.write(content)
            model.unload_adapter("a")
            np.testing.assert_array_equal(bits(model.logits(TOKENS)), plain)
            assert model.native.check_weights() > 5
            with open(file, "r+b") as opened:
                opened.write(good)


def test_a_file_that_is_gone(bundle: Path, file: Path) -> None:
    with edgert.load(bundle, memory="64MiB", threads=1) as model:
        model.load_adapter(file, "a")
        file.unlink()
        with pytest.raises(NotFoundError, match="a.adapter"):
            model.set_adapter("a")
        model.logits(TOKENS)


def forged(file: Path, target: str, change: Callable[[np.ndarray], Any]) -> None:
    """The patch of a matrix changed, and its checksum right."""
    offset, size = stored_of(file, target)
    content = bytearray(file.read_bytes())
    patch = np.frombuffer(content, np.uint8)[offset : offset + size].copy()
    change(patch)
    patch[:8] = np.frombuffer(int(_native.xxh64(patch[8:].data), 16).to_bytes(8, "little"), np.uint8)
    content[offset : offset + size] = patch.tobytes()
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda patch: patch[-40:].fill(255), "an entry is outside the matrix' codes"),
        (lambda patch: patch[8 + 8 * 4 :][::2].fill(0), "an entry is outside the matrix' codes"),
        (lambda patch: patch[12:16].fill(255), "its tiles are not those of the entries"),
        (lambda patch: patch[8:12].fill(1), "its tiles are not those of the entries"),
    ],
    ids=["beyond the end", "before the beginning", "more entries than there are", "entries passed over"],
)
def test_a_forged_patch_changes_nothing_outside_its_codes(
    bundle: Path, file: Path, change: Callable[[np.ndarray], Any], complaint: str
) -> None:
    forged(file, "layers.0.attention.q", change)
    with edgert.load(bundle, memory="64MiB", threads=1) as model:
        model.load_adapter(file, "a")
        with pytest.raises(CorruptError, match=complaint):
            model.set_adapter("a")
        assert model.native.check_weights() > 5


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], Any]) -> Path:
    """Metadata and tensors of an adapter file, changed; numbers' checksum as it was."""
    from edgert.converters.safetensors_writer import write_safetensors

    infos, metadata = read_header_and_metadata(file)
    data = file.read_bytes()
    types = {"F32": "<f4", "I32": "<i4", "I8": "i1", "U8": "u1"}
    tensors = {
        info.name: np.frombuffer(data[info.begin : info.end], types[info.dtype]).reshape(info.shape)
        for info in infos
    }
    about = json.loads(metadata["edgert.adapter"])
    change(about, tensors)
    write_safetensors(file, tensors, {"edgert.adapter": json.dumps(about)})
    return file


Q = "layers.0.attention.q"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda about, _: about.update(version=2), "patches stand behind all numbers, from version 3 on"),
        (lambda about, t: t.update({f"{Q}.gain": np.ones(64, np.float32)}), "patches stand behind all numbers"),
        (lambda about, t: t.pop(f"{Q}.patch"), "these are of 83 of 84"),
        (lambda about, _: about.pop("patches"), "fingerprint: found None"),
        (lambda about, _: about["patches"].update(fingerprint=3), "fingerprint: found 3"),
        (lambda about, _: about["patches"]["counts"].pop("apart"), "counts: found"),
        (lambda about, _: about["patches"]["counts"].update(error=float("nan")), "NaN"),
        (lambda about, _: about["patches"]["counts"].update(values=-1), "counts: found"),
        (lambda about, t: t.update({f"{Q}.patch": t[f"{Q}.patch"].astype(np.float32)}), "bytes are needed"),
    ],
)  # fmt: skip
def test_a_wrong_header_is_refused(
    bundle: Path, file: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], Any], complaint: str
) -> None:
    rewritten(file, change)
    with (
        edgert.load(bundle, memory="64MiB", threads=1) as model,
        pytest.raises(CorruptError, match=complaint),
    ):
        model.load_adapter(file, "a")


def test_a_patch_of_another_length_is_refused(bundle: Path, file: Path) -> None:
    rewritten(file, lambda about, t: t.update({f"{Q}.patch": t[f"{Q}.patch"][:24]}))
    with edgert.load(bundle, memory="64MiB", threads=1) as model:
        model.load_adapter(file, "a")
        with pytest.raises(CorruptError, match=f"patch of {Q} at offset [0-9]+: 24 bytes cannot be it"):
            model.set_adapter("a")
