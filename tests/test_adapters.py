"""Adapters on a loaded model: what they change, when, and for whom."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, MIB, bits, convert
from peft_directories import KINDS, fused_lora, head, loaded, lora, shira
from shell import Shell, assert_fails

import edgert
from edgert.errors import (
    BudgetError,
    CorruptError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)

TOKENS = list(range(3, 43))
CHUNK = 8


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT directories: two of LoRA and one of SHiRA."""
    place = tmp_path_factory.mktemp("adapters")
    return {
        "one": lora(1).write(place / "one"),
        "two": lora(2).write(place / "two"),
        "sparse": shira().write(place / "sparse"),
    }


@pytest.fixture
def model(tiny_bundle: Path, directories: dict[str, Path]) -> Any:
    with loaded(tiny_bundle, directories) as model:
        yield model


def manifest_of(bundle: Path) -> dict[str, Any]:
    from edgert.bundle import Bundle

    return Bundle.open(bundle).manifest


# --- what it computes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_weights_with_it_merged_do(
    tiny_f32_bundle: Path, tmp_path: Path, kind: str
) -> None:
    made = KINDS[kind]()
    merged = convert(made.merged(tmp_path / "merged"), tmp_path / "merged.edgert", **F32)
    with edgert.load(merged, memory="64MiB", threads=1) as model:
        expected = model.logits(TOKENS)
    with edgert.load(tiny_f32_bundle, memory="64MiB", threads=1) as model:
        plain = model.logits(TOKENS)
        model.load_adapter(made.write(tmp_path / "adapter"), "a")
        actual = model.logits(TOKENS, adapter="a")
    scale = np.abs(expected).max()
    assert np.abs(actual - expected).max() < 1e-4 * scale
    assert np.abs(plain - expected).max() > 1e-2 * scale


def test_a_scale_multiplies_what_it_adds(model: Any) -> None:
    plain = model.logits(TOKENS)
    np.testing.assert_array_equal(bits(model.logits(TOKENS, adapter={"one": 0})), bits(plain))
    half, whole = (model.logits(TOKENS, adapter={"one": scale}) for scale in (0.5, 1))
    assert not np.array_equal(half, whole) and not np.array_equal(half, plain)
    np.testing.assert_array_equal(
        bits(model.logits(TOKENS, adapter={"one": 1, "two": 0.5})),
        bits(model.logits(TOKENS, adapter={"two": 0.5, "one": 1})),
    )


@pytest.mark.filterwarnings("ignore:.*every token will wait")
def test_with_experts_in_storage_the_bits_are_the_same(
    model: Any, tiny_bundle: Path, directories: dict[str, Path]
) -> None:
    expected = model.logits(TOKENS, adapter=["one", "sparse"])
    room: dict[str, Any] = {"adapter_memory": "1MiB", "chunk": CHUNK, "threads": 1}
    least = 0
    with edgert.load(tiny_bundle, memory="64MiB", **room) as resident:
        least = resident.minimum_bytes
    with edgert.load(tiny_bundle, memory=least, **room) as paged:
        assert not paged.resident
        for name in ("one", "sparse"):
            paged.load_adapter(directories[name], name)
        np.testing.assert_array_equal(bits(paged.logits(TOKENS, adapter=["one", "sparse"])), bits(expected))
        assert paged.stats()["evictions"] > 0


@pytest.mark.filterwarnings("ignore:.*every token will wait")
def test_without_room_the_knob_is_named_that_makes_some(
    tiny_bundle: Path, directories: dict[str, Path]
) -> None:
    with edgert.load(tiny_bundle, memory="64MiB", threads=1, chunk=CHUNK) as resident:
        least = resident.minimum_bytes
    with edgert.load(tiny_bundle, memory=least, threads=1, chunk=CHUNK) as paged:
        with pytest.raises(BudgetError, match="adapter_memory"):
            paged.load_adapter(directories["one"])
        assert paged.adapters() == []
        paged.logits(TOKENS)


# --- which are on -------------------------------------------------------------------------------------


def test_one_is_off_until_it_is_turned_on_and_off_again(model: Any) -> None:
    plain = bits(model.logits(TOKENS))
    one = bits(model.logits(TOKENS, adapter="one"))
    np.testing.assert_array_equal(bits(model.logits(TOKENS)), plain)
    model.set_adapter("one")
    np.testing.assert_array_equal(bits(model.logits(TOKENS)), one)
    assert {info.name: info.scale for info in model.adapters()} == {"one": 1, "two": 0, "sparse": 0}
    model.disable_adapters()
    np.testing.assert_array_equal(bits(model.logits(TOKENS)), plain)
    model.enable_adapters()
    np.testing.assert_array_equal(bits(model.logits(TOKENS)), one)
    model.set_adapter([])
    np.testing.assert_array_equal(bits(model.logits(TOKENS)), plain)


def test_a_call_may_choose_others(model: Any) -> None:
    alone = {
        name: model.generate(TOKENS, adapter=name, max_tokens=8, ignore_eos=True).tokens
        for name in ("one", "two", "sparse")
    }
    plain = model.generate(TOKENS, max_tokens=8, ignore_eos=True).tokens
    model.set_adapter("one")
    assert model.generate(TOKENS, max_tokens=8, ignore_eos=True).tokens == alone["one"]
    assert model.generate(TOKENS, adapter="two", max_tokens=8, ignore_eos=True).tokens == alone["two"]
    assert model.generate(TOKENS, adapter=[], max_tokens=8, ignore_eos=True).tokens == plain
    assert len({*map(tuple, [*alone.values(), plain])}) > 1


def test_streams_side_by_side_have_each_their_own(model: Any) -> None:
    """No key or value that one has computed is used by another, however they take turns."""
    options = {"max_tokens": 8, "ignore_eos": True}
    choices: tuple[Any, ...] = ([], "one", {"one": 0.5}, ["two", "sparse"])
    alone = [model.generate(TOKENS, adapter=choice, **options).tokens for choice in choices]
    streams = [model.stream(TOKENS, adapter=choice, **options) for choice in choices]
    turns = list(zip(*streams, strict=True))
    assert [[piece.token for piece in pieces] for pieces in zip(*turns, strict=True)] == alone


def test_what_has_begun_goes_on_as_it_began(model: Any) -> None:
    expected = model.generate(TOKENS, adapter="one", max_tokens=8, ignore_eos=True).tokens
    model.set_adapter("one")
    stream = model.stream(TOKENS, max_tokens=8, ignore_eos=True)
    tokens = [next(stream).token]
    model.set_adapter("two")
    model.unload_adapter("one")
    tokens += [piece.token for piece in stream]
    assert tokens == expected


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ({"sparse": 1e39}, "sparse: scale: found 1e\\+39"),
        ({"sparse": -1e300}, "sparse: scale: found -1e\\+300"),
        ({"sparse": 10**400}, "sparse: scale: found 1000"),
        ({"sparse": float("nan")}, "sparse: scale: found nan"),
        ({"sparse": "1"}, "sparse: scale: found '1'"),
        ({"sparse": True}, "sparse: scale: found True"),
        (5, "adapter: found 5"),
        ([["sparse"]], r"adapter: found \[\['sparse'\]\]"),
        ({5: 1.0}, "adapter: found {5: 1.0}"),
        (b"sparse", "adapter: found b'sparse'"),
    ],
)
def test_what_is_no_choice_is_refused(model: Any, choice: Any, found: str) -> None:
    before = bits(model.logits(TOKENS))
    for call in (model.set_adapter, lambda choice: model.logits(TOKENS, adapter=choice)):
        with pytest.raises(InvalidArgumentError, match=found):
            call(choice)
    np.testing.assert_array_equal(bits(model.logits(TOKENS)), before)


def test_a_directorys_name_is_its_own(
    model: Any, tmp_path: Path, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run-1.5"
    shutil.copytree(directories["one"], directory)
    assert model.load_adapter(directory).name == "run-1.5"
    model.unload_adapter("run-1.5")
    monkeypatch.chdir(directory)
    assert model.load_adapter(".").name == "run-1.5"


def test_unloading_gives_its_memory_back(model: Any) -> None:
    before = model.stats()["used_bytes"]
    (info,) = [info for info in model.adapters() if info.name == "two"]
    model.unload_adapter("two")
    assert before - model.stats()["used_bytes"] == info.bytes > 0
    assert [info.name for info in model.adapters()] == ["one", "sparse"]
    with pytest.raises(NotFoundError, match="'two': is not loaded; there are one, sparse"):
        model.set_adapter("two")


def test_names(model: Any, directories: dict[str, Path]) -> None:
    assert model.load_adapter(directories["sparse"], "again").kind == "SHIRA"
    with pytest.raises(InvalidArgumentError, match="one: is loaded already"):
        model.load_adapter(directories["one"])  # whose name is its directory's
    for name in ("", " one"):
        with pytest.raises(InvalidArgumentError, match="adapter name"):
            model.load_adapter(directories["one"], name)
    for call in (model.unload_adapter, model.set_adapter, lambda name: model.generate(TOKENS, adapter=name)):
        with pytest.raises(NotFoundError, match="'gone': is not loaded"):
            call("gone")
    for scale in (float("nan"), "1", True):
        with pytest.raises(InvalidArgumentError, match="one: scale: found"):
            model.set_adapter({"one": scale})
    assert all(info.scale == 0 for info in model.adapters())


# --- files --------------------------------------------------------------------------------------------


def test_a_file_holds_what_the_directory_does(
    model: Any, edgert: Shell, tiny_bundle: Path, directories: dict[str, Path], tmp_path: Path
) -> None:
    for name, path in directories.items():
        file = tmp_path / f"{name}.adapter"
        made = edgert.json("adapter", "convert", path, file, "--base", tiny_bundle)
        again = edgert.json("adapter", "show", file, "--base", tiny_bundle)
        assert made["matrices"] == again["matrices"] and made["kind"] == again["kind"]
        assert made["bytes"] == file.stat().st_size
        model.load_adapter(file, f"{name}-file")
        np.testing.assert_array_equal(
            bits(model.logits(TOKENS, adapter=f"{name}-file")), bits(model.logits(TOKENS, adapter=name))
        )


def test_a_file_is_for_every_bundle_of_its_checkpoint_and_for_no_other(
    tiny_bundle: Path, tiny_f32_bundle: Path, other_bundle: Path, directories: dict[str, Path], tmp_path: Path,
    edgert: Shell,
) -> None:  # fmt: skip
    from edgert import load

    file = tmp_path / "one.adapter"
    edgert.json("adapter", "convert", directories["one"], file, "--base", tiny_bundle)
    with load(tiny_f32_bundle, memory="64MiB", threads=1) as model:
        assert model.load_adapter(file).matrices == 14
    with load(other_bundle, memory="64MiB", threads=1) as model:
        with pytest.raises(InvalidArgumentError, match="was made for another model"):
            model.load_adapter(file)
        assert model.adapters() == []


def test_fused_adapters_add_what_they_add_together(
    edgert: Shell, tiny_f32_bundle: Path, directories: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "both.adapter"
    given = (f"{directories['one']}:0.8", f"{directories['two']}:-0.5", f"{directories['sparse']}:2")
    made = edgert.json("adapter", "fuse", *given, "-o", file, "--base", tiny_f32_bundle)
    assert made["kind"] == "LORA+SHIRA"
    with loaded(tiny_f32_bundle, {"both": file, **directories}) as model:
        together = model.logits(TOKENS, adapter={"one": 0.8, "two": -0.5, "sparse": 2})
        fused = model.logits(TOKENS, adapter="both")
    assert np.abs(fused - together).max() < 1e-4 * np.abs(together).max()


def test_weights_beside_factors_fuse_and_compress_to_files_that_load(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """Those are f16 as they were saved; the factors become f32, or signs."""
    from edgert.converters.adapter_file import write_adapter
    from edgert.converters.adapter_part import Part
    from edgert.converters.compress import compress
    from edgert.converters.fuse import fuse

    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.1).astype(np.float16)

    manifest = manifest_of(tiny_bundle)
    tokens = Part(
        "output",
        random(2, 72),
        random(320, 2),
        weights=random(2, 72),
        weight_rows=np.array([5, 9], np.int32),
    )
    factors = Part("output", random(3, 72), random(320, 3))
    small = compress([tokens], 0.9, manifest)
    write_adapter(tmp_path / "tokens.adapter", "LORA", [tokens], manifest)
    write_adapter(tmp_path / "factors.adapter", "LORA", [factors], manifest)
    write_adapter(tmp_path / "fused.adapter", "LORA", fuse([([tokens], 1.0), ([factors], 0.5)]), manifest)
    write_adapter(tmp_path / "small.adapter", "LORA", small.parts, manifest, small.signs)
    files = {file.stem: file for file in tmp_path.glob("*.adapter")}
    with loaded(tiny_bundle, files) as model:
        expected = model.logits(TOKENS, adapter={"tokens": 1, "factors": 0.5})
        np.testing.assert_allclose(model.logits(TOKENS, adapter="fused"), expected, atol=1e-4)
        assert np.array_equal(model.logits(TOKENS, adapter="small"), model.logits(TOKENS, adapter="tokens"))


@pytest.mark.parametrize(
    ("rank", "scale", "kind", "complaint"),
    [
        (128, 1.0, UnsupportedError, "m: fused, its rank is 4224; at most 4096"),
        (1, 1e39, InvalidArgumentError, "m: fused at these scales"),
    ],
)
def test_what_does_not_fuse_is_refused(rank: int, scale: float, kind: Any, complaint: str) -> None:
    from edgert.converters.adapter_part import Part
    from edgert.converters.fuse import fuse

    part = Part("m", np.ones((rank, 4), np.float32), np.ones((3, rank), np.float32))
    with pytest.raises(kind, match=complaint), np.errstate(over="ignore"):
        fuse([([part], scale)] * 33)


def test_sparse_values_that_meet_are_summed_and_gains_multiplied() -> None:
    from edgert.converters.adapter_part import Part
    from edgert.converters.fuse import fuse

    def sparse(cols: list[int], values: list[float], gain: float) -> list[Part]:
        rows = np.ones(len(cols), np.int32)
        return [
            Part("q", rows=rows, cols=np.array(cols, np.int32), values=np.array(values, np.float32),
                 gain=np.full(2, gain, np.float32))
        ]  # fmt: skip

    (part,) = fuse([(sparse([5, 2], [1, 2], 0.5), 2), (sparse([2, 7], [3, 4], 1), 1)])
    assert part.rows is not None and part.cols is not None and part.values is not None
    assert dict(zip(part.cols.tolist(), part.values.tolist(), strict=True)) == {2: 7, 5: 2, 7: 4}
    np.testing.assert_array_equal(part.gain, [3, 3])  # (1 + 2 * 0.5) * (1 + 1) - 1


# --- what it is written for ---------------------------------------------------------------------------


SQUARE: dict[str, Any] = {"hidden_size": 80}  # 2 * moe_intermediate_size: gate_up is square


@pytest.fixture(scope="module")
def square_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from checkpoints import tiny_checkpoint

    place = tmp_path_factory.mktemp("square")
    return convert(tiny_checkpoint(place / "checkpoint", **SQUARE), place / "square.edgert", **F32)


@pytest.mark.parametrize(
    ("version", "direct"),
    [("0.18.0", False), ("0.19.0", False), ("0.19.1", True), ("0.20.0.dev0", True), ("0.21.2", True)],
)
def test_which_side_of_a_square_matrix_is_which_depends_on_the_version(
    square_bundle: Path, tmp_path: Path, version: str, direct: bool
) -> None:
    from edgert.converters.adapter import compile_adapter
    from edgert.converters.peft import read_peft

    made = fused_lora(version=version, parts=("gate_up_proj",), **SQUARE)
    parts = compile_adapter(
        read_peft(made.write(tmp_path / "a")), square_bundle, manifest_of(square_bundle)
    ).parts
    by_target = {part.target: part for part in parts}
    a, b = (made.tensors[f"base_model.model.model.layers.1.mlp.experts.lora_{x}.weight"] for x in "AB")
    delta = 2 * b.reshape(80, 4, 8)[:, :, 3] @ a.reshape(8, 4, 80)[3]
    delta = delta if direct else delta.T
    gate, up = (by_target[f"layers.1.experts.3.{name}"] for name in ("gate", "up"))
    for part, expected in ((gate, delta[:40]), (up, delta[40:])):
        factors = part.factors()
        assert factors is not None
        np.testing.assert_allclose(factors[1] @ factors[0], expected, rtol=1e-4, atol=1e-5)


def test_without_a_version_the_other_tensor_of_the_experts_says_which_side_is_which(
    square_bundle: Path, tmp_path: Path
) -> None:
    made = fused_lora(version=None, **SQUARE)
    with edgert.load(square_bundle, memory="64MiB", threads=1) as model:
        model.load_adapter(made.write(tmp_path / "both"), "both")
        unversioned = model.logits(TOKENS, adapter="both")
        newest = fused_lora(**SQUARE).write(tmp_path / "newest")
        model.load_adapter(newest)
        np.testing.assert_array_equal(bits(model.logits(TOKENS, adapter="newest")), bits(unversioned))
        alone = fused_lora(version=None, parts=("gate_up_proj",), **SQUARE)
        with pytest.raises(UnsupportedError, match="square and alone states no peft_version"):
            model.load_adapter(alone.write(tmp_path / "alone"))


def test_weights_that_come_with_an_adapter_are_the_bases_own(tiny_bundle: Path, tmp_path: Path) -> None:
    """Of a bundle in lower precision as well, within its rounding."""
    with edgert.load(tiny_bundle, memory="64MiB", threads=1) as model:
        assert model.load_adapter(head().write(tmp_path / "head")).matrices == 1
        with pytest.raises(
            InvalidArgumentError, match=r"lm_head\.base_layer\.weight.*are not the base's \(10\.0% apart\)"
        ):
            model.load_adapter(head(changed=0.1).write(tmp_path / "trained"))
        model.load_adapter(head(resized=2).write(tmp_path / "resized"), "resized")
        assert model.logits(TOKENS, adapter="resized").shape == (len(TOKENS), model.vocab_size + 2)


# --- the command line ---------------------------------------------------------------------------------


def test_run_and_eval_take_adapters(
    edgert: Shell, tiny_bundle: Path, directories: dict[str, Path], tmp_path: Path
) -> None:
    from edgert import load

    with load(tiny_bundle, memory="64MiB", threads=1) as model:
        model.load_adapter(directories["one"], "one")
        expected = model.generate("The module", adapter={"one": 0.5}, max_tokens=6, temperature=0).text
    options = (
        "-p",
        "The module",
        "--raw",
        "--max-tokens",
        6,
        "--temperature",
        0,
        "--memory",
        "64MiB",
        "--threads",
        1,
    )
    done = edgert("run", tiny_bundle, *options, "--adapter", f"{directories['one']}:0.5")
    assert done.returncode == 0 and done.stdout.strip() == expected.strip()
    assert "adapter one: LORA, 14 matrices" in done.stderr

    text = tmp_path / "text"
    text.write_text("The module reads the file and returns the number of bytes. " * 3)
    measured = [
        edgert.json("eval", tiny_bundle, "--text", text, *given)["perplexity"]
        for given in ((), ("--adapter", directories["one"]))
    ]
    assert measured[0] != measured[1]


def test_an_adapter_that_is_not_there(edgert: Shell, tiny_bundle: Path, tmp_path: Path) -> None:
    done = edgert("run", tiny_bundle, "-p", "x", "--adapter", tmp_path / "gone")
    assert done.returncode == 1 and str(tmp_path / "gone") in done.stderr
    (tmp_path / "empty").mkdir()
    assert_fails(
        edgert("adapter", "show", tmp_path / "empty", "--base", tiny_bundle),
        "there is no adapter_config.json",
    )


def written(directory: Path, bundle: Path, file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A PEFT directory as an adapter file: what the file tells of itself, and its tensors."""
    from safetensors import safe_open

    from edgert.adapter_sources import read_adapter
    from edgert.converters.adapter_file import write_adapter

    manifest = manifest_of(bundle)
    read = read_adapter(directory, bundle, manifest)
    write_adapter(file, read.kind, read.parts, manifest)
    with safe_open(file, "np") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return json.loads(opened.metadata()["edgert.adapter"]), tensors


def test_an_adapter_file_says_what_it_is(
    tiny_bundle: Path, directories: dict[str, Path], tmp_path: Path
) -> None:
    from edgert.adapter_sources import read_adapter
    from edgert.converters.adapter_file import write_adapter

    about, tensors = written(directories["sparse"], tiny_bundle, tmp_path / "a.adapter")
    assert (about["version"], about["kind"]) == (2, "SHIRA")
    assert "final_norm" in about["base"] and "layers.2.router" in about["base"]
    assert tensors["layers.0.attention.q.shira_rows"].shape == (90,)
    content = (tmp_path / "a.adapter").read_bytes()
    manifest = manifest_of(tiny_bundle)
    read = read_adapter(directories["sparse"], tiny_bundle, manifest)
    kind, parts = read.kind, read.parts
    write_adapter(tmp_path / "b.adapter", kind, list(reversed(parts)), manifest)
    assert (tmp_path / "b.adapter").read_bytes() == content
    (tmp_path / "c.adapter").write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptError):
        read_adapter(tmp_path / "c.adapter", tiny_bundle, manifest)
    assert len(content) < MIB


def test_files_of_version_1_stay_readable(
    tiny_bundle: Path, directories: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    about, tensors = written(directories["sparse"], tiny_bundle, tmp_path / "new.adapter")
    old = {"version": 1, "kind": about["kind"], "base": about["base"]}
    save_file(tensors, tmp_path / "old.adapter", {"edgert.adapter": json.dumps(old)})
    outputs = []
    with edgert.load(tiny_bundle, memory="64MiB", threads=1) as model:
        for name in ("new", "old"):
            model.load_adapter(tmp_path / f"{name}.adapter")
            outputs.append(model.logits([3, 4, 5], adapter=name))
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_what_speaks_against_a_directory_is_said(
    tiny_bundle: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """It runs: its shapes and the names of its modules fit."""
    doubtful: dict[str, dict[str, Any]] = {
        "fine": {"base_model_name_or_path": "some/Tiny", "use_dora": False},
        "local": {"base_model_name_or_path": "/models/other"},
        "other": {"base_model_name_or_path": "some/Other-7B"},
        "newer": {"use_tomorrow": True, "yesterday": None},
    }
    with edgert.load(tiny_bundle, memory="64MiB", threads=1) as model:
        for name, options in doubtful.items():
            made = lora()
            made.config |= options
            model.load_adapter(made.write(tmp_path / name))
    other, newer = (str(warning.message) for warning in recwarn)
    assert "other: is for some/Other-7B, as far as it says, and the base is called tiny;" in other
    assert "adapter_config.json: use_tomorrow: not known to this version" in newer
