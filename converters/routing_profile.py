"""The routing profile of a bundle, from a calibration: what the engine's predictors know of how layers follow each other.

docs/bundle-format.md describes the file.
"""

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert import _native
from edgert.bundle import Bundle
from edgert.calibration import Calibration
from edgert.errors import StorageError

from .bundle import write_file
from .decoder import Decoder
from .manifest import seal
from .output import BundleOutput

NAME = "routing_profile.bin"
VERSION = 1
DICTIONARY = 1
CORRECTION = 2  # the parts

_MAGIC = b"EDGERTRP"
_HEADER = struct.Struct("<8sIIII40x")
_LINE = 64
_FORMAT = "int8"
_PRIOR = 8.0  # uses for which an expert's general frequency stands in
# What the further of two layers adds counts half: much of it the nearer one has said.
_SHARE = {1: 1.0, 2: 0.5}
_LEAST_RIDGE = 1e-3  # of the mean square of the router's inputs

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Router:
    """Of an MoE layer: f64 [E, H], and the weight [H] of the norm in front of it."""

    weights: Doubles
    norm: Doubles


def routing_profile(calibration: Calibration, routers: Sequence[Router]) -> bytes:
    """The file. The correction is left out where the calibration has only diagonals of the routers' inputs, for what the
    channels have in common is what it is made of."""
    model = calibration.model
    corrects = len(model.moe) > 1 and all(moments.ndim == 2 for moments in calibration.router_moments)
    parts = DICTIONARY | (CORRECTION if corrects else 0)
    blocks = [
        _HEADER.pack(_MAGIC, VERSION, len(model.moe), model.hidden_size, parts)
        + struct.pack(f"<{len(model.moe)}I", *(row.num_experts for row in model.moe))
    ]
    for m in range(len(model.moe)):
        blocks += dictionary(calibration, m)
    if corrects:
        for m in range(1, len(model.moe)):
            blocks += correction(calibration, routers, m)
    return b"".join(block + bytes(-len(block) % _LINE) for block in blocks)


def dictionary(calibration: Calibration, m: int) -> list[bytes]:
    """Of MoE layer m: log frequency f32 [E], then for each of the two layers before it what each of their experts adds to
    that, f16 [E there, E]: log P(j | i) - log P(j)."""
    tokens, used = calibration.tokens, calibration.expert_tokens[m]
    share = (used + 0.5) / (tokens + 1)
    blocks = [np.log(share).astype("<f4").tobytes()]
    for d, together in ((1, calibration.co_activation[m]), (2, calibration.co_activation_2[m])):
        if together is None:
            continue
        before = calibration.expert_tokens[m - d][:, None]
        given = (together + _PRIOR * share) / (before + _PRIOR)
        blocks.append((_SHARE[d] * np.log(given / share)).astype("<f2").tobytes())
    return blocks


def correction(calibration: Calibration, routers: Sequence[Router], m: int) -> list[bytes]:
    """From the router's input x at the MoE layer before to the logits of MoE layer m: f32 [E] and a packed matrix [E, H].

    Ridge regression around the layer's own router, which reads x as if nothing came between: the fewer tokens were
    measured, the nearer to it.
    """
    hidden, tokens = calibration.model.hidden_size, calibration.tokens
    mean = calibration.router_mean[m - 1].astype(np.float64)
    logits = calibration.router_logits[m].astype(np.float64)
    covariance = calibration.router_moments[m - 1].astype(np.float64) - np.outer(mean, mean)
    cross = calibration.router_cross[m - 1][1].astype(np.float64) - np.outer(mean, logits)
    before, own = routers[m - 1], routers[m]
    ratio = np.divide(own.norm, before.norm, out=np.zeros(hidden), where=np.abs(before.norm) > 1e-6)
    near = (own.weights * ratio).T
    ridge = np.trace(covariance) / hidden * max(_LEAST_RIDGE, hidden / tokens)
    far = np.linalg.solve(covariance + ridge * np.eye(hidden), cross - covariance @ near)
    weights = (near + far).T.astype("<f4")
    packed = bytearray(_native.packed_bytes(_FORMAT, *weights.shape))
    _native.pack(_FORMAT, weights.tobytes(), "f32", *weights.shape, destination=packed, threads=1)
    return [(logits - weights @ mean).astype("<f4").tobytes(), bytes(packed)]


def routers_of(decoder: Decoder) -> list[Router]:
    """From the checkpoint, by MoE layer."""
    sources = {tensor.name: tensor for tensor in decoder.dense}

    def floats(name: str) -> Doubles:
        tensor = sources[name]
        source = tensor.source
        with source.tensor.open() as reader:
            raw, dtype = reader.floats(source.first_row, source.rows, source.step)
        return _as_floats(raw, dtype).reshape(tensor.shape)

    routers = []
    for layer, block in enumerate(decoder.recipe["layers"]):
        ffn: Mapping[str, Any] = decoder.recipe["blocks"][block]["ffn"]
        if ffn["kind"] != "moe":
            continue
        norm = "router_norm" if ffn.get("branch_norms") else "ffn_norm"
        routers.append(Router(floats(f"layers.{layer}.router"), floats(f"layers.{layer}.{norm}")))
    return routers


def _as_floats(raw: bytes | bytearray, dtype: str) -> Doubles:
    if dtype == "bf16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return np.frombuffer(raw, {"f32": "<f4", "f16": "<f2"}[dtype]).astype(np.float64)


def add_to_bundle(bundle: str | os.PathLike[str], profile: bytes) -> None:
    """Give a bundle this routing profile, in place of one that it has, without packing it again: the new bundle shares the
    other files with the old one until it takes its place, in one step. Raises StorageError and what Bundle.open() raises."""
    manifest = {key: value for key, value in Bundle.open(Path(bundle)).manifest.items() if key != "checksum"}
    others = [row for row in manifest["assets"] if row["name"] != NAME]
    row = {"name": NAME, "bytes": len(profile), "checksum": _native.xxh64(profile)}
    assets = sorted([*others, row], key=lambda asset: str(asset["name"]))
    content = {NAME: profile, "manifest.json": seal({**manifest, "assets": assets})}
    try:
        with BundleOutput(bundle) as place:
            for kept in (*manifest["files"], *others):
                os.link(place.path / kept["name"], place.directory / kept["name"])
            for name, data in content.items():
                write_file(place.directory / name, data)
            place.commit()
    except OSError as error:
        raise StorageError(f"{os.fspath(bundle)}: {error.strerror or error}") from error
