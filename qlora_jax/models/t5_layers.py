"""The layers of T5's encoder and decoder, and the blocks that they make up, with HF's attribute names.

A block calls its layers as `h = layer(h, ...)`: each normalizes its input and adds its result to the residual stream.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from qlora_jax.models.decoder import split_key
from qlora_jax.models.llama import RMSNorm
from qlora_jax.models.t5_config import T5Config
from qlora_jax.nn import nf4_dense

# HF's names as nested dicts: {"encoder": {"block": {"layer": {"0": {"SelfAttention": {"q": {"kernel": ...
Weights = Mapping[str, Any]
_KeysValues = tuple[Float[Array, "batch keys heads head_dim"], Float[Array, "batch keys heads head_dim"]]

_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


class Attention(nnx.Module):
    """Attention to the states of the same stack, or of the encoder."""

    def __init__(self, weights: Weights, config: T5Config) -> None:
        self.head_dim = config.d_kv
        self.q = nf4_dense.from_kernel(**weights["q"], quant_type=None)
        self.k = nf4_dense.from_kernel(**weights["k"], quant_type=None)
        self.v = nf4_dense.from_kernel(**weights["v"], quant_type=None)
        self.o = nf4_dense.from_kernel(**weights["o"], quant_type=None)

    def keys_values(self, states: Float[Array, "batch keys embed"], rngs: PRNGKeyArray | None) -> _KeysValues:
        k_key, v_key = split_key(rngs, 2)
        heads = (*states.shape[:2], -1, self.head_dim)
        return self.k(states, rngs=k_key).reshape(heads), self.v(states, rngs=v_key).reshape(heads)

    def __call__(
        self,
        x: Float[Array, "batch queries embed"],
        keys_values: _KeysValues,
        bias: Float[Array, "1 heads queries keys"] | None,
        mask: Bool[Array, "batch queries keys"] | None,
        rngs: PRNGKeyArray | None,
    ) -> Float[Array, "batch queries embed"]:
        """Softmax in float32, of scores that are not scaled (the initialization of q makes up for it)."""
        q_key, o_key = split_key(rngs, 2)
        query = self.q(x, rngs=q_key).reshape(*x.shape[:2], -1, self.head_dim)
        mask = None if mask is None else mask[:, None]
        # A GPU would multiply float32 in TF32, with ten bits of mantissa.
        with jax.default_matmul_precision("float32" if x.dtype == jnp.float32 else None):
            y = jax.nn.dot_product_attention(query, *keys_values, bias=bias, mask=mask, scale=1.0)
        return self.o(y.reshape(*x.shape[:2], -1), rngs=o_key)


class SelfAttentionLayer(nnx.Module):
    """Attention of a stack to itself, on normalized input and added to the residual stream."""

    def __init__(self, weights: Weights, config: T5Config) -> None:
        self.SelfAttention = Attention(weights["SelfAttention"], config)
        self.layer_norm = RMSNorm(weights["layer_norm"], config.layer_norm_epsilon)

    def __call__(
        self,
        h: Float[Array, "batch seq embed"],
        bias: Float[Array, "1 heads seq keys"],
        mask: Bool[Array, "batch seq keys"] | None,
        slot: Int[Array, ""] | None,
        past: _KeysValues | None,
        rngs: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch seq embed"], _KeysValues]:
        """Returns h and these tokens' keys and values."""
        kv_key, key = split_key(rngs, 2)
        x = self.layer_norm(h)
        own = self.SelfAttention.keys_values(x, kv_key)
        seen = own
        if past is not None and slot is not None:
            key_slots, value_slots = (
                jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=1) for old, new in zip(past, own, strict=True)
            )
            seen = key_slots, value_slots
        return h + self.SelfAttention(x, seen, bias, mask, key), own


class CrossAttentionLayer(nnx.Module):
    """Attention of the decoder to the encoder's states."""

    def __init__(self, weights: Weights, config: T5Config) -> None:
        self.EncDecAttention = Attention(weights["EncDecAttention"], config)
        self.layer_norm = RMSNorm(weights["layer_norm"], config.layer_norm_epsilon)

    def __call__(
        self,
        h: Float[Array, "batch target embed"],
        keys_values: _KeysValues,
        mask: Bool[Array, "batch target source"] | None,
        rngs: PRNGKeyArray | None,
    ) -> Float[Array, "batch target embed"]:
        return h + self.EncDecAttention(self.layer_norm(h), keys_values, None, mask, rngs)


class Dense(nnx.Module):
    """The feed-forward network: `wo(f(wi(x)))`, or gated (arXiv 2002.05202) `wo(f(wi_0(x)) * wi_1(x))`."""

    def __init__(self, weights: Weights, config: T5Config) -> None:
        self.activation = config.activation
        if config.is_gated:
            self.wi_0 = nf4_dense.from_kernel(**weights["wi_0"], quant_type=None)
            self.wi_1 = nf4_dense.from_kernel(**weights["wi_1"], quant_type=None)
        else:
            self.wi = nf4_dense.from_kernel(**weights["wi"], quant_type=None)
        self.is_gated = config.is_gated
        self.wo = nf4_dense.from_kernel(**weights["wo"], quant_type=None)

    def __call__(
        self, x: Float[Array, "batch seq embed"], rngs: PRNGKeyArray | None
    ) -> Float[Array, "batch seq embed"]:
        gate_key, up_key, down_key = split_key(rngs, 3)
        function = _ACTIVATIONS[self.activation]
        if self.is_gated:
            inner = function(self.wi_0(x, rngs=gate_key)) * self.wi_1(x, rngs=up_key)
        else:
            inner = function(self.wi(x, rngs=up_key))
        return self.wo(inner, rngs=down_key)


class FeedForwardLayer(nnx.Module):
    """The feed-forward network on normalized input, added to the residual stream."""

    def __init__(self, weights: Weights, config: T5Config) -> None:
        self.DenseReluDense = Dense(weights["DenseReluDense"], config)
        self.layer_norm = RMSNorm(weights["layer_norm"], config.layer_norm_epsilon)

    def __call__(
        self, h: Float[Array, "batch seq embed"], rngs: PRNGKeyArray | None
    ) -> Float[Array, "batch seq embed"]:
        return h + self.DenseReluDense(self.layer_norm(h), rngs)


class EncoderBlock(nnx.Module):
    """One layer of the encoder."""

    def __init__(self, weights: Weights, config: T5Config) -> None:
        layers = weights["layer"]
        self.layer = nnx.List([SelfAttentionLayer(layers["0"], config), FeedForwardLayer(layers["1"], config)])

    def __call__(
        self,
        h: Float[Array, "batch source embed"],
        bias: Float[Array, "1 heads source source"],
        mask: Bool[Array, "batch source source"] | None,
        *,
        rngs: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch source embed"]:
        attention_key, dense_key = split_key(rngs, 2)
        h, _ = self.layer[0](h, bias, mask, None, None, attention_key)
        return self.layer[1](h, dense_key)


class DecoderBlock(nnx.Module):
    """One layer of the decoder."""

    def __init__(self, weights: Weights, config: T5Config) -> None:
        layers = weights["layer"]
        self.layer = nnx.List(
            [
                SelfAttentionLayer(layers["0"], config),
                CrossAttentionLayer(layers["1"], config),
                FeedForwardLayer(layers["2"], config),
            ]
        )

    def __call__(
        self,
        h: Float[Array, "batch target embed"],
        bias: Float[Array, "1 heads target keys"],
        mask: Bool[Array, "batch target keys"] | None,
        encoded: Float[Array, "batch source embed"] | None,
        cross_mask: Bool[Array, "batch target source"] | None,
        slot: Int[Array, ""] | None = None,
        past: tuple[_KeysValues, _KeysValues] | None = None,
        *,
        rngs: PRNGKeyArray | None = None,
    ) -> Any:
        """h after this layer; with `past` (of the target, of the source), (h, this call's keys and values)."""
        self_key, source_key, cross_key, dense_key = split_key(rngs, 4)
        h, own = self.layer[0](h, bias, mask, slot, None if past is None else past[0], self_key)
        source = self.source_keys_values(encoded, source_key) if past is None else past[1]
        h = self.layer[1](h, source, cross_mask, cross_key)
        h = self.layer[2](h, dense_key)
        return h if past is None else (h, own)

    def source_keys_values(
        self, encoded: Float[Array, "batch source embed"] | None, rngs: PRNGKeyArray | None = None
    ) -> _KeysValues:
        cross: Any = self.layer[1]
        return cross.EncDecAttention.keys_values(encoded, rngs)
