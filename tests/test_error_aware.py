"""Packing with moments: as good as the textbook's quantiser with error feedback, in all shapes, and told apart from noise."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from edgert import _native
from edgert.errors import InvalidArgumentError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

TABLE = {row["name"]: row for row in _native.formats()}
INTEGERS = [name for name, row in TABLE.items() if row["packs_floats"] and row["scale"] != "none"]
SHAPES = [(3, 20), (17, 33), (5, 300), (40, 256), (18, 528)]  # no multiples of tile or group but one
VALUES: Mapping[str, tuple[int, ...]] = {
    "nl2": (-10, -3, 3, 10),
    "nl3": (-18, -11, -6, -2, 2, 6, 11, 18),
    "nl4": (-64, -48, -38, -29, -22, -15, -9, -3, 3, 9, 15, 22, 29, 38, 48, 64),
}


def layer(rows: int, cols: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Weights, and moments of inputs of which a few directions carry most, as those of trained layers do."""
    rng = np.random.default_rng(seed)
    weights = 0.02 * rng.standard_normal((rows, cols))
    mixing = rng.standard_normal((cols, cols)) * np.geomspace(1, 0.02, cols)
    inputs = rng.standard_normal((2 * cols + 8, cols)) @ mixing.T
    return weights.astype(np.float32), (inputs.T @ inputs / len(inputs)).astype(np.float32)


def pack(
    name: str,
    weights: Floats,
    moments: Floats | _native.Moments | None = None,
    *,
    remainder: bytearray | None = None,
    threads: int = 1,
) -> tuple[bytes, Floats, tuple[float, ...]]:
    """The bytes, the weights that they stand for, and the report."""
    rows, cols = weights.shape
    packed = bytearray(_native.packed_bytes(name, rows, cols))
    report = _native.pack(
        name, weights.data, "f32", rows, cols, destination=packed, remainder=remainder, threads=threads,
        moments=moments.data if isinstance(moments, np.ndarray) else moments,
    )  # fmt: skip
    decoded = np.frombuffer(_native.unpack(name, packed, rows, cols), np.float32).reshape(rows, cols)
    return bytes(packed), decoded, report


def weighed(errors: npt.NDArray[np.floating], moments: Floats) -> float:
    errors, full = errors.astype(np.float64), moments.astype(np.float64)
    return float(np.sum((errors @ full) * errors if full.ndim == 2 else errors * errors * full))


def plain_scale(name: str, group: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Of rows [rows, columns]: scale, and what its values are, from the range of each; [rows, 1] and [rows, values]."""
    bits = TABLE[name]["bits"]
    if TABLE[name]["codebook"] in VALUES:
        values = np.array(VALUES[TABLE[name]["codebook"]], np.float64)[None]
        scale = np.abs(group).max(-1, keepdims=True) / values.max()
    elif TABLE[name]["zero"] == "none":
        values = np.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1), dtype=np.float64)[None]
        scale = np.abs(group).max(-1, keepdims=True) / values.max()
    else:
        low = np.minimum(group.min(-1, keepdims=True), 0)
        scale = (np.maximum(group.max(-1, keepdims=True), 0) - low) / (2**bits - 1)
        values = np.arange(2**bits) - np.rint(-low / np.where(scale > 0, scale, 1))
    return scale.astype(np.float16).astype(np.float64), values, np.where(scale > 0, scale, 1)


def textbook(name: str, weights: Floats, moments: Floats) -> Doubles:
    """Frantar et al.'s quantiser in double precision: column by column, what is lost spread over those that follow by the
    Cholesky factor of the inverse; scales from the range of each group as it is reached."""
    current = weights.astype(np.float64)
    damped = moments.astype(np.float64) + np.eye(len(moments)) * 0.01 * np.trace(moments) / len(moments)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    result = np.zeros_like(current)
    for column in range(current.shape[1]):
        if column % TABLE[name]["group"] == 0:
            scale, values, _ = plain_scale(name, current[:, column : column + TABLE[name]["group"]])
        nearest = np.abs(current[:, column, None] - scale * values).argmin(-1)
        result[:, column] = (scale * values)[np.arange(len(current)), nearest]
        error = (current[:, column] - result[:, column]) / factor[column, column]
        current[:, column:] -= error[:, None] * factor[column, column:]
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", INTEGERS)
def test_no_worse_than_the_textbook(name: str, shape: tuple[int, int]) -> None:
    weights, moments = layer(*shape)
    _, ours, report = pack(name, weights, moments)
    lost = weighed(weights - ours, moments)
    assert report[3] == pytest.approx(lost, rel=1e-2, abs=1e-12)
    assert lost <= 1.001 * weighed(weights - textbook(name, weights, moments), moments) + 1e-12
    assert lost <= 1.001 * weighed(weights - pack(name, weights)[1], moments) + 1e-12


@pytest.mark.parametrize("name", ["int2", "nl2_16", "nl3", "int4"])
def test_feedback_takes_most_of_the_error(name: str) -> None:
    weights, moments = layer(64, 256)
    lost = weighed(weights - pack(name, weights, moments)[1], moments)
    assert lost < 0.5 * weighed(weights - pack(name, weights)[1], moments)


@pytest.mark.parametrize("name", INTEGERS)
def test_a_diagonal_weighs_the_search(name: str) -> None:
    weights, _ = layer(40, 300)
    diagonal = np.geomspace(1, 1e-4, 300).astype(np.float32)
    _, ours, report = pack(name, weights, diagonal)
    lost = weighed(weights - ours, diagonal)
    assert report[3] == pytest.approx(lost, rel=1e-3)
    assert lost <= 1.01 * weighed(weights - pack(name, weights)[1], diagonal)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("rank", [0, 1, 40])
def test_inputs_that_say_little(name: str, rank: int) -> None:
    """No input at all, one, and fewer than columns, of which some are never used."""
    weights, _ = layer(20, 100)
    inputs = np.random.default_rng(1).standard_normal((rank, 100)).astype(np.float32)
    inputs[:, ::3] = 0
    moments = (inputs.T @ inputs).astype(np.float32)
    _, ours, (squared, weight, *_) = pack(name, weights, moments)
    assert np.isfinite(ours).all()
    assert weighed(weights - ours, moments) <= weighed(weights, moments)
    assert np.abs(weights - ours)[:, ::3].max() <= np.abs(weights).max()
    assert squared <= 2 * weight


@pytest.mark.parametrize("name", INTEGERS)
def test_slabs_threads_and_shared_work_do_not_show(name: str) -> None:
    weights, values = layer(70, 130)
    moments = _native.Moments(values.data, 130)
    assert (moments.cols, moments.is_full) == (130, True)
    whole, _, report = pack(name, weights, values, threads=1)
    assert pack(name, weights, moments, threads=3)[0] == whole
    assert pack(name, weights, moments, threads=3)[2] == report
    for slab in (16, 48):
        assert b"".join(pack(name, weights[at : at + slab], moments)[0] for at in range(0, 70, slab)) == whole


def test_remainders_are_of_what_was_packed() -> None:
    weights, moments = layer(20, 100)
    remainder = bytearray(20 * 100)
    packed, ours, _ = pack("int4", weights, moments, remainder=remainder)
    assert packed == pack("int4", weights, moments)[0]
    steps = np.frombuffer(remainder, np.int8).reshape(20, 100).astype(np.float64)
    small = np.abs(steps) < 127
    assert small.mean() > 0.5
    assert np.all(
        np.sign(steps)[small & (np.abs(steps) > 1)] == np.sign(weights - ours)[small & (np.abs(steps) > 1)]
    )


def test_codebooks_have_no_remainders() -> None:
    weights, _ = layer(16, 32)
    with pytest.raises(InvalidArgumentError, match="nl3_16 has no remainder"):
        pack("nl3_16", weights, remainder=bytearray(16 * 32))


def test_floats_are_what_they_were() -> None:
    weights, moments = layer(20, 100)
    for name in ("f32", "f16", "bf16"):
        packed, ours, report = pack(name, weights, moments)
        assert packed == pack(name, weights)[0]
        assert report[3] == pytest.approx(weighed(weights - ours, moments), rel=1e-2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(3), "3 values; needed are 4, or as many squared"),
        (np.array([1, np.nan, 1, 1]), "row 1, column 1 is nan"),
        (np.array([1, 1, -1, 1]), "row 2, column 2 is -1"),
        (np.eye(4) + np.triu(np.ones((4, 4)), 1), "row 1, column 0 is 0: the matrix is symmetric"),
        (2 * np.ones((4, 4)) - np.eye(4), "not positive semidefinite"),
    ],
)
def test_what_are_no_moments_is_refused(values: Doubles, message: str) -> None:
    weights, _ = layer(16, 4)
    with pytest.raises(InvalidArgumentError, match=message):
        pack("int4", weights, np.ascontiguousarray(values, np.float32))
    with pytest.raises(InvalidArgumentError, match="moments of 5 columns for a matrix of 4"):
        pack("int4", weights, _native.Moments(np.ones(5, np.float32).data, 5))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("int8", "f43381383074dc4e"),
        ("int4", "ebe937f1749d99fe"),
        ("int3", "84f988b748b08c12"),
        ("int2", "1337bece4b2c5bc5"),
        ("int4_32", "f80065b054a60b89"),
        ("q4_0", "9f9a018cd0cdaa03"),
        ("q5_0", "4c41bcae8798fb1e"),
    ],
)
def test_without_moments_bytes_stay_what_they_were(name: str, digest: str) -> None:
    """Equal checkpoints give equal bundles from one version to the next."""
    weights = np.sin(np.arange(40 * 150, dtype=np.float64) ** 1.5).astype(np.float32).reshape(40, 150)
    assert xxhash.xxh64(pack(name, weights)[0]).hexdigest() == digest
