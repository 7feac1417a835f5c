"""Predictors and the routing profile: what conversion writes is what the engine reads, and no word of it changes a bit."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import MIB, contents, convert, minimum_bytes, open_model, read_manifest, transcript
from checkpoints import TINY_CONFIG, prompt_tokens

from edgert import _native
from edgert import calibrate as calibrate_model
from edgert.bundle import Bundle
from edgert.calibration import Calibration
from edgert.converters import routing_profile
from edgert.errors import CorruptError, EdgertError, InvalidArgumentError, UnsupportedError

PREDICTORS = ("dictionary", "router", "trained")
PROMPT = prompt_tokens(11, TINY_CONFIG["vocab_size"])
TEXT = prompt_tokens(400, TINY_CONFIG["vocab_size"], 5)


@pytest.fixture(scope="module")
def measured(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    bundle = convert(tiny_source, tmp_path_factory.mktemp("plain") / "plain.edgert")
    return calibrate(bundle, TEXT)


@pytest.fixture(scope="module")
def profiled(tiny_source: Path, measured: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a routing profile."""
    return convert(tiny_source, tmp_path_factory.mktemp("profiled") / "m.edgert", calibration=measured)


def paged(bundle: Path, prefetch: str, *, slots: int = 12, **options: Any) -> Any:
    """With room for so many experts."""
    expert = max(row[2] for layer in read_manifest(bundle)["experts"] for row in layer["extents"])
    lowest = minimum_bytes(bundle, prefetch=prefetch, **options)
    memory = lowest + (slots - 2) * -(-expert // 4096) * 4096
    return open_model(bundle, memory=memory, prefetch=prefetch, **options)


def calibrate(bundle: Path, text: Any, **options: Any) -> Calibration:
    return calibrate_model(bundle, text, **{"memory": "64MiB", "threads": 1, "context": 64, **options})


# --- what predictors say ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", ["none", *PREDICTORS])
@pytest.mark.parametrize("forced", [None, True], ids=("on trial", "forced"))
def test_no_word_changes_a_bit(profiled: Path, prefetch: str, forced: bool | None) -> None:
    expected = transcript(open_model(profiled), PROMPT, 60)
    for slots in (2, 9, 16):
        for threads in (1, 2):
            for chunk in (1, 16):
                model = paged(profiled, prefetch, slots=slots, threads=threads, chunk=chunk)
                model.force_preload(forced)
                tokens, logits = transcript(model, PROMPT, 60)
                assert tokens == expected[0]
                assert np.array_equal(logits, expected[1]), (prefetch, slots, threads, chunk)


@pytest.mark.parametrize("prefetch", PREDICTORS)
def test_statistics_add_up(profiled: Path, prefetch: str) -> None:
    model = paged(profiled, prefetch)
    assert model.prefetch == prefetch
    model.force_preload(True)
    transcript(model, PROMPT, 60)
    found = model.statistics()
    layers = len(read_manifest(profiled)["experts"])
    assert found["preload_steps"] == found["preload_steps_on"] > 0
    per_token = TINY_CONFIG["num_experts_per_tok"]
    assert found["predicted"] == found["preload_steps"] * (layers - 1) * per_token
    assert 0 < found["predicted_used"] <= found["predicted"]
    assert found["expert_bytes_wasted"] <= found["expert_bytes_prefetched"] <= found["expert_bytes_read"]
    assert found["prefetches_late"] + found["prefetches_wasted"] <= found["prefetches"]


def test_the_trained_map_foretells_more_than_the_router(profiled: Path) -> None:
    """On the very text that it was fitted to."""
    recall = {}
    for prefetch in ("router", "trained"):
        model = paged(profiled, prefetch)
        sequence = model.sequence()
        for token in TEXT[:90]:
            model.step([(sequence, [token], None)])
        found = model.statistics()
        recall[prefetch] = found["predicted_used"] / found["predicted"]
    assert recall["trained"] > recall["router"]


def test_auto_takes_the_best_there_is(profiled: Path, tiny_bundle: Path) -> None:
    assert paged(profiled, "auto").prefetch == "trained"
    assert paged(tiny_bundle, "auto").prefetch == "router"
    assert open_model(profiled).prefetch == "none", "everything is in memory"


@pytest.mark.parametrize("prefetch", ["dictionary", "trained"])
def test_a_bundle_without_a_profile_says_what_is_missing(tiny_bundle: Path, prefetch: str) -> None:
    with pytest.raises(
        InvalidArgumentError, match=f"prefetch: {prefetch} needs a routing profile.*--calibration"
    ):
        paged(tiny_bundle, prefetch)
    with pytest.raises(InvalidArgumentError, match="prefetch: found 'oracle', allowed auto, none"):
        open_model(tiny_bundle, prefetch="oracle")


def test_the_profile_is_part_of_the_budget(profiled: Path) -> None:
    size = (profiled / routing_profile.NAME).stat().st_size
    assert minimum_bytes(profiled, prefetch="trained") >= minimum_bytes(profiled, prefetch="none") + size


# --- the file -----------------------------------------------------------------------------------------


def test_equal_calibrations_give_equal_bytes(
    profiled: Path, tiny_source: Path, measured: Calibration, tmp_path: Path
) -> None:
    measured.save(tmp_path / "c.calibration")
    again = convert(tiny_source, tmp_path / "m.edgert", calibration=tmp_path / "c.calibration")
    assert contents(again) == contents(profiled)
    assert _native.verify_bundle(str(again)) > 0


def test_the_dictionary_is_what_was_counted(measured: Calibration) -> None:
    base, first, second = routing_profile.dictionary(measured, 2)
    share = (measured.expert_tokens[2] + 0.5) / (measured.tokens + 1)
    assert np.allclose(np.frombuffer(base, "<f4"), np.log(share))
    together = measured.co_activation[2]
    assert together is not None
    expert, other = np.unravel_index(np.argmax(together), together.shape)
    given = (together[expert, other] + 8 * share[other]) / (measured.expert_tokens[1][expert] + 8)
    table = np.frombuffer(first, "<f2").reshape(together.shape)
    assert table[expert, other] == pytest.approx(np.log(given / share[other]), abs=2e-3)
    assert len(second) == len(first)


def test_diagonals_give_a_dictionary_alone(tiny_source: Path, profiled: Path, tmp_path: Path) -> None:
    diagonal = calibrate(profiled, TEXT, moments="diagonal")
    bundle = convert(tiny_source, tmp_path / "m.edgert", calibration=diagonal)
    assert paged(bundle, "auto").prefetch == "router"
    assert paged(bundle, "dictionary").prefetch == "dictionary"
    with pytest.raises(InvalidArgumentError, match="trained needs a routing profile that has it"):
        paged(bundle, "trained")


def test_a_profile_is_added_to_a_bundle_without_packing_it_again(
    profiled: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "m.edgert"
    bundle.mkdir()
    for name, content in contents(tiny_bundle).items():
        (bundle / name).write_bytes(content)
    inodes = {file.name: file.stat().st_ino for file in bundle.glob("*.bin")}
    profile = (profiled / routing_profile.NAME).read_bytes()
    for _ in range(2):  # added, then put in its own place
        routing_profile.add_to_bundle(bundle, profile)
        assert contents(bundle) == {
            **contents(tiny_bundle),
            routing_profile.NAME: profile,
            "manifest.json": (bundle / "manifest.json").read_bytes(),
        }
    assert {name: (bundle / name).stat().st_ino for name in inodes} == inodes
    assert read_manifest(bundle)["bundle_id"] == read_manifest(tiny_bundle)["bundle_id"]
    assert _native.verify_bundle(str(bundle)) > 0
    assert paged(bundle, "auto").prefetch == "trained"
    assert not list(tmp_path.glob(".*.new"))


def test_a_calibration_of_another_model_is_refused(
    measured: Calibration, tiny_source: Path, tmp_path: Path
) -> None:
    other = dataclasses.replace(measured, model=dataclasses.replace(measured.model, hidden_size=64))
    with pytest.raises(InvalidArgumentError, match="measured on another model: hidden_size is 64"):
        convert(tiny_source, tmp_path / "m.edgert", calibration=other)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("offset", "content", "kind", "complaint"),
    [
        (0, b"X", CorruptError, "offset 0: not a routing profile"),
        (8, struct.pack("<I", 9), UnsupportedError, "version 9"),
        (12, struct.pack("<I", 2**32 - 1), CorruptError, "layers with routed experts: found 4294967295"),
        (16, struct.pack("<I", 1 << 30), CorruptError, "hidden size: found 1073741824"),
        (20, struct.pack("<I", 8), CorruptError, "parts: found 8"),
        (20, struct.pack("<I", 1), CorruptError, "its header makes it"),
        (64, struct.pack("<I", 1 << 20), CorruptError, "experts: found 1048576"),
        (128, struct.pack("<f", float("nan")), CorruptError, "not finite"),
    ],
)
def test_damage_is_refused_by_offset(
    profiled: Path, tmp_path: Path, offset: int, content: bytes, kind: type[EdgertError], complaint: str
) -> None:
    bundle = tmp_path / "m.edgert"
    bundle.mkdir()
    for name, data in contents(profiled).items():
        (bundle / name).write_bytes(data)
    profile = bytearray((profiled / routing_profile.NAME).read_bytes())
    profile[offset : offset + len(content)] = content
    routing_profile.add_to_bundle(bundle, bytes(profile))
    with pytest.raises(kind, match=f"{routing_profile.NAME}.*{complaint}"):
        paged(bundle, "trained")
    assert paged(bundle, "none").prefetch == "none"


def test_a_profile_that_the_manifest_does_not_know_is_refused(profiled: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "m.edgert"
    bundle.mkdir()
    for name, data in contents(profiled).items():
        (bundle / name).write_bytes(data)
    file = bundle / routing_profile.NAME
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    with pytest.raises(CorruptError, match="checksum"):
        paged(bundle, "trained")
    file.write_bytes(bytes(changed) + bytes(64))
    with pytest.raises(CorruptError, match=f"{routing_profile.NAME}: .* the manifest says"):
        paged(bundle, "none")


def test_python_opens_what_has_a_profile(profiled: Path) -> None:
    assert routing_profile.NAME in {row["name"] for row in Bundle.open(profiled).manifest["assets"]}
    assert minimum_bytes(profiled) < 256 * MIB
