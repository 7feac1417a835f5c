"""Images of events, and what place recognition makes of them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import InvalidArgumentError
from edgert.events.stream import Events

FRAME_S = 0.066
_BLUE, _RED = 0.114, 0.299  # shares of grey
Images = npt.NDArray[Any]


def event_frames(
    events: Events,
    size: tuple[int, int],
    seconds: float = FRAME_S,
    start: int | None = None,
    most: int = 1 << 16,
) -> npt.NDArray[np.int32]:
    """Counts by polarity, [frames, 2 (off, on), height, width]; the last frame is whole or left out.

    `start`: microseconds where the first begins, the first event's time by default. InvalidArgumentError for more than
    `most` frames: events so far apart are no recording of one scene.
    """
    width, height = size
    if not len(events):
        return np.zeros((0, 2, height, width), np.int32)
    length = round(seconds * 1e6)
    first = int(events["t"][0]) if start is None else start
    frame = (events["t"] - first) // length
    count = int((int(events["t"].max()) - first) // length)
    if count > most:
        raise InvalidArgumentError(f"events: found {count} frames of {seconds} s, allowed are {most}")
    inside = (frame >= 0) & (frame < count)
    kept, frame = events[inside], frame[inside]
    index = ((frame * 2 + kept["on"]) * height + kept["y"]) * width + kept["x"]
    return (
        np.bincount(index, minlength=count * 2 * height * width)
        .reshape(count, 2, height, width)
        .astype(np.int32)
    )


def kept_frames(frames: Images, positions: npt.NDArray[Any] | None = None) -> npt.NDArray[np.bool_]:
    """False for frames in which the camera stood still (metres by frame, where known) and for those with more events than
    the mean and three standard deviations."""
    counts = frames.sum(axis=(1, 2, 3)).astype(float)
    keep: npt.NDArray[np.bool_] = (
        counts <= counts.mean() + 3 * counts.std() if len(counts) else np.zeros(0, bool)
    )
    if positions is not None:
        keep &= np.abs(np.gradient(positions)) > 1e-6 if len(positions) > 1 else True
    return keep


def descriptors(frames: Images, quarter: bool = True, patch: int = 8) -> npt.NDArray[np.float32]:
    """One row a frame: both polarities equalised, summed as the grey of a picture with off in blue and on in red, at a
    quarter of the size, patches made alike in mean and deviation."""
    images = _BLUE * equalised(frames[:, 0]) + _RED * equalised(frames[:, 1])
    images = reduced(images, 4) if quarter else images
    return patch_normalised(images, patch).reshape(len(images), -1)


def equalised(images: Images) -> npt.NDArray[np.float32]:
    """Each value becomes the share of the image's pixels that are no greater."""
    flat = images.reshape(len(images), -1)
    out = np.empty(flat.shape, np.float32)
    for i, row in enumerate(flat):
        values, places, counts = np.unique(row, return_inverse=True, return_counts=True)
        assert len(values)
        out[i] = (np.cumsum(counts) - counts / 2)[places.ravel()] / row.size
    return out.reshape(images.shape)


def reduced(images: Images, factor: int) -> Images:
    """Means of blocks; what does not fill a block at the right and below is left out."""
    n, height, width = images.shape
    rows, columns = height // factor, width // factor
    if not rows or not columns:
        raise InvalidArgumentError(f"images of {width} x {height} cannot be reduced by {factor}")
    blocks = images[:, : rows * factor, : columns * factor].reshape(n, rows, factor, columns, factor)
    return np.asarray(blocks.mean(axis=(2, 4)))


def patch_normalised(images: Images, patch: int = 8) -> npt.NDArray[np.float32]:
    """Patches of `patch` x `patch` pixels, smaller ones at the edges, to mean 0 and deviation 1."""
    out = images.astype(np.float32).copy()
    for top in range(0, out.shape[1], patch):
        for left in range(0, out.shape[2], patch):
            tile = out[:, top : top + patch, left : left + patch]
            tile -= tile.mean(axis=(1, 2), keepdims=True)
            tile /= tile.std(axis=(1, 2), keepdims=True) + 1e-6
    return out
