"""Rotary position embeddings: every static scaling becomes inverse frequencies and one factor.

Each step rounds to float32 where the reference implementation does, so that the frequencies agree with it.
"""

import math
import struct
from typing import Any

from edgert.errors import UnsupportedError

from .config import Config

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional", "factors")


def rope_from(
    config: Config,
    head_dim: int,
    default_theta: float = 10000.0,
    *,
    partial: float | None = None,
    layout: str = "half",
    unused: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The recipe's `rope` from `rope_theta` and `rope_scaling`, or from the newer `rope_parameters`. `partial`: the share
    of a head that rotates where config.json is silent; None for families that rotate all of it. `unused`: keys that
    change nothing in this family.

    Raises UnsupportedError for a kind of scaling or a key that is not understood.
    """
    if head_dim % 2:
        config.fail("head_dim", f"{head_dim}; rotary embeddings need an even one")
    scaling = _scaling(config)
    outer_theta = config.number("rope_theta", default_theta, minimum=1.001, maximum=1e12)
    theta = scaling.number("rope_theta", outer_theta, minimum=1.001, maximum=1e12)
    kind = scaling.choice("rope_type", scaling.choice("type", "default", _KINDS), _KINDS)
    rotated = head_dim if kind == "proportional" else _rotated(config, scaling, head_dim, partial)
    powers = [_f32(_f32(theta) ** _f32(i / rotated)) for i in range(0, rotated, 2)]
    frequencies = [_f32(1.0 / power) for power in powers]
    attention_factor = 1.0
    if kind == "linear":
        factor = _f32(scaling.number("factor", minimum=1.0, maximum=1e6))
        frequencies = [_f32(frequency / factor) for frequency in frequencies]
    elif (
        kind == "dynamic"
    ):  # changes frequencies only past max_position_embeddings, which no sequence exceeds
        scaling.number("factor", minimum=1.0, maximum=1e6)
    elif kind == "llama3":
        frequencies = _llama3(config, scaling, frequencies)
    elif kind == "yarn":
        frequencies, attention_factor = _yarn(config, scaling, powers, theta)
    elif kind == "proportional":
        frequencies = _proportional(scaling, frequencies)
    elif kind == "factors":
        frequencies = _divided(scaling, frequencies)
    long: dict[str, Any] = {}
    if kind == "longrope":
        frequencies, attention_factor, long = _longrope(config, scaling, powers)
    for key in unused:
        scaling.get(key)
    scaling.finish()
    layout = "interleaved" if config.flag("rope_interleaved", layout == "interleaved") else "half"
    return {"layout": layout, "inv_freq": frequencies, "attention_factor": attention_factor, **long}


def _rotated(config: Config, scaling: Config, head_dim: int, partial: float | None) -> int:
    """How many elements of a head rotate."""
    if partial is None:
        if scaling.number("partial_rotary_factor", 1.0, minimum=0.0) != 1.0:
            raise UnsupportedError(
                f"{scaling.where}: partial_rotary_factor: only 1.0 is supported for this model_type"
            )
        return head_dim
    outer = config.number("partial_rotary_factor", partial, minimum=0.0, maximum=1.0)
    share = scaling.number("partial_rotary_factor", outer, minimum=0.0, maximum=1.0)
    rotated = int(head_dim * share)
    if rotated < 2 or rotated % 2:
        scaling.fail("partial_rotary_factor", f"{share}; an even number of {head_dim} elements must rotate")
    return rotated


def query_scale(config: Config) -> float:
    """What yarn's `mscale_all_dim` multiplies scores with where a model type heeds it."""
    scaling = _scaling(config)
    all_dim = scaling.number("mscale_all_dim", 0.0, minimum=0.0)
    if not all_dim or scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return 1.0
    return _yarn_scale(scaling.number("factor", minimum=1e-3, maximum=1e6), all_dim) ** 2


def _scaling(config: Config) -> Config:
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    key, values = ("rope_scaling", old) if old else ("rope_parameters", new or {})
    if not isinstance(values, dict):
        config.fail(key, f"{str(values)[:80]}; an object is allowed")
    return Config(values, f"{config.where}: {key}")


def _divided(scaling: Config, frequencies: list[float]) -> list[float]:
    """GGUF files state what each frequency is divided by."""
    factors = scaling.get("factors")
    if not isinstance(factors, list) or len(factors) != len(frequencies):
        scaling.fail("factors", f"{str(factors)[:80]}; {len(frequencies)} numbers are needed")
    if not all(isinstance(factor, float) and 1e-6 <= factor <= 1e6 for factor in factors):
        scaling.fail("factors", f"{str(factors)[:80]}; numbers from 1e-6 to 1e6 are allowed")
    return [_f32(frequency / factor) for frequency, factor in zip(frequencies, factors, strict=True)]


def _original_context(config: Config, scaling: Config) -> int:
    inner = scaling.integer(
        "original_max_position_embeddings",
        config.integer("max_position_embeddings", maximum=1 << 30),
        maximum=1 << 30,
    )
    return config.integer("original_max_position_embeddings", inner, maximum=1 << 30)


def _llama3(config: Config, scaling: Config, frequencies: list[float]) -> list[float]:
    factor = scaling.number("factor", minimum=1.0, maximum=1e6)
    low = scaling.number("low_freq_factor", minimum=1e-6)
    high = scaling.number("high_freq_factor", minimum=1e-6)
    if high < low:
        scaling.fail("high_freq_factor", f"{high}; at least low_freq_factor, {low}, is needed")
    context = _original_context(config, scaling)

    def scaled(frequency: float) -> float:
        wavelength = _f32(_f32(2 * math.pi) / frequency)
        if wavelength > _f32(context / low):
            return _f32(frequency / _f32(factor))
        if wavelength < _f32(context / high) or high == low:  # Llama 4 Scout has nothing between them
            return frequency
        smooth = _f32(_f32(_f32(context / wavelength) - _f32(low)) / _f32(high - low))
        slow = _f32(_f32(_f32(1.0 - smooth) * frequency) / _f32(factor))
        return _f32(slow + _f32(smooth * frequency))

    return [scaled(frequency) for frequency in frequencies]


def _yarn(config: Config, scaling: Config, powers: list[float], theta: float) -> tuple[list[float], float]:
    context = _original_context(config, scaling)
    extended = config.integer("max_position_embeddings", maximum=1 << 30)
    factor = scaling.number("factor", extended / context, minimum=1e-3, maximum=1e6)
    mscale = scaling.number("mscale", 0.0, minimum=0.0)
    mscale_all_dim = scaling.number("mscale_all_dim", 0.0, minimum=0.0)
    if mscale and mscale_all_dim:
        default_attention = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
    else:
        default_attention = _yarn_scale(factor, 1.0)
    attention_factor = scaling.number("attention_factor", default_attention, minimum=0.0)

    dimensions = 2 * len(powers)

    def dimension_of(rotations: float) -> float:
        return dimensions * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(scaling.number("beta_fast", 32.0, minimum=1e-6))
    high = dimension_of(scaling.number("beta_slow", 1.0, minimum=1e-6))
    if scaling.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dimensions - 1)
    if low == high:
        high += 0.001

    def blended(index: int, power: float) -> float:
        ramp = min(max(_f32(_f32(index - _f32(low)) / _f32(high - low)), 0.0), 1.0)
        kept = _f32(1.0 - ramp)
        interpolated = _f32(1.0 / _f32(_f32(factor) * power))
        return _f32(_f32(interpolated * _f32(1.0 - kept)) + _f32(_f32(1.0 / power) * kept))

    return [blended(index, power) for index, power in enumerate(powers)], attention_factor


def _proportional(scaling: Config, frequencies: list[float]) -> list[float]:
    """The slower ones are zero: of the head, their elements do not rotate."""
    share = scaling.number("partial_rotary_factor", 1.0, minimum=0.0, maximum=1.0)
    factor = _f32(scaling.number("factor", 1.0, minimum=1e-6, maximum=1e6))
    count = int(share * 2 * len(frequencies) // 2)
    return [_f32(value / factor) if i < count else 0.0 for i, value in enumerate(frequencies)]


def _longrope(
    config: Config, scaling: Config, powers: list[float]
) -> tuple[list[float], float, dict[str, Any]]:
    """Frequencies and factor for contexts up to the original one, and the recipe's `long` for longer ones."""
    original = _original_context(config, scaling)
    extended = config.integer("max_position_embeddings", maximum=1 << 30)
    factor = scaling.number("factor", extended / original, minimum=1e-3, maximum=1e6)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
    attention_factor = scaling.number("attention_factor", default, minimum=0.0)

    def stretched(key: str) -> list[float]:
        factors = scaling.get(key)
        if not isinstance(factors, list) or len(factors) != len(powers):
            scaling.fail(key, f"{str(factors)[:80]}; a list of {len(powers)} numbers is needed")
        for value in factors:
            if type(value) not in (int, float) or not 1e-6 <= value <= 1e6:
                scaling.fail(key, f"holds {str(value)[:80]}; numbers from 1e-6 to 1e6 are allowed")
        return [_f32(1.0 / _f32(_f32(value) * power)) for value, power in zip(factors, powers, strict=True)]

    short = stretched("short_factor")
    long = {
        "beyond": original,
        "inv_freq": stretched("long_factor"),
        "attention_factor": scaling.number("long_mscale", attention_factor, minimum=0.0),
    }
    return short, scaling.number("short_mscale", attention_factor, minimum=0.0), {"long": long}


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _f32(value: float) -> float:
    """Rounded to the nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
