"""Causal attention of bfloat16 by the CPU's compiled kernel, where its instruction set computes in tiles (AMX)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from qlora_jax.nf4.kernels import ATTENTION_GRADIENTS_TARGET, ATTENTION_TARGET
from qlora_jax.nf4.platforms import vary_like


def fused_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    mask: Bool[Array, "#batch seq seq"] | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """What `blockwise_attention` computes, of bfloat16: float32 scores and softmax, weights rounded to bfloat16.

    For CPUs that compute in tiles alone (see cpu_computes_in_tiles).

    Args:
      query, key, value: of the same tokens.
      mask: True where a query sees a key, for each query at least itself; nothing after a query is seen whatever the
        mask says. None: all up to itself.
    """
    batch, seq = query.shape[:2]
    # In shard_map some may differ across devices where others do not; their gradients are then sums over devices.
    query, key, value = (vary_like(x, (query, key, value)) for x in (query, key, value))
    mask = jnp.zeros(0, jnp.bool_) if mask is None else jnp.broadcast_to(mask, (batch, seq, seq))
    return _attention(query, key, value, mask)


@jax.custom_vjp
def _attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
    return _attention_fwd(query, key, value, mask)[0]


def _attention_fwd(query: Array, key: Array, value: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    batch, seq, heads, _ = query.shape
    results = jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct((batch, heads, seq), jnp.float32)
    y, normalizer = _call(ATTENTION_TARGET, results, query, key, value, mask)
    return y, (query, key, value, mask, normalizer)


def _attention_bwd(saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, *_ = saved
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value))
    d_query, d_key, d_value = _call(ATTENTION_GRADIENTS_TARGET, results, *saved, dy)
    return d_query, d_key, d_value, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _call(target: str, results: tuple[jax.ShapeDtypeStruct, ...], *operands: Array) -> list[Array]:
    scale = np.float32(operands[0].shape[-1] ** -0.5)
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    return [vary_like(result, operands) for result in call(*operands, scale=scale)]
