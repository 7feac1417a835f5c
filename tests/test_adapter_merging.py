"""Adapters merged by TIES, DARE and breadcrumbs, against what the papers say and PEFT computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft_directories import lora, shira
from shell import Shell, assert_fails

from edgert.converters.adapter_part import Part
from edgert.converters.merging import Thinning, merge
from edgert.errors import InvalidArgumentError, UnsupportedError

SHAPE = (24, 40)
SCALES = (0.8, 0.5, -1.5)


def low_rank(seed: int, rank: int = 3) -> Part:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, SHAPE[1]), (SHAPE[0], rank)))
    return Part("m", a, b, scale=0.25)


def sparse(seed: int, count: int = 90) -> Part:
    rng = np.random.default_rng(seed)
    rows, cols = np.unravel_index(rng.choice(SHAPE[0] * SHAPE[1], count, replace=False), SHAPE)
    values = rng.standard_normal(count).astype(np.float32)
    return Part("m", rows=rows.astype(np.int32), cols=cols.astype(np.int32), values=values)


def dense(part: Part) -> np.ndarray:
    out = np.zeros(SHAPE)
    factors = part.factors()
    if factors is not None:
        out += factors[1] @ factors[0]
    if part.values is not None:
        out[part.rows, part.cols] += part.values
    return out


def kept(delta: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest in magnitude."""
    out = np.zeros(delta.size)
    places = np.argsort(-np.abs(delta.reshape(-1)), kind="stable")[:count]
    out[places] = delta.reshape(-1)[places]
    return out.reshape(delta.shape)


def ties(deltas: Sequence[np.ndarray], counts: Sequence[int], scales: Sequence[float]) -> np.ndarray:
    """Trim, elect a sign for every element, take the mean of those that have it (arXiv 2306.01708, algorithm 1)."""
    trimmed = [kept(delta, count) for delta, count in zip(deltas, counts, strict=True)]
    out = np.zeros(SHAPE)
    for place in np.ndindex(SHAPE):
        elected = 1 if sum(delta[place] for delta in trimmed) >= 0 else -1
        agree = [
            s * delta[place]
            for s, delta in zip(scales, trimmed, strict=True)
            if np.sign(delta[place]) == elected
        ]
        out[place] = sum(agree) / max(len(agree), 1)
    return out


def breadcrumbs(deltas: Sequence[np.ndarray], share: float, top: float) -> np.ndarray:
    """Neither the smallest nor the very largest (arXiv 2312.06795)."""
    size = deltas[0].size
    crumbs = [kept(d, int((share + top) * size)) - kept(d, int(top * size)) for d in deltas]
    return np.asarray(sum(s * crumb for s, crumb in zip(SCALES, crumbs, strict=True)))


LOW_RANK = [low_rank(seed) for seed in range(3)]
SPARSE = [sparse(seed) for seed in range(3)]


def merged(parts: Sequence[Part], **thinning: object) -> np.ndarray:
    (part,) = merge([([one], scale) for one, scale in zip(parts, SCALES, strict=True)], Thinning(**thinning))  # type: ignore[arg-type]
    assert part.a is None
    return dense(part)


def test_ties() -> None:
    deltas = [dense(part) for part in LOW_RANK]
    expected = ties(deltas, [int(0.3 * 960)] * 3, SCALES)
    np.testing.assert_allclose(merged(LOW_RANK, method="ties", density=0.3), expected, atol=1e-6)


def test_of_sparse_adapters_the_density_is_of_the_values_that_they_have() -> None:
    expected = ties([dense(part) for part in SPARSE], [45] * 3, SCALES)
    np.testing.assert_allclose(merged(SPARSE, method="ties", density=0.5), expected, atol=1e-6)


def test_breadcrumbs() -> None:
    expected = breadcrumbs([dense(part) for part in LOW_RANK], 0.3, 0.05)
    found = merged(LOW_RANK, method="breadcrumbs", density=0.3, outliers=0.05)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_dare_drops_at_random_and_scales_what_is_left() -> None:
    """(arXiv 2311.03099): every element is dropped or divided by the density, so that the expectation stays."""
    delta = dense(LOW_RANK[0]).astype(np.float32)
    once = Part("m", LOW_RANK[0].a, LOW_RANK[0].b, scale=0.25)
    results = []
    for seed in range(40):
        (part,) = merge([([once], 1.0)], Thinning("dare", 0.25, seed=seed))
        result = dense(part)
        dropped = result == 0
        np.testing.assert_allclose(result[~dropped], delta[~dropped] * 4, rtol=1e-5)
        assert 0.65 < dropped.mean() < 0.85
        results.append(result)
    assert len({result.tobytes() for result in results}) == 40
    spread = np.sqrt(3 / 40) * np.abs(delta)  # of the mean of 40 draws
    assert (np.abs(np.mean(results, 0) - delta) < 6 * spread + 1e-6).all()
    again = merge([([once], 1.0)], Thinning("dare", 0.25, seed=39))[0]
    np.testing.assert_array_equal(dense(again), results[-1])


def test_dare_draws_for_each_adapter_and_matrix_anew() -> None:
    parts = [low_rank(0), low_rank(0)]
    found = merge([([parts[0]], 1.0), ([parts[1]], 1.0)], Thinning("dare", 0.5))
    assert (
        len(np.unique(np.round(dense(found[0]) / (4 * dense(parts[0])), 3))) == 3
    )  # none, one or both of them


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_and_magnitude_are_those_of_peft(density: float) -> None:
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("peft.utils.merge_utils")
    deltas = [torch.tensor(dense(part)) for part in LOW_RANK]
    expected = utils.ties(deltas, torch.tensor(SCALES), density).numpy()
    np.testing.assert_allclose(merged(LOW_RANK, method="ties", density=density), expected, atol=1e-6)
    expected = utils.magnitude_prune(deltas, torch.tensor(SCALES), density).numpy()
    found = merged(LOW_RANK, method="breadcrumbs", density=density, outliers=0.0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_sum_of_low_rank_ones_is_that_of_peft(tmp_path: Path) -> None:
    """add_weighted_adapter(combination_type="cat") of LoRA made by PEFT."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from edgert.converters.fuse import fuse
    from edgert.converters.peft import read_peft

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(SHAPE[1], SHAPE[0])})
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config, adapter_name="a")
    adapted.add_adapter("b", config)
    adapted.add_weighted_adapter(["a", "b"], [0.8, 0.5], "sum", combination_type="cat")
    adapted.save_pretrained(tmp_path)
    read = {name: read_peft(tmp_path / name).deltas[0] for name in ("a", "b", "sum")}
    parts = {name: Part("m", delta.a, delta.b, delta.scale) for name, delta in read.items()}
    (fused,) = fuse([([parts["a"]], 0.8), ([parts["b"]], 0.5)])
    np.testing.assert_allclose(dense(fused), dense(parts["sum"]), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"method": "mean"}, "method: found 'mean', allowed are sum, ties, dare, breadcrumbs"),
        ({"method": "ties", "density": 0.0}, "density: found 0.0"),
        ({"method": "ties", "density": float("nan")}, "density: found nan"),
        ({"method": "dare", "density": 1.5}, "density: found 1.5"),
        ({"method": "breadcrumbs", "outliers": -1.0}, "outliers: found -1.0"),
        ({"method": "dare", "seed": -1}, "seed: found -1"),
    ],
)
def test_options_that_are_none(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Thinning(**options)  # type: ignore[arg-type]
    assert complaint in str(caught.value)


def test_what_is_no_plain_difference_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="^m: ties merges LoRA and sparse differences"):
        merge([([Part("m", gain=np.ones(24, np.float32))], 1.0)], Thinning("ties"))


def test_the_command_fuses(edgert: Shell, tiny_bundle: Path, tmp_path: Path) -> None:
    one, two = lora().write(tmp_path / "one"), shira().write(tmp_path / "two")
    base: tuple[object, ...] = ("--base", tiny_bundle)

    def make(*given: object) -> Any:
        sources = (f"{one}:0.8", f"{two}:0.5")
        return edgert.json("adapter", "fuse", *sources, "-o", tmp_path / "out.adapter", *given, *base)

    thin, thick = (make("--method", "ties", "--density", share) for share in (0.1, 0.4))
    assert thin["bytes"] < thick["bytes"]
    assert make("--method", "dare", "--seed", 3)["matrices"]
    done = edgert(
        "run", tiny_bundle, "--raw", "-p", "The", "--max-tokens", 2, "--adapter", tmp_path / "out.adapter"
    )
    assert done.returncode == 0, done.stderr
    assert_fails(
        edgert("adapter", "fuse", one, "-o", tmp_path / "x", "--method", "mean", *base),
        "method: found 'mean'",
    )
