"""What shapes a T5: its configuration, and the tensors that follow from it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import UserError

STACKS = ("encoder", "decoder")
_ATTENTION = ("q", "k", "v", "o")
# HF's names of functions; T5 1.1's "gated-gelu" means the approximation by tanh.
_ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """HF's T5 configuration, as far as it changes what is computed. Names and meanings are HF's; hashable.

    Attributes:
      tie_word_embeddings: whether the head is the embedding `shared` (in a Checkpoint's config this is settled by what
        is stored, see `checkpoints/t5.py`).
      scale_decoder_outputs: whether states are multiplied by `d_model ** -0.5` before the head (T5 1.0).
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    decoder_start_token_id: int = 0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "T5Config":
        """Takes what is needed from `Checkpoint.config` and refuses what would compute something else.

        Raises:
          UserError: an activation that is not known, or buckets of relative positions that cannot be halved twice.
        """
        own = {field.name for field in dataclasses.fields(cls)}
        made = cls(**{key: value for key, value in config.items() if key in own and value is not None})
        if made.activation not in _ACTIVATIONS:
            raise UserError(
                f"feed_forward_proj={made.feed_forward_proj!r} of the model is not supported",
                why=f"{', '.join(_ACTIVATIONS)} are, alone or as gated-...",
            )
        if (buckets := made.relative_attention_num_buckets) < 4 or buckets % 4:
            raise UserError(
                f"relative_attention_num_buckets={buckets} of the model",
                why="half of the buckets are for each direction, and half of those for single distances",
            )
        return made

    @property
    def max_position_embeddings(self) -> None:
        """Nothing limits the lengths: all distances beyond the last bucket are one."""
        return None

    @property
    def is_gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """HF's name of the function in the feed-forward layers."""
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else name

    def depth(self, stack: str) -> int:
        """Layers of one of STACKS."""
        return self.num_layers if stack == "encoder" else self.num_decoder_layers

    def sublayers(self, stack: str) -> tuple[str, ...]:
        """HF's names of what the entries of a block's `layer` hold, in their order."""
        cross = ("EncDecAttention",) if stack == "decoder" else ()
        return ("SelfAttention", *cross, "DenseReluDense")

    def block_linears(self, stack: str) -> tuple[str, ...]:
        """Dotted names of a block's linears inside it: what QLoRA quantizes and adapts."""
        inner = ("wi_0", "wi_1", "wo") if self.is_gated else ("wi", "wo")
        return tuple(
            f"layer.{index}.{sublayer}.{linear}"
            for index, sublayer in enumerate(self.sublayers(stack))
            for linear in (inner if sublayer == "DenseReluDense" else _ATTENTION)
        )

    def block_norms(self, stack: str) -> tuple[str, ...]:
        return tuple(f"layer.{index}.layer_norm" for index in range(len(self.sublayers(stack))))

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """`(out, in)` of one of `block_linears`, as checkpoints store it."""
        heads = self.num_heads * self.d_kv
        name = linear.rpartition(".")[2]
        if name in ("q", "k", "v"):
            return heads, self.d_model
        return {"o": (self.d_model, heads), "wo": (self.d_model, self.d_ff)}.get(name, (self.d_ff, self.d_model))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint of this model, by HF name."""
        shapes: dict[str, tuple[int, ...]] = {"shared.weight": (self.vocab_size, self.d_model)}
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.d_model)
        for stack in STACKS:
            shapes[f"{stack}.final_layer_norm.weight"] = (self.d_model,)
            shapes[bias_name(stack)] = (self.relative_attention_num_buckets, self.num_heads)
            for block in range(self.depth(stack)):
                for norm in self.block_norms(stack):
                    shapes[f"{stack}.block.{block}.{norm}.weight"] = (self.d_model,)
                for linear in self.block_linears(stack):
                    shapes[f"{stack}.block.{block}.{linear}.weight"] = self.linear_shape(linear)
        return shapes


def bias_name(stack: str) -> str:
    """The table of relative positions, which the first block holds for all of them."""
    return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
