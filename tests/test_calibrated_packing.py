"""A conversion with a calibration: which moments weigh which matrix, and that the model loses less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, contents
from checkpoints import SENTENCES, tiny_checkpoint

import edgert
from edgert.calibrating import calibrate
from edgert.calibration import Calibration
from edgert.converters.assets import read_assets
from edgert.converters.bundle import write_bundle
from edgert.converters.checkpoint import open_checkpoint
from edgert.converters.convert import convert
from edgert.converters.formats import Defaults, choose_formats
from edgert.converters.layout import plan_layout
from edgert.converters.moments import Factorised, InputMoments, MomentsOf
from edgert.converters.registry import read_decoder
from edgert.errors import InvalidArgumentError

TEXT = " ".join(SENTENCES) * 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("source") / "checkpoint", hidden_size=64, moe_intermediate_size=96
    )


@pytest.fixture(scope="module")
def exact(source: Path) -> Path:
    convert(source, source.parent / "f32.edgert", **F32)
    return source.parent / "f32.edgert"


@pytest.fixture(scope="module")
def calibration(exact: Path) -> Calibration:
    return calibrate(exact, TEXT, context=64)


def pack(
    source: Path,
    directory: Path,
    calibration: Calibration | None,
    expert_format: str = "nl2_16",
    *,
    threads: int = 1,
    remainders: bool = False,
) -> Path:
    checkpoint = open_checkpoint(source)
    decoder = read_decoder(checkpoint)
    tied = decoder.recipe["output"]["tied"]
    formats = choose_formats("nl4", expert_format, None, None, None, Defaults(), tied=tied)
    layout = plan_layout(decoder, formats, alignment=4096, remainders=remainders, calibration=calibration)
    about: dict[str, Any] = {"provenance": {}, "device": None, "defaults": {}}
    assets = read_assets(checkpoint, decoder.recipe["vocab_size"])
    directory.mkdir()
    write_bundle(directory, decoder, layout, assets.files, about, {}, threads=threads, progress=None)
    return directory


def test_less_is_lost_with_a_calibration(
    source: Path, exact: Path, calibration: Calibration, tmp_path: Path
) -> None:
    with edgert.load(exact, kv_format="f32") as model:
        ids = list(model.tokenizer.encode(TEXT))[:60]
        expected = model.logits(ids)

    def lost(bundle: Path) -> float:
        with edgert.load(bundle, kv_format="f32") as packed:
            return float(np.square(packed.logits(ids) - expected).mean())

    plain = lost(pack(source, tmp_path / "plain.edgert", None))
    assert lost(pack(source, tmp_path / "aware.edgert", calibration)) < 0.7 * plain


def test_threads_do_not_show(source: Path, calibration: Calibration, tmp_path: Path) -> None:
    one, many = (
        pack(source, tmp_path / f"{threads}.edgert", calibration, threads=threads) for threads in (1, 4)
    )
    assert contents(one) == contents(many)


def test_remainders_of_codebooks_are_refused(source: Path, calibration: Calibration, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="remainders: .* whose values are not evenly spaced"):
        pack(source, tmp_path / "m.edgert", calibration, remainders=True)


class _Measured:
    """Moments that say whose they are."""

    def input_moments(self, m: int, expert: int) -> Any:
        return np.full(4, 10 * m + expert, np.float32)

    def inner_moments(self, m: int, expert: int) -> Any:
        return np.full(6, 100 + 10 * m + expert, np.float32)

    def dense_moments(self, name: str) -> Any:
        return {
            "output": np.diag(np.arange(1, 5)).astype(np.float32),
            "layers.0.attention.q": np.ones(4),
        }.get(name)


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_has_the_moments_of_what_it_reads(tied: bool) -> None:
    blocks = [{"ffn": {"kind": "dense"}}, {"ffn": {"kind": "moe"}}]
    moments = MomentsOf(_Measured(), {"blocks": blocks, "layers": [0, 1, 1], "output": {"tied": tied}})
    gate, up, down = moments.expert(2, 3)  # the second MoE layer
    assert gate is up
    assert [inputs.read()[0] for inputs in (gate, down)] == [13, 113]  # type: ignore[index]
    assert moments.dense("layers.0.attention.q").read() is not None
    assert moments.dense("layers.0.attention.k").read() is None
    embedding = moments.dense("embedding").read()
    if tied and embedding is not None:  # what it gives as the head, and its rows
        np.testing.assert_allclose(embedding, np.diag([1.75, 2.75, 3.75, 4.75]), rtol=1e-6)
    else:
        assert embedding is None
        assert not tied
        assert moments.dense("output").read() is not None


def test_shared_moments_are_made_ready_once() -> None:
    reads: list[str] = []

    def inputs(name: str) -> InputMoments:
        def read() -> Any:
            reads.append(name)
            return np.ones(4, np.float32)

        return InputMoments(name, read)

    factorised = Factorised()
    gate, up, down = factorised(inputs("a"), 4), factorised(inputs("a"), 4), factorised(inputs("b"), 4)
    assert gate is up is not down
    assert reads == ["a", "b"]
    assert factorised(None, 4) is None
    with pytest.raises(InvalidArgumentError, match="moments: 4 values; needed are 5"):
        factorised(inputs("c"), 5)
