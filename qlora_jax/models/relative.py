"""Relative positions of T5 (arXiv 1910.10683, section 2.1): a scalar for each head and bucket of distances."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from qlora_jax.nn import FrozenParam


class RelativeBias(nnx.Module):
    """What is added to the scores of each head, by the distance from query to key; the layers of a stack share it.

    Attributes:
      weight: FrozenParam `[buckets, heads]`, in the checkpoint's dtype.
      bidirectional: whether keys after the query have buckets of their own (the encoder's).
    """

    def __init__(self, weight: Float[Array, "buckets heads"], *, bidirectional: bool, max_distance: int) -> None:
        self.weight = FrozenParam(weight)
        self.bidirectional = bidirectional
        self.max_distance = max_distance

    def __call__(self, queries: Int[Array, " queries"], keys: Int[Array, " keys"]) -> Float[Array, "1 heads q k"]:
        """float32 biases for queries and keys at these places of a row."""
        weight = self.weight.get_value()
        buckets = weight.shape[0] // 2 if self.bidirectional else weight.shape[0]
        distance = keys[None, :] - queries[:, None]
        back = jnp.abs(distance) if self.bidirectional else jnp.maximum(-distance, 0)
        bucket = jnp.asarray(distance_buckets(buckets, self.max_distance))[jnp.minimum(back, self.max_distance)]
        if self.bidirectional:
            bucket = bucket + jnp.where(distance > 0, buckets, 0)
        return jnp.moveaxis(weight[bucket].astype(jnp.float32), -1, 0)[None]


@functools.cache
def distance_buckets(buckets: int, max_distance: int) -> Int32[np.ndarray, " distances"]:
    """The bucket of each distance 0 ... max_distance: single ones for the lower half, then logarithmically wider ones.

    Everything at or beyond max_distance is in the last one. In float32, as the models were pretrained with it: at the
    edges of buckets a rounding decides.
    """
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    share = np.log(ratio) / np.float32(math.log(max_distance / exact))
    wide = exact + (share * np.float32(buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(wide, buckets - 1)).astype(np.int32)
