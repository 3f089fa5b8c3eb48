"""LLaMA (arXiv 2302.13971, 2307.09288, 2407.21783) in Flax NNX, with the attribute names of Hugging Face's model.

All blocks are one module whose leaves have a leading axis of layers: `model.layers.self_attn.q_proj.kernel` is one
stack, and a scan runs the block once per layer. Compile time and the memory of gradients then do not grow with depth.

Families that are LLaMA but for a few differences (checkpoints/families.py) are this model too. How it is called:
models/decoder.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qlora_jax.models.config import ACTIVATIONS, LlamaConfig
from qlora_jax.models.decoder import Decoder, Embedding, View, Views, Weights, attend_after, split_key
from qlora_jax.models.rope import rotate
from qlora_jax.nn import FrozenParam, nf4_dense
from qlora_jax.nn.elementwise import recomputed


class RMSNorm(nnx.Module):
    """Root-mean-square normalization (arXiv 1910.07467), statistics in float32 as HF's LLaMA takes them.

    Attributes:
      weight: FrozenParam `[embed]`, `[L, embed]` in a stack, in the checkpoint's dtype.
      unit_offset: multiply by 1 + weight, and round the product alone, as Gemma does.
    """

    def __init__(self, weights: Weights, eps: float, *, unit_offset: bool = False) -> None:
        self.weight = FrozenParam(weights["weight"])
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        return recomputed(self._normed)(x, self.weight.get_value())

    def _normed(self, x: Array, weight: Array) -> Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        weight = weight.astype(jnp.float32)
        if self.unit_offset:
            weight += 1.0
        else:  # rounded to the activations' dtype before the product, as HF does; the product is rounded once
            normed = normed.astype(x.dtype).astype(jnp.float32)
        return (normed * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _norm(weights: Weights, name: str, config: LlamaConfig) -> RMSNorm:
    return RMSNorm(weights[name], config.rms_norm_eps, unit_offset=config.unit_offset)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, weights: Weights, config: LlamaConfig) -> None:
        self.head_dim, self.softcap = config.head_dim, config.attn_logit_softcapping
        # Attention divides scores by the root of head_dim.
        scalar = config.query_pre_attn_scalar
        self.query_scale = 1.0 if scalar is None else (config.head_dim / scalar) ** 0.5
        self.q_proj = nf4_dense.from_kernel(**weights["q_proj"], quant_type=None)
        self.k_proj = nf4_dense.from_kernel(**weights["k_proj"], quant_type=None)
        self.v_proj = nf4_dense.from_kernel(**weights["v_proj"], quant_type=None)
        self.o_proj = nf4_dense.from_kernel(**weights["o_proj"], quant_type=None)
        self.q_norm = _norm(weights, "q_norm", config) if config.qk_norm else None
        self.k_norm = _norm(weights, "k_norm", config) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        view: View,
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
        query, key = rotate(query, *view.rotation), rotate(key, *view.rotation)
        if self.query_scale != 1.0:
            query *= self.query_scale
        y = attend_after(past, slot, query, key, value, view.mask, self.softcap)
        return self.o_proj(y.reshape(*x.shape[:2], -1), rngs=o_key), (key, value)


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
        gated = recomputed(self._gated)(self.gate_proj(x, rngs=gate_key), self.up_proj(x, rngs=up_key))
        return self.down_proj(gated, rngs=down_key)

    def _gated(self, gate: Array, up: Array) -> Array:
        return ACTIVATIONS[self.activation](gate) * up


class Block(nnx.Module):
    """One layer: attention and MLP, each on normalized input and added to the residual stream.

    Attributes:
      input_layernorm, self_attn, post_attention_layernorm, mlp: as named.
      pre_feedforward_layernorm, post_feedforward_layernorm: None, but where there are `post_norms`.
      slides: FrozenParam, bool `[]`, `[L]` in a stack: whether this layer sees a window alone; None: all are alike.
    """

    def __init__(self, weights: Weights, config: LlamaConfig) -> None:
        self.input_layernorm = _norm(weights, "input_layernorm", config)
        self.self_attn = Attention(weights["self_attn"], config)
        self.post_attention_layernorm = _norm(weights, "post_attention_layernorm", config)
        self.mlp = MLP(weights["mlp"], config.hidden_act)
        both = config.post_norms
        self.pre_feedforward_layernorm = _norm(weights, "pre_feedforward_layernorm", config) if both else None
        self.post_feedforward_layernorm = _norm(weights, "post_feedforward_layernorm", config) if both else None
        types = config.layer_types
        slides = None if types is None else jnp.asarray([kind == "sliding_attention" for kind in types])
        self.slides = nnx.data(None if slides is None else FrozenParam(slides))

    def __call__(
        self,
        h: Float[Array, "batch seq embed"],
        views: Views,
        slot: Int[Array, ""] | None = None,
        past: tuple[Array, Array] | None = None,
        *,
        rngs: PRNGKeyArray | None = None,
    ) -> Any:
        """h after this layer; with `past`, the keys and values of earlier tokens, (h, this call's keys and values)."""
        attention_key, mlp_key = split_key(rngs, 2)
        view = views.windowed
        if self.slides is not None:
            slides = self.slides.get_value()
            view = jax.tree.map(lambda windowed, full: jnp.where(slides, windowed, full), views.windowed, views.full)
        y, own = self.self_attn(self.input_layernorm(h), view, slot, past, attention_key)
        if self.pre_feedforward_layernorm is not None and self.post_feedforward_layernorm is not None:
            h = h + self.post_attention_layernorm(y)
            h = h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h), mlp_key))
        else:
            h = h + y
            h = h + self.mlp(self.post_attention_layernorm(h), mlp_key)
        return h if past is None else (h, own)


class Llama(Decoder):
    """The model. `load_model` makes one from a checkpoint.

    Attributes:
      embed_tokens: Embedding.
      layers: one Block whose leaves are stacks, `[L, ...]`.
      norm: RMSNorm after the last layer.
      lm_head: Embedding, or None where the head is tied to `embed_tokens`.
      config: LlamaConfig.
      dtype, remat: see Decoder.
    """

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, weights: Weights, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> None:
        """Puts the model together from its weights.

        Args:
          config: its shape.
          weights: HF's names as nested dicts without "model." and layer numbers; `weight` of embeddings
            `[vocab, embed]` and of norms `[embed]`, `[L, embed]`; `kernel` (and `bias`) of linears: NF4Tensor stack or
            array `[L, in, out]`.
          dtype: dtype of the activations; weights keep theirs.
        """
        super().__init__(config, dtype)
        self.embed_tokens = Embedding(weights["embed_tokens"])
        self.layers = Block(weights["layers"], config)
        self.norm = _norm(weights, "norm", config)
        self.lm_head = None if config.tie_word_embeddings else Embedding(weights["lm_head"])

    def embed(self, input_ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        h = self.embed_tokens(input_ids, self.dtype)
        return h * jnp.asarray(self.config.hidden_size**0.5, h.dtype) if self.config.scaled_embedding else h

    def blocks(self) -> Block:
        return self.layers

    def last_norm(self, h: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return self.norm(h)

    def head_embedding(self) -> Embedding:
        return self.lm_head or self.embed_tokens

    def head(self, h: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        logits, cap = super().head(h), self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)
