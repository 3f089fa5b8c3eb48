"""What all decoders have in common: embedding and head, masks and positions, the scan over blocks, the cache.

logits = model(input_ids)                                      # [batch, seq, vocab], float32
h = model.hidden(input_ids, segment_ids=segment_ids)           # training: the head only where it is needed
h, cache = model.hidden(prompt, cache=model.init_cache(1, 64)) # generation: prompt first, then token by token
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from qlora_jax.errors import UserError
from qlora_jax.models.attention import KVCache, attend, near, visible
from qlora_jax.models.rope import Rotary, rotations
from qlora_jax.nn import FrozenParam, scan_layers, scan_layers_with

# HF's names as nested dicts: {"embed_tokens": {"weight": ...}, "layers": {"self_attn": {"q_proj": {"kernel": ...
Weights = Mapping[str, Any]


class DecoderConfig(Rotary, Protocol):
    """What a configuration has to say for a Decoder; names and meanings are HF's."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def sliding_window(self) -> int | None: ...
    def of_windows(self) -> Rotary:
        """What layers with a window rotate by."""
        ...


class Embedding(nnx.Module):
    """A frozen table of token vectors: looked up at the bottom of the model, multiplied by at its top.

    Attributes:
      weight: FrozenParam `[vocab, embed]`, in the checkpoint's dtype.
    """

    def __init__(self, weights: Weights) -> None:
        self.weight = FrozenParam(weights["weight"])

    def __call__(self, input_ids: Int[Array, "*batch"], dtype: Any) -> Float[Array, "*batch embed"]:
        return self.weight.get_value()[input_ids].astype(dtype)

    def attend(self, h: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Products with every token's vector, in h's dtype with float32 accumulation: float32 logits."""
        return _logits(h, self.weight.get_value())


class View(NamedTuple):
    """Where tokens stand and what they see.

    Attributes:
      rotation: cosines and sines of the positions, `[batch, seq, 1, rotary_dim / 2]`.
      mask: what each query may see; None: everything up to itself.
    """

    rotation: tuple[Array, Array]
    mask: Bool[Array, "batch seq keys"] | None


class Views(NamedTuple):
    """The view of layers that see everything, and that of layers with the model's sliding window."""

    full: View
    windowed: View


class Decoder(nnx.Module):
    """A language model of one stack of blocks. Families fill in what their own parts are called.

    All blocks are one module whose leaves have a leading axis of layers, `[L, ...]`, and a scan runs the block once per
    layer. A block is called as `block(h, views, rngs=key)` and gives h; with a cache as
    `block(h, views, slot, (keys, values))`, and gives h and the keys and values of these tokens.

    Attributes:
      config: DecoderConfig.
      dtype: dtype of the activations; weights keep theirs.
      remat: recompute each layer in the backward pass instead of keeping its activations; may be set.
    """

    def __init__(self, config: DecoderConfig, dtype: jax.typing.DTypeLike) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = True

    def embed(self, input_ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        """What goes into the first block."""
        raise NotImplementedError

    def blocks(self) -> nnx.Module:
        """The stack."""
        raise NotImplementedError

    def last_norm(self, h: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """What stands between the last block and the head."""
        raise NotImplementedError

    def head_embedding(self) -> Embedding:
        """What the head multiplies by: the embedding of the input, where they are tied."""
        raise NotImplementedError

    def head(self, h: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """float32 logits of states from `hidden`."""
        return self.head_embedding().attend(h)

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        rngs: PRNGKeyArray | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """float32 logits `[batch, seq, vocab]`, or (logits, cache) with a cache. Arguments as in `hidden`."""
        h = self.hidden(input_ids, positions=positions, segment_ids=segment_ids, rngs=rngs, cache=cache)
        return self.head(h) if cache is None else (self.head(h[0]), h[1])

    def hidden(
        self,
        input_ids: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        rngs: PRNGKeyArray | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """States after the final norm, `[batch, seq, embed]` in the activations' dtype: what the head takes.

        Args:
          input_ids: int32 tokens.
          positions: int32, for the rotary embedding; None: the number of earlier tokens of the same segment.
          segment_ids: int32; a token sees those of its own segment up to itself. Packing numbers its examples from 1
            and gives padding 0. None: each row is one segment (segment 1, where there is a cache).
          rngs: a random key turns the adapters' dropout on; each linear of each layer gets a key of its own.
          cache: keys and values of earlier tokens, which these follow. `cache.length + seq` must not exceed its
            max_len: a full cache overwrites its end.

        Returns:
          The states, or (states, cache with these tokens) where a cache is given.

        Raises:
          UserError: a cache together with dropout.
        """
        input_ids = jnp.asarray(input_ids)
        h = self.embed(input_ids)
        if cache is not None:
            if rngs is not None:
                raise UserError("rngs given with a cache", why="dropout is for training, a cache for generation")
            return self._continue(h, positions, segment_ids, cache)
        seq = input_ids.shape[1]
        if segment_ids is None and self._is_longer_than_window(seq):
            segment_ids = jnp.ones(input_ids.shape, jnp.int32)
        seen = None if segment_ids is None else visible(segment_ids, segment_ids)
        views = self._views(positions, seen, 0, input_ids)
        h = scan_layers(self.blocks(), h, views, rngs=rngs, remat=self.remat)
        return self.last_norm(h)

    def init_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache for `max_len` tokens in each of `batch` rows."""
        c = self.config
        shape = (c.num_hidden_layers, batch, max_len, c.num_key_value_heads, c.head_dim)
        return KVCache(
            keys=jnp.zeros(shape, self.dtype),
            values=jnp.zeros(shape, self.dtype),
            segment_ids=jnp.zeros((batch, max_len), jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )

    def _continue(
        self, h: Array, positions: Array | None, segment_ids: Array | None, cache: KVCache
    ) -> tuple[Array, KVCache]:
        if segment_ids is None:
            segment_ids = jnp.ones(h.shape[:2], jnp.int32)
        known = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.length, axis=1)
        seen = visible(segment_ids, known, cache.length)
        views = self._views(positions, seen, cache.length, h)
        past = (cache.keys, cache.values)
        h, (keys, values) = scan_layers_with(self.blocks(), h, past, views, cache.length)
        return self.last_norm(h), cache.extended(keys, values, segment_ids)

    def _is_longer_than_window(self, tokens: int) -> bool:
        return self.config.sliding_window is not None and tokens > self.config.sliding_window

    def _views(self, positions: Array | None, seen: Array | None, offset: int | Array, like: Array) -> Views:
        """Of tokens at slots from `offset` on; `seen`: what they see without a window, None: all up to themselves."""
        if positions is None and seen is not None:
            positions = jnp.sum(seen, axis=-1) - 1  # it sees itself and the earlier ones of its segment
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(like.shape[1])[None, :], like.shape[:2])
        full = View(rotations(positions, self.config), seen)
        window, local = self.config.sliding_window, self.config.of_windows()
        if window is None:
            return Views(full, full)
        rotation = full.rotation if local is self.config else rotations(positions, local)
        if seen is not None and self._is_longer_than_window(seen.shape[2]):
            _, queries, keys = seen.shape
            seen &= near(queries, keys, window, offset)
        return Views(full, View(rotation, seen))


def attend_after(
    past: tuple[Array, Array] | None,
    slot: Int[Array, ""] | None,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    mask: Bool[Array, "batch seq keys"] | None,
    softcap: float | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Attention of tokens to themselves and, where there is a `past` (keys and values of a cache, into which these go
    at `slot`), to those before them. With `softcap` c scores x become `c * tanh(x / c)`.
    """
    if past is not None and slot is not None:
        key = jax.lax.dynamic_update_slice_in_dim(past[0], key, slot, axis=1)
        value = jax.lax.dynamic_update_slice_in_dim(past[1], value, slot, axis=1)
    if softcap is not None:
        return _attend_capped(query, key, value, mask, softcap)
    return attend(query, key, value, mask, same_tokens=past is None)


def _attend_capped(query: Array, key: Array, value: Array, mask: Array | None, softcap: float) -> Array:
    """Plain attention, whose scores `[batch, heads, seq, keys]` exist as a whole: kernels know no caps."""
    batch, seq, _, head_dim = query.shape
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    grouped = query.reshape(batch, seq, key.shape[2], -1, head_dim)
    scores = softcap * jnp.tanh(product("bqhgd,bkhd->bhgqk", grouped, key) * (head_dim**-0.5 / softcap))
    seen = jnp.tri(seq, dtype=bool)[None] if mask is None else mask
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1).astype(value.dtype)
    return product("bhgqk,bkhd->bqhgd", weights, value).reshape(query.shape).astype(query.dtype)


@jax.custom_vjp
def _logits(h: Float[Array, "*batch embed"], table: Float[Array, "vocab embed"]) -> Float[Array, "*batch vocab"]:
    return _dot(h, table.astype(h.dtype), table_axis=1)


def _logits_fwd(h: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return _logits(h, table), (h, table)


def _logits_bwd(saved: tuple[Array, Array], d_logits: Array) -> tuple[Array, None]:
    # Without this rule the gradient would be a product of float32 with a table converted to float32: the largest
    # product of a step, several times slower. The table is frozen and gets none.
    h, table = saved
    return _dot(d_logits.astype(h.dtype), table.astype(h.dtype), table_axis=0).astype(h.dtype), None


_logits.defvjp(_logits_fwd, _logits_bwd)


def _dot(x: Array, table: Array, table_axis: int) -> Array:
    return jax.lax.dot_general(
        x,
        table,
        (((x.ndim - 1,), (table_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,  # not TF32
        preferred_element_type=jnp.float32,
    )


def split_key(key: PRNGKeyArray | None, number: int) -> list[PRNGKeyArray | None]:
    """A key for each of several parts; None for all of them where there is none."""
    return [None] * number if key is None else list(jax.random.split(key, number))
