"""Causal attention one head at a time, for XLA's CPU backend: the scores of a whole batch never exist.

Softmax over all scores at once writes `[batch, heads, seq, seq]` float32 to memory several times, and a CPU spends
most of attention's time there. Here a loop takes one key/value head of one row of the batch with the query heads that
share it, in blocks of queries, so that scores stay in the caches; keys after a block's last query are left out. The
backward pass computes the weights again from the saved normalizers (FlashAttention-2, arXiv 2307.08691, section 3.1).
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qlora_jax.nf4.platforms import vary_like

# Queries of a block: [256, 512] float32 scores are half a megabyte.
BLOCK_QUERIES = 256


def blockwise_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    mask: Bool[Array, "batch seq seq"] | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Scaled dot-product attention of tokens to themselves and earlier ones; float32 softmax, differentiable.

    Args:
      query, key, value: of the same tokens, in one floating dtype.
      mask: True where a query sees a key, for each query at least itself; nothing after a query is seen whatever the
        mask says. None: all up to itself.

    Returns:
      `[batch, seq, heads, head_dim]` in the query's dtype.
    """
    # In shard_map some may differ across devices where others do not; their gradients are then sums over devices.
    query, key, value = (vary_like(x, (query, key, value)) for x in (query, key, value))
    return _attention(query, key, value, mask)


@jax.custom_vjp
def _attention(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    return _attention_fwd(query, key, value, mask)[0]


def _attention_fwd(query: Array, key: Array, value: Array, mask: Array | None) -> tuple[Array, tuple]:
    batch, _, kv_heads, _ = key.shape
    heads = (_by_head(query, kv_heads), _by_head(key, kv_heads)[:, 0], _by_head(value, kv_heads)[:, 0])
    y, normalizer = jax.lax.map(functools.partial(_forward_head, mask), (_rows(batch, kv_heads), *heads))
    return _by_token(y, batch), (heads, mask, normalizer)


def _attention_bwd(saved: tuple, dy: Array) -> tuple[Array, Array, Array, None]:
    heads, mask, normalizer = saved
    batch = dy.shape[0]
    kv_heads = heads[1].shape[0] // batch
    items = (_rows(batch, kv_heads), *heads, normalizer, _by_head(dy, kv_heads))
    d_query, d_key, d_value = jax.lax.map(functools.partial(_backward_head, mask), items)
    return _by_token(d_query, batch), _by_token(d_key[:, None], batch), _by_token(d_value[:, None], batch), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward_head(mask: Array | None, item: tuple) -> tuple[Array, Array]:
    """Outputs `[group, seq, head_dim]` and log-normalizers `[group, seq]` of the queries of one key/value head."""
    row, query, key, value = item
    outputs, normalizers = [], []
    for begin, end in _blocks(query.shape[1]):
        scores = _scores(query, key, mask, row, begin, end)
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
        y = _product(weights.astype(value.dtype), value[:end], 0) / total
        outputs.append(y.astype(query.dtype))
        normalizers.append((largest + jnp.log(total))[..., 0])
    return jnp.concatenate(outputs, axis=1), jnp.concatenate(normalizers, axis=1)


def _backward_head(mask: Array | None, item: tuple) -> tuple[Array, Array, Array]:
    row, query, key, value, normalizer, dy = item
    d_queries = []
    d_key, d_value = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    for begin, end in _blocks(query.shape[1]):
        own = slice(begin, end)
        weights = jnp.exp(_scores(query, key, mask, row, begin, end) - normalizer[:, own, None])
        d_weights = _product(dy[:, own], value[:end], 1)
        # The part of the softmax's derivative that all keys of a query share; from the rounded output (as sum(dy * y))
        # it would carry that rounding into every gradient.
        shared = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
        d_scores = (weights * (d_weights - shared) * _scale(query)).astype(query.dtype)
        d_queries.append(_product(d_scores, key[:end], 0).astype(query.dtype))
        d_key = d_key.at[:end].add(_sum_of_products(d_scores, query[:, own]))
        d_value = d_value.at[:end].add(_sum_of_products(weights.astype(dy.dtype), dy[:, own]))
    return jnp.concatenate(d_queries, axis=1), d_key.astype(key.dtype), d_value.astype(value.dtype)


def _scores(query: Array, key: Array, mask: Array | None, row: Array, begin: int, end: int) -> Array:
    """Scaled scores `[group, end - begin, end]`, minus infinity where a key is not seen."""
    scores = _product(query[:, begin:end], key[:end], 1) * _scale(query)
    seen = jnp.arange(end)[None, :] <= jnp.arange(begin, end)[:, None]
    if mask is not None:
        seen &= jax.lax.dynamic_index_in_dim(mask, row, keepdims=False)[begin:end, :end]
    return jnp.where(seen[None], scores, -jnp.inf)


def _scale(query: Array) -> float:
    return query.shape[-1] ** -0.5


def _product(x: Float[Array, "group n k"], y: Array, y_axis: int) -> Float[Array, "group n m"]:
    """x times one matrix, contracted with its axis `y_axis`: one product for all query heads of the group."""
    flat = x.reshape(-1, x.shape[-1])
    return _dot(flat, y, 1, y_axis).reshape(*x.shape[:-1], -1)


def _sum_of_products(x: Float[Array, "group n k"], y: Float[Array, "group n m"]) -> Float[Array, "k m"]:
    return _dot(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), 0, 0)


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _blocks(seq: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, seq, BLOCK_QUERIES):
        yield begin, min(begin + BLOCK_QUERIES, seq)


def _rows(batch: int, kv_heads: int) -> Array:
    """Row of the batch for each step of the loop."""
    return jnp.repeat(jnp.arange(batch, dtype=jnp.int32), kv_heads)


def _by_head(x: Float[Array, "batch seq heads head_dim"], kv_heads: int) -> Array:
    """`[batch * kv_heads, group, seq, head_dim]`: the query heads that share a key/value head lie together."""
    batch, seq, heads, head_dim = x.shape
    grouped = x.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    return grouped.reshape(batch * kv_heads, heads // kv_heads, seq, head_dim)


def _by_token(x: Array, batch: int) -> Float[Array, "batch seq heads head_dim"]:
    """Undoes `_by_head`."""
    _, group, seq, head_dim = x.shape
    return x.reshape(batch, -1, group, seq, head_dim).transpose(0, 3, 1, 2, 4).reshape(batch, seq, -1, head_dim)
