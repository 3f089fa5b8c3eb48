"""T5 (arXiv 1910.10683; version 1.1 and Flan, arXiv 2210.11416) in Flax NNX, with HF's attribute names.

The encoder reads the source, the decoder writes the target and looks at the encoder's states in each layer. All blocks
of either are one module whose leaves have a leading axis of layers, as in `models/llama.py`:
`model.decoder.block.layer[1].EncDecAttention.q.kernel` is one stack.

    logits = model(input_ids, decoder_input_ids)                   # [batch, target, vocab], float32
    h = model.hidden(input_ids, decoder_input_ids, segment_ids=...)  # training: the head only where it is needed
    cache = model.init_cache(input_ids, max_len=64)                # generation: the source first, then token by token
    h, cache = model.decode(token[:, None], cache)

`decoder_input_ids` begin with `config.decoder_start_token_id`; position t predicts token t + 1. Differences to LLaMA:
positions are biases on the scores (`models/relative.py`), scores are not divided by the root of head_dim, and nothing
limits the lengths. The base's own dropout (`dropout_rate`) is not applied: adapters have theirs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qlora_jax.errors import UserError
from qlora_jax.models.attention import visible
from qlora_jax.models.decoder import Embedding, split_key
from qlora_jax.models.llama import RMSNorm
from qlora_jax.models.relative import RelativeBias
from qlora_jax.models.t5_config import T5Config
from qlora_jax.models.t5_layers import DecoderBlock, EncoderBlock, Weights
from qlora_jax.nn import scan_layers, scan_layers_with


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5Cache:
    """What the decoder keeps of the source and of the target written so far. All rows have the same length.

    Attributes:
      keys, values: `[layers, batch, max_len, heads, head_dim]` of the target's tokens.
      source_keys, source_values: `[layers, batch, source, heads, head_dim]`, projected once for all tokens to come.
      source_segments: int32 `[batch, source]`, 0 at padding.
      length: int32 `[]`, slots in use.
    """

    keys: Float[Array, "layers batch max_len heads head_dim"]
    values: Float[Array, "layers batch max_len heads head_dim"]
    source_keys: Float[Array, "layers batch source heads head_dim"]
    source_values: Float[Array, "layers batch source heads head_dim"]
    source_segments: Int[Array, "batch source"]
    length: Int[Array, ""]


class Stack(nnx.Module):
    """The encoder's or the decoder's blocks, with what surrounds them.

    Attributes:
      block: one block whose leaves are stacks, `[L, ...]`.
      relative_attention_bias: what HF keeps in block 0 for all of them.
      final_layer_norm: RMSNorm after the last block.
    """

    def __init__(self, weights: Weights, config: T5Config, *, is_decoder: bool) -> None:
        self.block = (DecoderBlock if is_decoder else EncoderBlock)(weights["block"], config)
        self.relative_attention_bias = RelativeBias(
            weights["relative_attention_bias"]["weight"],
            bidirectional=not is_decoder,
            max_distance=config.relative_attention_max_distance,
        )
        self.final_layer_norm = RMSNorm(weights["final_layer_norm"], config.layer_norm_epsilon)


class T5(nnx.Module):
    """The model. `load_model` makes one from a checkpoint.

    Attributes:
      shared: Embedding of source and target tokens.
      encoder, decoder: Stack.
      lm_head: Embedding, or None where the head is `shared`.
      config: T5Config.
      dtype: dtype of the activations.
      remat: recompute each layer in the backward pass instead of keeping its activations; may be set.
    """

    def __init__(self, config: T5Config, weights: Weights, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> None:
        """Puts the model together from its weights.

        Args:
          config: its shape.
          weights: HF's names as nested dicts without block numbers, `relative_attention_bias` beside `block`; `weight`
            of embeddings `[vocab, embed]` and of norms `[embed]`, `[L, embed]`; `kernel` of linears: NF4Tensor stack
            or array `[L, in, out]`.
          dtype: dtype of the activations; weights keep theirs.

        Raises:
          UserError: dtype float16.
        """
        if jnp.dtype(dtype) == jnp.float16:
            raise UserError(
                "dtype=float16 for a T5",
                why="its residual stream exceeds 65504, float16's largest number: T5 was pretrained in bfloat16",
                fix="dtype=bfloat16",
            )
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = True
        self.shared = Embedding(weights["shared"])
        self.encoder = Stack(weights["encoder"], config, is_decoder=False)
        self.decoder = Stack(weights["decoder"], config, is_decoder=True)
        self.lm_head = None if config.tie_word_embeddings else Embedding(weights["lm_head"])

    def __call__(
        self,
        input_ids: Int[Array, "batch source"],
        decoder_input_ids: Int[Array, "batch target"],
        *,
        segment_ids: Int[Array, "batch source"] | None = None,
        decoder_segment_ids: Int[Array, "batch target"] | None = None,
        rngs: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch target vocab"]:
        """float32 logits of the tokens after each target token. Arguments as in `hidden`."""
        h = self.hidden(
            input_ids, decoder_input_ids, segment_ids=segment_ids, decoder_segment_ids=decoder_segment_ids, rngs=rngs
        )
        return self.head(h)

    def hidden(
        self,
        input_ids: Int[Array, "batch source"],
        decoder_input_ids: Int[Array, "batch target"],
        *,
        segment_ids: Int[Array, "batch source"] | None = None,
        decoder_segment_ids: Int[Array, "batch target"] | None = None,
        rngs: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch target embed"]:
        """The decoder's states after its final norm, in the activations' dtype: what the head takes.

        Args:
          input_ids: int32 tokens of the source.
          decoder_input_ids: int32 tokens of the target, the start token first.
          segment_ids: int32; tokens of the source see those of their own segment. Packing numbers its examples from 1
            and gives padding 0, so that HF's attention_mask is one. None: each row is segment 1.
          decoder_segment_ids: int32; tokens of the target see those of their own segment up to themselves, and the
            source's of the same number. None: each row is segment 1.
          rngs: a random key turns the adapters' dropout on; each linear of each layer gets a key of its own.
        """
        encoder_key, decoder_key = split_key(rngs, 2)
        encoded = self.encode(input_ids, segment_ids=segment_ids, rngs=encoder_key)
        h = self.shared(jnp.asarray(decoder_input_ids), self.dtype)
        if segment_ids is None and decoder_segment_ids is None:
            target, cross_mask = jnp.ones(h.shape[:2], jnp.int32), None
        else:
            target = jnp.ones(h.shape[:2], jnp.int32) if decoder_segment_ids is None else decoder_segment_ids
            source = jnp.ones(encoded.shape[:2], jnp.int32) if segment_ids is None else segment_ids
            cross_mask = target[:, :, None] == source[:, None, :]
        slots = jnp.arange(h.shape[1])
        bias = self.decoder.relative_attention_bias(slots, slots)
        mask = visible(target, target)
        h = scan_layers(self.decoder.block, h, bias, mask, encoded, cross_mask, rngs=decoder_key, remat=self.remat)
        return self.decoder.final_layer_norm(h)

    def encode(
        self,
        input_ids: Int[Array, "batch source"],
        *,
        segment_ids: Int[Array, "batch source"] | None = None,
        rngs: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch source embed"]:
        """The encoder's states after its final norm. Arguments as in `hidden`."""
        h = self.shared(jnp.asarray(input_ids), self.dtype)
        slots = jnp.arange(h.shape[1])
        bias = self.encoder.relative_attention_bias(slots, slots)
        mask = None if segment_ids is None else segment_ids[:, :, None] == segment_ids[:, None, :]
        h = scan_layers(self.encoder.block, h, bias, mask, rngs=rngs, remat=self.remat)
        return self.encoder.final_layer_norm(h)

    def head_embedding(self) -> Embedding:
        """What the head multiplies by: the embedding of the input, where they are tied."""
        return self.lm_head or self.shared

    def head(self, h: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """float32 logits of states from `hidden` or `decode`."""
        if self.config.scale_decoder_outputs:
            # In the activations' dtype, also where they come in a wider one.
            h = (h.astype(self.dtype) * jnp.asarray(self.config.d_model**-0.5, self.dtype)).astype(h.dtype)
        return self.head_embedding().attend(h)

    def init_cache(
        self,
        input_ids: Int[Array, "batch source"],
        *,
        segment_ids: Int[Array, "batch source"] | None = None,
        max_len: int,
    ) -> T5Cache:
        """Reads the source and makes room for `max_len` tokens of the target, the start token among them.

        Args:
          input_ids: int32 tokens of the source.
          segment_ids: int32, 1 and at padding 0, before or after the text. None: no padding.
          max_len: slots of the target.
        """
        c = self.config
        encoded = self.encode(input_ids, segment_ids=segment_ids)
        batch, source = encoded.shape[:2]
        empty = jnp.zeros((c.num_decoder_layers, batch, max_len, c.num_heads, c.d_kv), self.dtype)
        _, (keys, values) = scan_layers_with(_SourceReader(self.decoder.block), (), None, encoded)
        return T5Cache(
            keys=empty,
            values=empty,
            source_keys=keys,
            source_values=values,
            source_segments=jnp.ones((batch, source), jnp.int32) if segment_ids is None else segment_ids,
            length=jnp.zeros((), jnp.int32),
        )

    def decode(
        self, decoder_input_ids: Int[Array, "batch seq"], cache: T5Cache
    ) -> tuple[Float[Array, "batch seq embed"], T5Cache]:
        """States of the target's next tokens, which follow those in the cache, and the cache with them.

        `cache.length + seq` must not exceed its max_len: a full cache overwrites its end.
        """
        h = self.shared(jnp.asarray(decoder_input_ids), self.dtype)
        queries, slots = cache.length + jnp.arange(h.shape[1]), jnp.arange(cache.keys.shape[2])
        bias = self.decoder.relative_attention_bias(queries, slots)
        mask = jnp.broadcast_to(slots[None, :] <= queries[:, None], (h.shape[0], *bias.shape[2:]))
        cross_mask = jnp.broadcast_to((cache.source_segments > 0)[:, None], (*h.shape[:2], cache.source_keys.shape[2]))
        past = (cache.keys, cache.values), (cache.source_keys, cache.source_values)
        h, (keys, values) = scan_layers_with(self.decoder.block, h, past, bias, mask, None, cross_mask, cache.length)
        start = (0, 0, cache.length, 0, 0)
        cache = dataclasses.replace(
            cache,
            keys=jax.lax.dynamic_update_slice(cache.keys, keys, start),
            values=jax.lax.dynamic_update_slice(cache.values, values, start),
            length=cache.length + h.shape[1],
        )
        return self.decoder.final_layer_norm(h), cache


class _SourceReader(nnx.Module):
    """The decoder's stack, called for the keys and values of the source alone."""

    def __init__(self, block: DecoderBlock | EncoderBlock) -> None:
        assert isinstance(block, DecoderBlock)
        self.block = block

    def __call__(self, h: tuple[()], encoded: Float[Array, "batch source embed"], _: None) -> Any:
        return h, self.block.source_keys_values(encoded)
