"""Which tokens see which, and the memory of keys and values that generation keeps."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.models.blockwise import blockwise_attention
from qlora_jax.models.fused_attention import fused_attention
from qlora_jax.nf4.kernels import cpu_computes_in_tiles, cuda_kernels_loaded

# Up to this many tokens the library's attention is as fast on a CPU as one head at a time, and simpler to compile.
SHORT = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens read so far. All rows of a batch are filled to the same length.

    Attributes:
      keys, values: `[layers, batch, max_len, kv_heads, head_dim]` in the activations' dtype, rotated already.
      segment_ids: int32 `[batch, max_len]`; a row's padding has a segment of its own.
      length: int32 `[]`, slots in use.
    """

    keys: Float[Array, "layers batch max_len kv_heads head_dim"]
    values: Float[Array, "layers batch max_len kv_heads head_dim"]
    segment_ids: Int[Array, "batch max_len"]
    length: Int[Array, ""]

    def extended(
        self,
        keys: Float[Array, "layers batch seq kv_heads head_dim"],
        values: Float[Array, "layers batch seq kv_heads head_dim"],
        segment_ids: Int[Array, "batch seq"],
    ) -> "KVCache":
        """With the next `seq` slots filled."""
        start = (0, 0, self.length, 0, 0)
        return KVCache(
            keys=jax.lax.dynamic_update_slice(self.keys, keys, start),
            values=jax.lax.dynamic_update_slice(self.values, values, start),
            segment_ids=jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, (0, self.length)),
            length=self.length + keys.shape[2],
        )


def visible(
    query_segments: Int[Array, "batch seq"],
    key_segments: Int[Array, "batch keys"],
    offset: int | Int[Array, ""] = 0,
) -> Bool[Array, "batch seq keys"]:
    """True where query t (at slot `offset + t`) may see a key: one of its own segment, not after it.

    Padding is a segment like any other, so that every query sees at least itself and no softmax is over nothing.
    """
    slots = offset + jnp.arange(query_segments.shape[1])
    causal = jnp.arange(key_segments.shape[1])[None, :] <= slots[:, None]
    return (query_segments[:, :, None] == key_segments[:, None, :]) & causal[None]


def near(
    query_slots: int, key_slots: int, window: int, offset: int | Int[Array, ""] = 0
) -> Bool[Array, "1 query_slots key_slots"]:
    """True where a key is one of the last `window` up to the query, at slot `offset + t`, or comes after it."""
    slots = offset + jnp.arange(query_slots)
    return (slots[:, None] - jnp.arange(key_slots)[None, :] < window)[None]


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "batch seq keys"] | None,
    *,
    same_tokens: bool,
) -> Float[Array, "batch seq heads head_dim"]:
    """Scaled dot-product attention, grouped where there are fewer key/value heads; softmax in float32.

    Args:
      mask: what each query may see; None: everything up to itself.
      same_tokens: whether queries and keys are the same tokens, so that nothing after a query is seen. Has to be
        True where mask is None.
    """
    if same_tokens and not cuda_kernels_loaded() and jax.default_backend() == "cpu":
        if query.dtype == key.dtype == value.dtype and cpu_computes_in_tiles(query.dtype):
            return fused_attention(query, key, value, mask)
        if query.shape[1] > SHORT:
            return blockwise_attention(query, key, value, mask)
    # A GPU would multiply float32 in TF32, with ten bits of mantissa.
    with jax.default_matmul_precision("float32" if query.dtype == jnp.float32 else None):
        if mask is None:
            return jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
