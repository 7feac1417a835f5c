"""What a bad bundle gets: the contract, and one case a row.

Contract: a typed error that names the file, field or tensor; within 2 s; with at most 64 MiB of extra memory;
nothing written into the bundle; and a model that is already loaded goes on token for token.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import EXPERTS, MIB, answer, edit_manifest, first_tensor, flip_bit, read_manifest, seal, use
from checkpoints import TINY_CONFIG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Manifest = dict[str, Any]


@dataclass
class Row:
    """`damage(bundle, other)` breaks a copy; `other` is a sound bundle of another model of the same sizes."""

    name: str
    damage: Callable[[Path, Path], Any]
    names: str  # what the message must name


def manifest(edit: Callable[[Manifest], Any]) -> Callable[[Path, Path], None]:
    """A manifest that is wrong in one place and whose checksum is right."""
    return lambda bundle, other: edit_manifest(bundle, edit)


def put(value: Any, *keys: Any) -> Callable[[Path, Path], None]:
    """Sets one value of the manifest, addressed by its keys and indices."""

    def edit(root: Any) -> None:
        for key in keys[:-1]:
            root = root[key]
        root[keys[-1]] = value

    return manifest(edit)


def put_text(old: str, new: str) -> Callable[[Path, Path], None]:
    """Replaces text of the manifest's body, for what a JSON writer would not write."""
    return put_bytes(old.encode(), new.encode())


def put_bytes(old: bytes, new: bytes) -> Callable[[Path, Path], None]:
    def damage(bundle: Path, other: Path) -> None:
        body = json.dumps(read_manifest(bundle)).encode()[1:]
        assert old in body
        seal(bundle, body.replace(old, new, 1))

    return damage


def resize(file: str, change: int) -> Callable[[Path, Path], None]:
    return lambda bundle, other: os.truncate(bundle / file, (bundle / file).stat().st_size + change)


def remove(file: str) -> Callable[[Path, Path], None]:
    return lambda bundle, other: (bundle / file).unlink()


def link(file: str) -> Callable[[Path, Path], None]:
    """The file becomes a symbolic link to its own content outside the bundle."""

    def damage(bundle: Path, other: Path) -> None:
        outside = bundle.parent / f"outside-{file}"
        (bundle / file).rename(outside)
        (bundle / file).symlink_to(outside)

    return damage


def fifo(file: str) -> Callable[[Path, Path], None]:
    def damage(bundle: Path, other: Path) -> None:
        (bundle / file).unlink()
        os.mkfifo(bundle / file)

    return damage


def from_other(file: str) -> Callable[[Path, Path], None]:
    def damage(bundle: Path, other: Path) -> None:
        shutil.copy(other / file, bundle / file)

    return damage


def flip(file: str, place: Callable[[Path], int], bit: int = 3) -> Callable[[Path, Path], None]:
    return lambda bundle, other: flip_bit(bundle / file, place(bundle), bit)


def cut(place: Callable[[int], int]) -> Callable[[Path, Path], None]:
    return lambda bundle, other: os.truncate(
        bundle / "manifest.json", place((bundle / "manifest.json").stat().st_size)
    )


def first_extent(bundle: Path) -> int:
    return int(read_manifest(bundle)["experts"][0]["extents"][0][1])


def swap_checksum(extents: list[list[Any]]) -> None:
    digits = extents[0][3]
    extents[0][3] = ("0" if digits[0] != "0" else "1") + digits[1:]


def capital_checksum(bundle: Path, other: Path) -> None:
    """A flipped bit 5 turns a digit a to f into A to F."""
    text = (bundle / "manifest.json").read_bytes()
    at = next(i for i in range(13, 29) if text[i : i + 1].isalpha())
    flip_bit(bundle / "manifest.json", at, 5)


def deep(bundle: Path, other: Path) -> None:
    body = json.dumps(read_manifest(bundle))[1:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}"
    seal(bundle, body.encode())


def half_installed(bundle: Path, other: Path) -> None:
    for file in bundle.glob("*.bin"):
        file.unlink()


def tensor_named(root: Manifest, name: str) -> dict[str, Any]:
    return next(t for t in root["tensors"] if t["name"] == name)


def extent_row(root: Manifest, layer: int = 0) -> list[list[Any]]:
    extents: list[list[Any]] = root["experts"][layer]["extents"]
    return extents


MOE = ("recipe", "blocks", 0, "ffn")
MIXER = ("recipe", "blocks", 0, "mixer")

ROWS = [
    # the manifest as a file
    Row("manifest missing", remove("manifest.json"), "manifest.json"),
    Row("manifest empty", cut(lambda size: 0), "manifest.json"),
    Row("manifest cut in its first line", cut(lambda size: 20), "manifest.json"),
    Row("manifest cut after its first line", cut(lambda size: 32), "manifest.json"),
    Row("manifest cut in the middle", cut(lambda size: size // 2), "manifest.json"),
    Row("manifest short of a byte", cut(lambda size: size - 1), "manifest.json"),
    Row("manifest of a GiB of nothing", cut(lambda size: 1 << 30), "manifest.json"),
    Row("manifest not UTF-8", put_bytes(b'"architecture": "', b'"architecture": "\xff'), "manifest.json"),
    Row("manifest with half a surrogate", put_text('"architecture": "', '"architecture": "\\ud800'), "manifest.json"),
    Row("manifest nested 100k deep", deep, "manifest.json"),
    Row("manifest a symbolic link", link("manifest.json"), "manifest.json"),
    Row("manifest a FIFO", fifo("manifest.json"), "manifest.json"),
    Row("manifest with a key twice", put_text('"alignment":', '"alignment": 4096, "alignment":'), "alignment"),
    Row("recipe with a key twice", put_text('"vocab_size":', '"vocab_size": 1, "vocab_size":'), "vocab_size"),
    Row("manifest with an unknown key", put(1, "surprise"), "surprise"),
    Row("manifest without its tensors", manifest(lambda m: m.pop("tensors")), "tensors"),
    Row("manifest bit flipped in its checksum", flip("manifest.json", lambda b: 14, 1), "manifest.json"),
    Row("manifest checksum in capitals", capital_checksum, "manifest.json"),
    Row("manifest bit flipped in its body", flip("manifest.json", lambda b: 200, 0), "manifest.json"),
    Row("newer format", put(2, "format_version"), "format_version"),
    Row("format 0", put(0, "format_version"), "format_version"),
    Row("newer recipe", put(2, "recipe", "version"), "version"),
    # files
    Row("traversal", put("../dense.bin", "files", 0, "name"), "../dense.bin"),
    Row("absolute path", put("/etc/passwd", "files", 0, "name"), "/etc/passwd"),
    Row("hidden file", put(".dense.bin", "files", 0, "name"), ".dense.bin"),
    Row("NUL in a name", put("dense\0.bin", "files", 0, "name"), "files"),
    Row("traversal of an asset", put("../tokenizer.json", "assets", 0, "name"), "../tokenizer.json"),
    Row("dense file a symbolic link", link("dense.bin"), "dense.bin"),
    Row("expert file a symbolic link", link(EXPERTS), EXPERTS),
    Row("tokenizer a symbolic link", link("tokenizer.json"), "tokenizer.json"),
    Row("expert file a FIFO", fifo(EXPERTS), EXPERTS),
    Row("dense file missing", remove("dense.bin"), "dense.bin"),
    Row("expert file missing", remove(EXPERTS), EXPERTS),
    Row("tokenizer missing", remove("tokenizer.json"), "tokenizer.json"),
    Row("half-installed", half_installed, ".bin"),
    Row("dense file empty", lambda bundle, other: os.truncate(bundle / "dense.bin", 0), "dense.bin"),
    Row("dense file shorter than said", resize("dense.bin", -16384), "dense.bin"),
    Row("expert file a byte shorter", resize(EXPERTS, -1), EXPERTS),
    Row("expert file longer than said", resize(EXPERTS, 16384), EXPERTS),
    Row("tokenizer longer than said", resize("tokenizer.json", 1), "tokenizer.json"),
    Row("size said is negative", put(-1, "files", 1, "bytes"), "bytes"),
    Row("size said is huge", put(1 << 63, "files", 1, "bytes"), "bytes"),
    Row("10^5 files", manifest(lambda m: m["files"].extend([dict(m["files"][0])] * 100_000)), "files"),
    Row("a file named twice", manifest(lambda m: m["files"].append(dict(m["files"][0]))), "dense.bin"),
    Row("dense file of another bundle", from_other("dense.bin"), "dense.bin"),
    Row("expert file of another bundle", from_other(EXPERTS), EXPERTS),
    Row("manifest of another bundle", from_other("manifest.json"), ".bin"),
    Row("magic flipped", flip("dense.bin", lambda b: 0), "dense.bin"),
    Row("file version flipped", flip(EXPERTS, lambda b: 8), EXPERTS),
    Row("file index flipped", flip(EXPERTS, lambda b: 12), EXPERTS),
    Row("bundle id flipped", flip(EXPERTS, lambda b: 20), EXPERTS),
    # layout
    Row("alignment 0", put(0, "alignment"), "alignment"),
    Row("alignment 13", put(13, "alignment"), "alignment"),
    Row("alignment 2^31", put(1 << 31, "alignment"), "alignment"),
    Row("extent past the end", manifest(lambda m: extent_row(m)[0].__setitem__(1, 1 << 40)), "experts[0].extents[0]"),
    Row("extent offset 2^63", manifest(lambda m: extent_row(m)[0].__setitem__(1, (1 << 64) - 16384)), "experts"),
    Row("extent offset negative", manifest(lambda m: extent_row(m)[0].__setitem__(1, -16384)), "experts"),
    Row("extent offset a float", manifest(lambda m: extent_row(m)[0].__setitem__(1, 16384.5)), "experts"),
    Row("extent unaligned", manifest(lambda m: extent_row(m)[0].__setitem__(1, extent_row(m)[0][1] + 64)), "experts[0].extents[0]"),
    Row("extent over the header", manifest(lambda m: extent_row(m)[0].__setitem__(1, 0)), "experts[0].extents[0]"),
    Row("extents overlapping", manifest(lambda m: extent_row(m)[1].__setitem__(1, extent_row(m)[0][1])), "overlap"),
    Row("extent of the wrong size", manifest(lambda m: extent_row(m)[0].__setitem__(2, 64)), "layer 0"),
    Row("extent in a file that is not there", manifest(lambda m: extent_row(m)[0].__setitem__(0, 7)), "experts[0].extents[0]"),
    Row("extent in a format that is not there", manifest(lambda m: extent_row(m)[0].__setitem__(4, 7)), "experts[0].extents[0]"),
    Row("expert missing", manifest(lambda m: extent_row(m).pop()), "layer 0"),
    Row("expert doubled", manifest(lambda m: extent_row(m).append(list(extent_row(m)[-1]))), "overlap"),
    Row("layer of experts missing", manifest(lambda m: m["experts"].pop()), "layer"),
    Row("layer of experts doubled", manifest(lambda m: m["experts"].append(m["experts"][-1])), "layer"),
    Row("tensor missing", manifest(lambda m: m["tensors"].remove(tensor_named(m, "final_norm"))), "final_norm"),
    Row("tensor doubled", manifest(lambda m: m["tensors"].append(tensor_named(m, "final_norm"))), "final_norm"),
    Row("tensor past the end", manifest(lambda m: tensor_named(m, "final_norm").update(offset=1 << 40)), "tensors[2].bytes"),
    Row("tensor unaligned", manifest(lambda m: tensor_named(m, "final_norm").update(offset=16388)), "tensors[2].offset"),
    Row(
        "tensors overlapping",
        manifest(lambda m: tensor_named(m, "final_norm").update(offset=tensor_named(m, "embedding")["offset"])),
        "overlap",
    ),
    Row("tensor mis-shaped", manifest(lambda m: tensor_named(m, "layers.0.router").update(
        shape=[TINY_CONFIG["num_experts"], 71])), "layers.0.router"),
    Row("shape overflows", manifest(lambda m: tensor_named(m, "embedding").update(shape=[1 << 31, 1 << 31])), "tensors[1].shape"),
    Row("unknown format", manifest(lambda m: tensor_named(m, "embedding").update(format="int4_group0")), "int4_group0"),
    Row("expert format unknown", put(["q7", "q7", "q7"], "expert_formats", 0), "q7"),
    Row("format not of these bytes", put(["f32", "f32", "f32"], "expert_formats", 0), "layer 0"),
    # the recipe
    Row("10^9 layers", put([0] * 100_000, "recipe", "layers"), "layers"),
    Row("no layers", put([], "recipe", "layers"), "layers"),
    Row("layer of a block that is not there", put(9, "recipe", "layers", 0), "layers"),
    Row("hidden size 0", put(0, "recipe", "hidden_size"), "hidden_size"),
    Row("hidden size 2^40", put(1 << 40, "recipe", "hidden_size"), "hidden_size"),
    Row("vocabulary negative", put(-1, "recipe", "vocab_size"), "vocab_size"),
    Row("context 0", put(0, "recipe", "context_length"), "context_length"),
    Row("top-k above the experts", put(9, *MOE, "num_experts_per_tok"), "num_experts_per_tok"),
    Row("no experts", put(0, *MOE, "num_experts"), "num_experts"),
    Row("more experts than extents", put(16, *MOE, "num_experts"), "layers.0.router"),
    Row("unknown recipe key", put(1.0, "recipe", "logit_softcap"), "logit_softcap"),
    Row("unknown mixer", put("mamba", *MIXER, "kind"), "mamba"),
    Row("unknown activation", put("gelu", *MOE, "activation"), "gelu"),
    Row("heads not divisible", put(3, *MIXER, "num_kv_heads"), "num_kv_heads"),
    Row("rope longer than the head", put([1.0] * 9, *MIXER, "rope", "inv_freq"), "inv_freq"),
    Row("epsilon NaN", put(float("nan"), "recipe", "final_norm_eps"), "manifest.json"),
    Row("epsilon a string", put("1e-6", "recipe", "final_norm_eps"), "final_norm_eps"),
    # bits on disk
    Row("bit flipped in the dense part", flip("dense.bin", lambda b: first_tensor(b) + 5), "dense.bin"),
    Row("bit flipped in the tokenizer", flip("tokenizer.json", lambda b: 40), "tokenizer.json"),
    Row("bit flipped in an expert", flip(EXPERTS, lambda b: first_extent(b) + 99), EXPERTS),
    Row("bit flipped in an expert's checksum", manifest(lambda m: swap_checksum(extent_row(m))), EXPERTS),
]  # fmt: skip


def state(bundle: Path) -> dict[str, tuple[int, int, int]]:
    """What a write would change."""
    return {
        f.name: (f.lstat().st_size, f.lstat().st_mtime_ns, f.lstat().st_ino)
        for f in sorted(bundle.rglob("*"))
    }


def peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_contract(row: Row, copy: Path, other_bundle: Path, bystander: tuple[Any, np.ndarray]) -> None:
    from edgert import errors

    row.damage(copy, other_bundle)
    before, peak, start = state(copy), peak_resident_bytes(), time.process_time()
    with pytest.raises(errors.EdgertError) as error:
        use(copy)
    assert time.process_time() - start <= 2
    assert peak_resident_bytes() - peak <= 64 * MIB
    assert isinstance(error.value, (errors.CorruptError, errors.UnsupportedError, errors.NotFoundError))
    assert row.names in str(error.value), f"{error.value} does not name {row.names}"
    assert str(copy) in str(error.value), f"{error.value} does not say which bundle"
    assert state(copy) == before
    model, expected = bystander
    assert np.array_equal(answer(model), expected)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_verify_finds_it(row: Row, copy: Path, other_bundle: Path) -> None:
    from edgert import _native, errors

    _native.verify_bundle(str(copy))
    row.damage(copy, other_bundle)
    with pytest.raises(errors.EdgertError) as error:
        _native.verify_bundle(str(copy))
    assert row.names in str(error.value), f"{error.value} does not name {row.names}"


@pytest.mark.parametrize("name", ["dense.bin", EXPERTS])
def test_verify_reads_every_byte(name: str, copy: Path) -> None:
    """Also those that nothing is stored in."""
    from edgert import _native, errors

    file, size = copy / name, (copy / name).stat().st_size
    assert _native.verify_bundle(str(copy)) >= size - 32
    for offset in [32, size - 1, *range(0, size, 16411)]:
        flip_bit(file, offset, offset % 8)
        with pytest.raises(errors.CorruptError, match=name):
            _native.verify_bundle(str(copy))
        flip_bit(file, offset, offset % 8)
    _native.verify_bundle(str(copy))


def test_every_bit_of_the_manifest_is_checked(copy: Path) -> None:
    from edgert import _native, errors

    file = copy / "manifest.json"
    for offset in range(0, file.stat().st_size, 97):
        flip_bit(file, offset, offset % 8)
        with pytest.raises(errors.EdgertError):
            _native.open_bundle(str(copy))
        flip_bit(file, offset, offset % 8)
    _native.open_bundle(str(copy))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The address of every value in the manifest, but of three of a long list only."""
    yield path
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    )
    for key, item in items:
        yield from places(item, (*path, key))


STRANGE: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [None, True, "", "x", [], {}, [[]], 0, -1, 1, 63, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 200]
    ),
    st.integers(-(1 << 66), 1 << 66),
    st.floats(),
    st.text(max_size=5),
)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_in_any_place(tiny_bundle: Path, data: st.DataObject) -> None:
    """Whatever stands in a manifest whose checksum is right: a typed error, or a model that runs."""
    from edgert import errors

    root = read_manifest(tiny_bundle)
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from([place for place in places(root) if place]))
        parent = root
        for key in path:
            parent = parent[key]
        if data.draw(st.booleans()):
            parent[last] = data.draw(STRANGE)
        else:
            del parent[last]
    with tempfile.TemporaryDirectory() as directory:
        bundle = Path(shutil.copytree(tiny_bundle, Path(directory) / "strange.edgert"))
        seal(bundle, json.dumps(root).encode()[1:])
        try:
            use(bundle)
        except errors.EdgertError as error:
            assert not isinstance(error, errors.InvalidArgumentError), error
