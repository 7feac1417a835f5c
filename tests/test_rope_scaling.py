"""Rope scaling: the frequencies that a configuration stands for are those of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgert.converters.config import Config
from edgert.converters.rope import rope_from
from edgert.errors import EdgertError

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 2048}
LONGROPE = {
    "original_max_position_embeddings": 2048,
    "short_factor": [1 + i / 64 for i in range(64)],
    "long_factor": [2.0 + i for i in range(64)],
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 2.5},  # as far as max_position_embeddings
    "llama3": LLAMA3,
    "llama3 of Llama 4": LLAMA3 | {"factor": 16.0, "high_freq_factor": 1.0},
    "yarn": YARN,
    "yarn mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn options": YARN | {"attention_factor": 0.9, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn factor from context": YARN | {"factor": None},
}


def rope(head_dim: int, keys: dict[str, Any]) -> dict[str, Any]:
    return rope_from(Config({"max_position_embeddings": 8192} | keys, "config.json"), head_dim)


@pytest.mark.parametrize("theta", [10000.0, 1000000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str, head_dim: int, theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": name.split(maxsplit=1)[0], "rope_theta": theta, **SCALINGS[name]}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            max_position_embeddings=8192,
            rope_parameters=dict(parameters),
        )
    )
    ours = rope(head_dim, {"rope_parameters": parameters})
    frequencies = np.array(ours["inv_freq"])
    assert np.array_equal(frequencies, frequencies.astype(np.float32))  # every one is a float32
    distance = frequencies.astype(np.float32).view(np.int32) - theirs.inv_freq.numpy().view(np.int32)
    # torch's vectorised pow is not correctly rounded: its last bit differs now and then.
    assert np.abs(distance).max() <= 4 and np.count_nonzero(distance) <= max(1, head_dim // 8)
    assert ours["attention_factor"] == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("seq_len", [2048, 2049])
def test_longrope_is_that_of_transformers(seq_len: int) -> None:
    from transformers import PhimoeConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        **LONGROPE,
        "short_mscale": 1.1,
        "long_mscale": 1.3,
    }
    config = PhimoeConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=8192, rope_parameters=dict(parameters)
    )
    theirs, factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=seq_len)
    ours = rope(128, {"rope_parameters": parameters})
    assert ours["long"]["beyond"] == 2048
    used = ours["long"] if seq_len > 2048 else ours
    assert used["inv_freq"] == pytest.approx(theirs.tolist(), rel=1e-6)
    assert used["attention_factor"] == (1.3 if seq_len > 2048 else 1.1)
    del parameters["short_mscale"]
    assert rope(128, {"rope_parameters": parameters})["attention_factor"] == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn"])
def test_old_and_new_keys_of_rope_scaling(name: str) -> None:
    new = rope(64, {"rope_parameters": {"rope_type": name, "rope_theta": 5e5, **SCALINGS[name]}})
    old = rope(64, {"rope_theta": 5e5, "rope_scaling": {"type": name, **SCALINGS[name]}})
    middle = rope(64, {"rope_theta": 5e5, "rope_scaling": {"rope_type": name, **SCALINGS[name]}})
    assert new == old == middle


def test_original_context_defaults_to_the_context() -> None:
    given = rope(
        64, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}
    )
    assert rope(64, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}) == given


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "'spiral'"),
        ({"rope_scaling": {"type": "dynamic"}}, "factor: missing"),
        ({"rope_scaling": {"type": "longrope"}}, "short_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 31 + [0]}}, "short_factor: holds 0"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0]}},
            "long_factor",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor: missing"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 0.5}}, "high_freq_factor"),
        ({"rope_parameters": {"rope_theta": "10000"}}, "rope_theta"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_rope_that_is_not_understood(keys: dict[str, Any], names: str) -> None:
    with pytest.raises(EdgertError, match=names):
        rope(64, keys)
