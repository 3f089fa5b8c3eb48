"""Rotary position embeddings (arXiv 2104.09864) as HF's LLaMA lays them out: the two halves of a head are rotated."""

import math
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlora_jax.models.config import RopeScaling


class Rotary(Protocol):
    """What a configuration says of rotary positions: the first `rotary_dim` features of a head are rotated."""

    @property
    def head_dim(self) -> int: ...
    @property
    def rotary_dim(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> RopeScaling | None: ...


def inverse_frequencies(config: Rotary) -> np.ndarray:
    """Angle per position of each pair of features, float32 `[rotary_dim / 2]`: `theta^(-2i / rotary_dim)`, scaled.

    "linear" divides all of them by the factor. "llama3" (Llama 3.1) divides those whose wavelength is above
    `original_max_position_embeddings / low_freq_factor`, leaves those below `original / high_freq_factor`, and goes
    from one to the other linearly in between. "yarn" (arXiv 2309.00071, section 3.2) does so linearly in the index of
    the pair, between those that turn `beta_fast` and `beta_slow` times within the original length.
    """
    frequencies = config.rope_theta ** (-np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    scaled = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return scaled.astype(np.float32)
    if scaling.rope_type == "yarn":
        keep = 1 - _yarn_ramp(config, scaling)
        return (keep * frequencies + (1 - keep) * scaled).astype(np.float32)
    # How often a pair turns within the original length: many turns = high frequency.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return (keep * frequencies + (1 - keep) * scaled).astype(np.float32)


def _yarn_ramp(config: Rotary, scaling: RopeScaling) -> np.ndarray:
    """0 for pairs that keep their frequency, 1 for those that are slowed by the whole factor."""

    def pair_that_turns(times: float) -> float:
        length = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return config.rotary_dim * math.log(length) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    return np.clip((np.arange(config.rotary_dim // 2) - low) / ((high - low) or 0.001), 0, 1)


def rotations(
    positions: Int[Array, "batch seq"], config: Rotary
) -> tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]:
    """Cosines and sines of each position's angles, float32, with an axis for heads; of "yarn" times its factor."""
    frequencies = jnp.asarray(inverse_frequencies(config)).reshape(1, 1, 1, -1)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotate(
    x: Float[Array, "batch seq heads dim"],
    cos: Float[Array, "batch seq 1 half"],
    sin: Float[Array, "batch seq 1 half"],
) -> Float[Array, "batch seq heads dim"]:
    """Rotates feature pairs (i, i + half) by their angles, in float32; the result has x's dtype.

    Features after the first `2 * half` are left as they are.
    """
    rotated, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)
