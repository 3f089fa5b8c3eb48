"""GPT-NeoX (arXiv 2204.06745), the architecture of Pythia (arXiv 2304.01373), with Hugging Face's attribute names.

Attention and MLP read the same residual stream (or one after the other), norms have means and biases, a part of each
head is rotated, and one linear makes queries, keys and values. How the model is called: models/decoder.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qlora_jax.models.config import (
    ACTIVATIONS,
    DecoderTensors,
    RopeScaling,
    check_activation,
    check_heads,
    rope_scaling,
)
from qlora_jax.models.decoder import Decoder, Embedding, View, Views, Weights, attend_after, split_key
from qlora_jax.models.rope import rotate
from qlora_jax.nn import FrozenParam, nf4_dense

BLOCK_LINEARS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


@dataclasses.dataclass(frozen=True)
class GPTNeoXConfig(DecoderTensors):
    """HF's configuration of a GPT-NeoX, as far as it changes what is computed; hashable. Names are HF's.

    Attributes:
      partial_rotary_factor: share of a head's features that are rotated (`rotary_pct`).
      use_parallel_residual: whether the MLP reads what attention reads, or what attention has added to.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 0.25
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    hidden_act: str = "gelu"
    use_parallel_residual: bool = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GPTNeoXConfig":
        """Takes what is needed from `Checkpoint.config`.

        Raises:
          UserError: an unknown activation or kind of RoPE scaling, or an odd number of features to rotate.
        """
        check_activation(config.get("hidden_act", "gelu"))
        own = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in config.items() if key in own and value is not None}
        made = cls(**values | {"rope_scaling": rope_scaling(config)})
        check_heads(made.num_attention_heads, made.num_key_value_heads, made.rotary_dim)
        return made

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def sliding_window(self) -> None:
        return None

    def of_windows(self) -> "GPTNeoXConfig":
        return self

    def linear_shape(self, linear: str) -> tuple[int, int]:
        heads = self.num_attention_heads * self.head_dim
        return {
            "query_key_value": (3 * heads, self.hidden_size),
            "dense": (self.hidden_size, heads),
            "dense_h_to_4h": (self.intermediate_size, self.hidden_size),
            "dense_4h_to_h": (self.hidden_size, self.intermediate_size),
        }[linear.split(".")[-1]]

    def has_bias(self, linear: str) -> bool:
        return self.attention_bias or linear.startswith("mlp.")

    def block_linears(self) -> tuple[str, ...]:
        return BLOCK_LINEARS

    def block_vectors(self) -> dict[str, int]:
        norms = ("input_layernorm", "post_attention_layernorm")
        return {f"{norm}.{part}": self.hidden_size for norm in norms for part in ("weight", "bias")}

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "gpt_neox.embed_in.weight": (self.vocab_size, self.hidden_size),
            "gpt_neox.final_layer_norm.weight": (self.hidden_size,),
            "gpt_neox.final_layer_norm.bias": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes["embed_out.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    @property
    def layers_name(self) -> str:
        return "gpt_neox.layers"


class LayerNorm(nnx.Module):
    """Normalization by mean and variance (arXiv 1607.06450), statistics in float32.

    Attributes:
      weight, bias: FrozenParam `[embed]`, `[L, embed]` in a stack, in the checkpoint's dtype.
    """

    def __init__(self, weights: Weights, eps: float) -> None:
        self.weight, self.bias = FrozenParam(weights["weight"]), FrozenParam(weights["bias"])
        self.eps = eps

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        weight, bias = (part.get_value().astype(jnp.float32)[None, None] for part in (self.weight, self.bias))
        return (normed * weight + bias).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention. `query_key_value` gives, head after head, its query, key and value."""

    def __init__(self, weights: Weights, config: GPTNeoXConfig) -> None:
        self.head_dim = config.head_dim
        self.query_key_value = nf4_dense.from_kernel(**weights["query_key_value"], quant_type=None)
        self.dense = nf4_dense.from_kernel(**weights["dense"], quant_type=None)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        view: View,
        slot: Int[Array, ""] | None,
        past: tuple[Array, Array] | None,
        rngs: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch seq embed"], tuple[Array, Array]]:
        """Returns the output and the keys and values of these tokens, `[batch, seq, heads, head_dim]` each."""
        qkv_key, dense_key = split_key(rngs, 2)
        by_head = self.query_key_value(x, rngs=qkv_key).reshape(*x.shape[:2], -1, 3 * self.head_dim)
        query, key, value = jnp.split(by_head, 3, axis=-1)
        query, key = rotate(query, *view.rotation), rotate(key, *view.rotation)
        y = attend_after(past, slot, query, key, value, view.mask)
        return self.dense(y.reshape(*x.shape[:2], -1), rngs=dense_key), (key, value)


class MLP(nnx.Module):
    """A feed-forward layer without a gate."""

    def __init__(self, weights: Weights, activation: str) -> None:
        self.activation = activation
        self.dense_h_to_4h = nf4_dense.from_kernel(**weights["dense_h_to_4h"], quant_type=None)
        self.dense_4h_to_h = nf4_dense.from_kernel(**weights["dense_4h_to_h"], quant_type=None)

    def __call__(
        self, x: Float[Array, "batch seq embed"], rngs: PRNGKeyArray | None
    ) -> Float[Array, "batch seq embed"]:
        up_key, down_key = split_key(rngs, 2)
        return self.dense_4h_to_h(ACTIVATIONS[self.activation](self.dense_h_to_4h(x, rngs=up_key)), rngs=down_key)


class Block(nnx.Module):
    """One layer: attention and MLP, each on normalized input, both added to the residual stream."""

    def __init__(self, weights: Weights, config: GPTNeoXConfig) -> None:
        self.parallel = config.use_parallel_residual
        self.input_layernorm = LayerNorm(weights["input_layernorm"], config.layer_norm_eps)
        self.attention = Attention(weights["attention"], config)
        self.post_attention_layernorm = LayerNorm(weights["post_attention_layernorm"], config.layer_norm_eps)
        self.mlp = MLP(weights["mlp"], config.hidden_act)

    def __call__(
        self,
        h: Float[Array, "batch seq embed"],
        views: Views,
        slot: Int[Array, ""] | None = None,
        past: tuple[Array, Array] | None = None,
        *,
        rngs: PRNGKeyArray | None = None,
    ) -> Any:
        """See Decoder."""
        attention_key, mlp_key = split_key(rngs, 2)
        y, own = self.attention(self.input_layernorm(h), views.full, slot, past, attention_key)
        read = h if self.parallel else h + y
        h = h + y + self.mlp(self.post_attention_layernorm(read), mlp_key)
        return h if past is None else (h, own)


class Trunk(nnx.Module):
    """Everything but the head: what HF calls `gpt_neox`."""

    def __init__(self, weights: Weights, config: GPTNeoXConfig) -> None:
        self.embed_in = Embedding(weights["embed_in"])
        self.layers = Block(weights["layers"], config)
        self.final_layer_norm = LayerNorm(weights["final_layer_norm"], config.layer_norm_eps)


class GPTNeoX(Decoder):
    """The model. `load_model` makes one from a checkpoint.

    Attributes:
      gpt_neox: Trunk: `embed_in`, `layers` (one Block whose leaves are stacks, `[L, ...]`), `final_layer_norm`.
      embed_out: Embedding, or None where the head is tied to `embed_in`.
      config: GPTNeoXConfig.
      dtype, remat: see Decoder.
    """

    config: GPTNeoXConfig

    def __init__(self, config: GPTNeoXConfig, weights: Weights, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> None:
        """Puts the model together from its weights; see Llama."""
        super().__init__(config, dtype)
        self.gpt_neox = Trunk(weights["gpt_neox"], config)
        self.embed_out = None if config.tie_word_embeddings else Embedding(weights["embed_out"])

    def embed(self, input_ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        return self.gpt_neox.embed_in(input_ids, self.dtype)

    def blocks(self) -> Block:
        return self.gpt_neox.layers

    def last_norm(self, h: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return self.gpt_neox.final_layer_norm(h)

    def head_embedding(self) -> Embedding:
        return self.embed_out or self.gpt_neox.embed_in
