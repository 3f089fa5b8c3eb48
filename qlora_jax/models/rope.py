"""Rotary position embeddings (arXiv 2104.09864) as HF's LLaMA lays them out: the two halves of a head are rotated."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlora_jax.models.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angle per position of each pair of features, float32 `[head_dim / 2]`: `theta^(-2i / head_dim)`, scaled.

    "linear" divides all of them by the factor. "llama3" (Llama 3.1) divides those whose wavelength is above
    `original_max_position_embeddings / low_freq_factor`, leaves those below `original / high_freq_factor`, and goes
    from one to the other linearly in between.
    """
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    scaled = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return scaled.astype(np.float32)
    # How often a pair turns within the original length: many turns = high frequency.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return (keep * frequencies + (1 - keep) * scaled).astype(np.float32)


def rotations(
    positions: Int[Array, "batch seq"], config: LlamaConfig
) -> tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]:
    """Cosines and sines of each position's angles, float32, with an axis for heads."""
    frequencies = jnp.asarray(inverse_frequencies(config)).reshape(1, 1, 1, -1)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch seq heads dim"],
    cos: Float[Array, "batch seq 1 half"],
    sin: Float[Array, "batch seq 1 half"],
) -> Float[Array, "batch seq heads dim"]:
    """Rotates feature pairs (i, i + dim/2) by their angles, in float32; the result has x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
