"""Kinds of sequence mixing beside plain attention, as docs/bundle-format.md describes them; a part of the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from oracle import Oracle, Weight


def latent_attention(reader: Oracle, x: np.ndarray, mixer: dict[str, Any], prefix: str) -> np.ndarray:
    from oracle import rms_norm, rotate, softmax

    def biased(name: str, y: np.ndarray, key: str) -> np.ndarray:
        return y + reader.vector(f"{name}_bias") if mixer.get(key) else y

    prefix += "attention."
    n, heads, rank, nope = len(x), mixer["num_heads"], mixer["kv_rank"], mixer["nope_head_dim"]
    if mixer["q_rank"] is None:
        q = reader.matrix(prefix + "q")(x)
    else:
        low = biased(prefix + "q_a", reader.matrix(prefix + "q_a")(x), "qkv_bias")
        q = reader.matrix(prefix + "q_b")(
            rms_norm(low, reader.vector(prefix + "q_a_norm"), mixer["norm_eps"])
        )
    q = q.reshape(n, heads, -1)
    compressed = biased(prefix + "kv_a", reader.matrix(prefix + "kv_a")(x), "qkv_bias")
    latent = rms_norm(compressed[:, :rank], reader.vector(prefix + "kv_a_norm"), mixer["norm_eps"])
    rotated = rotate(compressed[:, None, rank:], mixer["rope"])
    q_nope, q_rope = q[..., :nope], rotate(q[..., nope:], mixer["rope"])
    absorbed = by_head(reader.matrix(prefix + "k_b"), q_nope)
    scores = np.einsum("qhr,kr->hqk", absorbed, latent) + np.einsum("qhd,kd->hqk", q_rope, rotated[:, 0])
    weights = softmax(np.where(np.tri(n, dtype=bool), scores * mixer["scale"], -np.inf))
    attended = by_head(reader.matrix(prefix + "v_b"), np.einsum("hqk,kr->qhr", weights, latent))
    return biased(prefix + "o", reader.matrix(prefix + "o")(attended.reshape(n, -1)), "output_bias")


def by_head(weight: Weight, x: np.ndarray) -> np.ndarray:
    """Each head's rows of `weight` with its part of x [n, heads, cols]."""
    heads = x.shape[1]
    rows = weight.values.reshape(heads, -1, x.shape[2])
    return np.stack([replace(weight, values=rows[h])(x[:, h]) for h in range(heads)], axis=1)


def convolve(x: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Causal and depthwise: x [n, channels], taps [channels, kernel]."""
    kernel = taps.shape[1]
    padded = np.concatenate([np.zeros((kernel - 1, x.shape[1])), x])
    return np.asarray(sum(padded[k : k + len(x)] * taps[:, k] for k in range(kernel)))


def gated_delta(reader: Oracle, x: np.ndarray, mixer: dict[str, Any], prefix: str) -> np.ndarray:
    from oracle import rms_norm, sigmoid

    prefix += "delta."
    n, heads, key_dim = len(x), mixer["num_value_heads"], mixer["key_head_dim"]
    part = {name: reader.matrix(prefix + name)(x) for name in "qkvzab"}
    mixed = convolve(
        np.concatenate([part[name] for name in "qkv"], axis=1), reader.matrix(prefix + "conv").values
    )
    mixed = mixed * sigmoid(mixed)
    keys = mixer["num_key_heads"] * key_dim
    shared = heads // mixer["num_key_heads"]
    q, k = (y.reshape(n, -1, key_dim) for y in (mixed[:, :keys], mixed[:, keys : 2 * keys]))
    tiled = mixer.get("tiled", False)
    q, k = (np.tile(y, (1, shared, 1)) if tiled else y.repeat(shared, axis=1) for y in (q, k))
    q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    v = mixed[:, 2 * keys :].reshape(n, heads, -1)
    beta = sigmoid(part["b"])
    g = reader.vector(prefix + "decay") * np.logaddexp(0, part["a"] + reader.vector(prefix + "dt_bias"))
    state, out = np.zeros((heads, key_dim, v.shape[-1])), np.zeros_like(v)
    for t in range(n):
        state *= np.exp(g[t])[:, None, None]
        error = v[t] - np.einsum("hk,hkv->hv", k[t], state)
        state += np.einsum("hk,hv->hkv", k[t], beta[t][:, None] * error)
        out[t] = np.einsum("hk,hkv->hv", q[t] / np.sqrt(key_dim), state)
    out = rms_norm(out, reader.vector(prefix + "norm"), mixer["norm_eps"]).reshape(n, -1)
    return reader.matrix(prefix + "o")(out * part["z"] * sigmoid(part["z"]))


def short_conv(reader: Oracle, x: np.ndarray, mixer: dict[str, Any], prefix: str) -> np.ndarray:
    def bias(name: str) -> np.ndarray | float:
        return reader.vector(prefix + name) if mixer.get("bias") else 0.0

    prefix += "conv."
    b, c, y = np.split(reader.matrix(prefix + "in")(x) + bias("in_bias"), 3, axis=1)
    convolved = convolve(b * y, reader.matrix(prefix + "conv").values) + bias("bias")
    return reader.matrix(prefix + "o")(c * convolved) + bias("o_bias")


MIXERS = {"latent_attention": latent_attention, "gated_delta": gated_delta, "short_conv": short_conv}
