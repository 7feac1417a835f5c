"""Place recognition: which frame of a reference run shows the place of a query frame, and how often that is right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import InvalidArgumentError
from edgert.events.frames import descriptors

Rows = npt.NDArray[Any]


@dataclass(frozen=True)
class Recall:
    metres: float  # a match within is right
    at: dict[int, float]  # by K
    chance: float  # of K = 1: the share of reference frames that would be right
    hits: npt.NDArray[np.bool_]  # by query, K = 1


def distances(queries: Rows, references: Rows) -> Rows:
    """Mean absolute differences, [queries, references]."""
    return np.stack([np.abs(references - query).mean(axis=1) for query in queries])


def recall(
    distance: Rows, query_m: Rows, reference_m: Rows, metres: float = 5.0, ks: Sequence[int] = (1, 5, 10)
) -> Recall:
    """Recall@K: the share of queries with a reference within `metres` of them among the K nearest.

    Positions are metres along the run. InvalidArgumentError for shapes that do not fit."""
    if distance.shape != (len(query_m), len(reference_m)) or not distance.size:
        raise InvalidArgumentError(
            f"distance: found {distance.shape} for {len(query_m)} x {len(reference_m)} positions"
        )
    right = np.abs(query_m[:, None] - reference_m[None, :]) <= metres
    order = np.argsort(distance, axis=1, kind="stable")
    ranked = np.take_along_axis(right, order, axis=1)
    at = {k: float(ranked[:, :k].any(axis=1).mean()) for k in ks}
    return Recall(metres, at, float(right.mean()), ranked[:, 0])


def network(path: str | Path, most_frames: int = 64) -> Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]:
    """An ONNX network in place of raw pixels: frames [n, 2, height, width] to rows of unit length, through onnxruntime.

    Its input is float32 [n, 1 or 2 or 3, h, w], its first output is flattened. UnsupportedError without onnxruntime.
    """
    from edgert.errors import CorruptError, NotFoundError, UnsupportedError

    if not Path(path).is_file():
        raise NotFoundError(f"{path}: there is no such file")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UnsupportedError("a network needs onnxruntime: pip install 'edgert[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CorruptError(f"{path}: {error}") from error
    entry = session.get_inputs()[0]
    channels = entry.shape[1] if len(entry.shape) == 4 and isinstance(entry.shape[1], int) else 2

    def describe(frames: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        images = frames.astype(np.float32)
        images /= images.max(axis=(1, 2, 3), keepdims=True) + 1e-6
        if channels != 2:
            images = np.repeat((images[:, 1:] - images[:, :1]) / 2 + 0.5, channels, axis=1)
        parts = [
            session.run(None, {entry.name: images[i : i + most_frames]})[0].reshape(
                len(images[i : i + most_frames]), -1
            )
            for i in range(0, len(images), most_frames)
        ]
        rows = np.concatenate(parts)
        return np.asarray(rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12), np.float32)

    return describe


def match(
    queries: npt.NDArray[Any],
    references: npt.NDArray[Any],
    describe: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]] = descriptors,
) -> Rows:
    """Distances between frames [n, 2, height, width]."""
    return distances(describe(queries), describe(references))


def bootstrap(differences: Rows, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, 2.5 %, 97.5 %) of paired differences, one a world."""
    rng = np.random.default_rng(seed)
    means = differences[rng.integers(0, len(differences), (draws, len(differences)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)
