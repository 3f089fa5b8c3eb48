"""LLaMA (arXiv 2302.13971, 2307.09288, 2407.21783) in Flax NNX, with the attribute names of Hugging Face's model.

All blocks are one module whose leaves have a leading axis of layers: `model.layers.self_attn.q_proj.kernel` is one
stack, and a scan runs the block once per layer. Compile time and the memory of gradients then do not grow with depth.

    logits = model(input_ids)                                      # [batch, seq, vocab], float32
    h = model.hidden(input_ids, segment_ids=segment_ids)           # training: the head only where it is needed
    h, cache = model.hidden(prompt, cache=model.init_cache(1, 64)) # generation: prompt first, then token by token
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from qlora_jax.errors import UserError
from qlora_jax.models.attention import KVCache, attend, near, visible
from qlora_jax.models.config import ACTIVATIONS, LlamaConfig
from qlora_jax.models.rope import rotate, rotations
from qlora_jax.nn import FrozenParam, nf4_dense, scan_layers, scan_layers_with

# HF's names as nested dicts: {"embed_tokens": {"weight": ...}, "layers": {"self_attn": {"q_proj": {"kernel": ...
Weights = Mapping[str, Any]


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


class RMSNorm(nnx.Module):
    """Root-mean-square normalization (arXiv 1910.07467), statistics in float32 as HF's LLaMA takes them.

    Attributes:
      weight: FrozenParam `[embed]`, `[L, embed]` in a stack, in the checkpoint's dtype.
    """

    def __init__(self, weights: Weights, eps: float) -> None:
        self.weight = FrozenParam(weights["weight"])
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        # Rounded to the activations' dtype before the product, as HF does; the product is rounded once.
        normed = normed.astype(x.dtype).astype(jnp.float32)
        weight = self.weight.get_value().astype(jnp.float32)
        return (normed * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Masks(NamedTuple):
    """What each query may see (None: everything up to itself), without the model's sliding window and with it."""

    full: Bool[Array, "batch seq keys"] | None
    windowed: Bool[Array, "batch seq keys"] | None


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, weights: Weights, config: LlamaConfig) -> None:
        self.head_dim = config.head_dim
        self.q_proj = nf4_dense.from_kernel(**weights["q_proj"], quant_type=None)
        self.k_proj = nf4_dense.from_kernel(**weights["k_proj"], quant_type=None)
        self.v_proj = nf4_dense.from_kernel(**weights["v_proj"], quant_type=None)
        self.o_proj = nf4_dense.from_kernel(**weights["o_proj"], quant_type=None)
        self.q_norm = RMSNorm(weights["q_norm"], config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(weights["k_norm"], config.rms_norm_eps) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        rotation: tuple[Array, Array],
        mask: Bool[Array, "batch seq keys"] | None,
        slot: Int[Array, ""] | None,
        past: tuple[Array, Array] | None,
        rngs: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch seq embed"], tuple[Array, Array]]:
        """Returns the output and the keys and values of these tokens, `[batch, seq, kv_heads, head_dim]` each."""
        q_key, k_key, v_key, o_key = split_key(rngs, 4)
        heads = (*x.shape[:2], -1, self.head_dim)
        query = self.q_proj(x, rngs=q_key).reshape(heads)
        key = self.k_proj(x, rngs=k_key).reshape(heads)
        value = self.v_proj(x, rngs=v_key).reshape(heads)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        own = (key, value)
        if past is not None and slot is not None:
            key = jax.lax.dynamic_update_slice_in_dim(past[0], key, slot, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(past[1], value, slot, axis=1)
        y = attend(query, key, value, mask, same_tokens=past is None)
        return self.o_proj(y.reshape(*x.shape[:2], -1), rngs=o_key), own


class MLP(nnx.Module):
    """A gated feed-forward layer (arXiv 2002.05202): `down(act(gate(x)) * up(x))`, SwiGLU where act is SiLU."""

    def __init__(self, weights: Weights, activation: str) -> None:
        self.activation = activation
        self.gate_proj = nf4_dense.from_kernel(**weights["gate_proj"], quant_type=None)
        self.up_proj = nf4_dense.from_kernel(**weights["up_proj"], quant_type=None)
        self.down_proj = nf4_dense.from_kernel(**weights["down_proj"], quant_type=None)

    def __call__(
        self, x: Float[Array, "batch seq embed"], rngs: PRNGKeyArray | None
    ) -> Float[Array, "batch seq embed"]:
        gate_key, up_key, down_key = split_key(rngs, 3)
        gated = ACTIVATIONS[self.activation](self.gate_proj(x, rngs=gate_key)) * self.up_proj(x, rngs=up_key)
        return self.down_proj(gated, rngs=down_key)


class Block(nnx.Module):
    """One layer: attention and MLP, each on normalized input and added to the residual stream.

    Attributes:
      input_layernorm, self_attn, post_attention_layernorm, mlp: as named.
      slides: FrozenParam, bool `[]`, `[L]` in a stack: whether this layer sees a window alone; None: all are alike.
    """

    def __init__(self, weights: Weights, config: LlamaConfig) -> None:
        self.input_layernorm = RMSNorm(weights["input_layernorm"], config.rms_norm_eps)
        self.self_attn = Attention(weights["self_attn"], config)
        self.post_attention_layernorm = RMSNorm(weights["post_attention_layernorm"], config.rms_norm_eps)
        self.mlp = MLP(weights["mlp"], config.hidden_act)
        types = config.layer_types
        slides = None if types is None else jnp.asarray([kind == "sliding_attention" for kind in types])
        self.slides = nnx.data(None if slides is None else FrozenParam(slides))

    def __call__(
        self,
        h: Float[Array, "batch seq embed"],
        rotation: tuple[Array, Array],
        masks: Masks,
        slot: Int[Array, ""] | None = None,
        past: tuple[Array, Array] | None = None,
        *,
        rngs: PRNGKeyArray | None = None,
    ) -> Any:
        """h after this layer; with `past`, the keys and values of earlier tokens, (h, this call's keys and values)."""
        attention_key, mlp_key = split_key(rngs, 2)
        mask = masks.windowed
        if self.slides is not None and masks.windowed is not None and masks.full is not None:
            mask = jnp.where(self.slides.get_value(), masks.windowed, masks.full)
        y, own = self.self_attn(self.input_layernorm(h), rotation, mask, slot, past, attention_key)
        h = h + y
        h = h + self.mlp(self.post_attention_layernorm(h), mlp_key)
        return h if past is None else (h, own)


class Llama(nnx.Module):
    """The model. `load_model` makes one from a checkpoint.

    Attributes:
      embed_tokens: Embedding.
      layers: one Block whose leaves are stacks, `[L, ...]`.
      norm: RMSNorm after the last layer.
      lm_head: Embedding, or None where the head is tied to `embed_tokens`.
      config: LlamaConfig.
      dtype: dtype of the activations.
      remat: recompute each layer in the backward pass instead of keeping its activations; may be set.
    """

    def __init__(self, config: LlamaConfig, weights: Weights, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> None:
        """Puts the model together from its weights.

        Args:
          config: its shape.
          weights: HF's names as nested dicts without "model." and layer numbers; `weight` of embeddings
            `[vocab, embed]` and of norms `[embed]`, `[L, embed]`; `kernel` (and `bias`) of linears: NF4Tensor stack or
            array `[L, in, out]`.
          dtype: dtype of the activations; weights keep theirs.
        """
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = True
        self.embed_tokens = Embedding(weights["embed_tokens"])
        self.layers = Block(weights["layers"], config)
        self.norm = RMSNorm(weights["norm"], config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Embedding(weights["lm_head"])

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
        h = self.embed_tokens(input_ids, self.dtype)
        if cache is not None:
            if rngs is not None:
                raise UserError("rngs given with a cache", why="dropout is for training, a cache for generation")
            return self._continue(h, positions, segment_ids, cache)
        seq = input_ids.shape[1]
        if segment_ids is None and self._is_longer_than_window(seq):
            segment_ids = jnp.ones(input_ids.shape, jnp.int32)
        seen = None if segment_ids is None else visible(segment_ids, segment_ids)
        rotation = self._rotation(positions, seen, input_ids)
        h = scan_layers(self.layers, h, rotation, self._masks(seen, 0), rngs=rngs, remat=self.remat)
        return self.norm(h)

    def head(self, h: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """float32 logits of states from `hidden`."""
        return (self.lm_head or self.embed_tokens).attend(h)

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
        rotation = self._rotation(positions, seen, h)
        past = (cache.keys, cache.values)
        masks = self._masks(seen, cache.length)
        h, (keys, values) = scan_layers_with(self.layers, h, past, rotation, masks, cache.length)
        return self.norm(h), cache.extended(keys, values, segment_ids)

    def _is_longer_than_window(self, tokens: int) -> bool:
        return self.config.sliding_window is not None and tokens > self.config.sliding_window

    def _masks(self, seen: Array | None, offset: int | Array) -> Masks:
        if seen is None or not self._is_longer_than_window(seen.shape[2]):
            return Masks(seen, seen)
        assert self.config.sliding_window is not None
        _, queries, keys = seen.shape
        return Masks(seen, seen & near(queries, keys, self.config.sliding_window, offset))

    def _rotation(self, positions: Array | None, seen: Array | None, like: Array) -> tuple[Array, Array]:
        if positions is None and seen is not None:
            positions = jnp.sum(seen, axis=-1) - 1  # it sees itself and the earlier ones of its segment
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(like.shape[1])[None, :], like.shape[:2])
        return rotations(positions, self.config)


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
    return [None] * number if key is None else list(jax.random.split(key, number))
