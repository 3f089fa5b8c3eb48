"""What shapes a LLaMA, or a model of a family like it: its configuration, and the tensors that follow from it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from qlora_jax.errors import UserError

# The seven linears of a block by HF's dotted names inside it: what QLoRA quantizes and adapts.
BLOCK_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_LENGTH_DEPENDENT = ("dynamic", "longrope", "su")
# What an MLP may put its gate through, by HF's names.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was pretrained with.

    Attributes:
      rope_type: "linear" (all frequencies divided by `factor`), "llama3" (only the low ones) or "yarn" (low ones, with
        a ramp over features): see `models/rope.py`.
      factor: how many times longer.
      low_freq_factor, high_freq_factor: "llama3" only.
      original_max_position_embeddings: "llama3" and "yarn".
      beta_fast, beta_slow, truncate: where the ramp of "yarn" lies.
      attention_factor: what cosines and sines are multiplied by ("yarn").
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


class DecoderTensors:
    """The tensors of a decoder's checkpoint, which configurations of families describe by what they override here."""

    num_hidden_layers: int

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors outside of the blocks, by HF name."""
        raise NotImplementedError

    def block_vectors(self) -> dict[str, int]:
        """What a block has beside its linears: tensor names inside it, and lengths."""
        raise NotImplementedError

    def block_linears(self) -> tuple[str, ...]:
        """The linears of a block by HF's dotted names inside it: what QLoRA quantizes and adapts."""
        raise NotImplementedError

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """`(out, in)` of one of `block_linears`, as checkpoints store it."""
        raise NotImplementedError

    def has_bias(self, linear: str) -> bool:
        raise NotImplementedError

    @property
    def layers_name(self) -> str:
        """Of the list of blocks."""
        raise NotImplementedError

    def layer_tensors(self, name: str) -> list[str]:
        """A tensor's names in all layers."""
        return [f"{self.layers_name}.{layer}.{name}" for layer in range(self.num_hidden_layers)]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint of this model, by HF name."""
        shapes = self.outer_shapes()
        for name, length in self.block_vectors().items():
            shapes |= dict.fromkeys(self.layer_tensors(name), (length,))
        for linear in self.block_linears():
            shape = self.linear_shape(linear)
            shapes |= dict.fromkeys(self.layer_tensors(f"{linear}.weight"), shape)
            if self.has_bias(linear):
                shapes |= dict.fromkeys(self.layer_tensors(f"{linear}.bias"), shape[:1])
        return shapes


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderTensors):
    """HF's configuration of a LLaMA or the like, as far as it changes what is computed; hashable.

    Names and meanings are HF's, but for those explained here.

    Attributes:
      attention_bias, attention_output_bias: whether q, k and v have biases, and whether o has one (None: as they have).
      qk_norm: whether the queries and keys of each head are normalized before they are rotated.
      sliding_window: a token sees the last so many tokens alone, itself one of them. None: all.
      layer_types: of each layer "sliding_attention" or "full_attention". None: all are alike.
      local_rope_theta: rope_theta of layers with a window, which are not stretched. None: as of the others.
      unit_offset: whether norms multiply by 1 + weight.
      scaled_embedding: whether embeddings are multiplied by the root of hidden_size.
      post_norms: whether what attention and MLP give is normalized, too, before it is added.
      query_pre_attn_scalar: scores are divided by its root. None: by that of head_dim.
      attn_logit_softcapping, final_logit_softcapping: c of `c * tanh(x / c)` for scores and logits. None: x.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    hidden_act: str = "silu"
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    local_rope_theta: float | None = None
    unit_offset: bool = False
    scaled_embedding: bool = False
    post_norms: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Takes what is needed from `Checkpoint.config` and refuses what would compute something else.

        Raises:
          UserError: an unknown activation, partial rotary embeddings, an unknown kind of RoPE scaling or one
            with a key missing, heads that key/value heads do not divide, or an odd head_dim.
        """
        check_activation(config.get("hidden_act", "silu"))
        if (share := config.get("partial_rotary_factor", 1.0)) != 1.0:
            raise UserError(
                f"partial_rotary_factor={share} of the model is not supported", why="whole heads are rotated"
            )
        if config.get("use_bidirectional_attention"):
            raise UserError(
                "use_bidirectional_attention=true of the model is not supported", why="tokens see earlier ones alone"
            )
        own = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in config.items() if key in own and value is not None}
        values["rope_scaling"] = rope_scaling(config)
        if types := values.get("layer_types"):
            values["layer_types"] = tuple(types)
        made = cls(**values)
        check_heads(made.num_attention_heads, made.num_key_value_heads, made.head_dim)
        if made.layer_types is not None and len(made.layer_types) != made.num_hidden_layers:
            raise UserError(
                f"layer_types of the model names {len(made.layer_types)} layers, num_hidden_layers is "
                f"{made.num_hidden_layers}",
                fix="see config.json",
            )
        return made

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    def of_windows(self) -> "LlamaConfig":
        """With the rotary positions of layers with a window."""
        if self.local_rope_theta is None:
            return self
        return dataclasses.replace(self, rope_theta=self.local_rope_theta, rope_scaling=None, local_rope_theta=None)

    def linear_shape(self, linear: str) -> tuple[int, int]:
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden_size),
            "k_proj": (keys, self.hidden_size),
            "v_proj": (keys, self.hidden_size),
            "o_proj": (self.hidden_size, queries),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }[linear.split(".")[-1]]

    def has_bias(self, linear: str) -> bool:
        if linear.startswith("mlp."):
            return self.mlp_bias
        if linear == "self_attn.o_proj" and self.attention_output_bias is not None:
            return self.attention_output_bias
        return self.attention_bias

    def block_linears(self) -> tuple[str, ...]:
        return BLOCK_LINEARS

    def block_vectors(self) -> dict[str, int]:
        norms = ["input_layernorm", "post_attention_layernorm"]
        if self.post_norms:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        lengths = dict.fromkeys((f"{norm}.weight" for norm in norms), self.hidden_size)
        if self.qk_norm:
            lengths |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), self.head_dim)
        return lengths

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    @property
    def layers_name(self) -> str:
        return "model.layers"


def check_heads(heads: int, kv_heads: int, rotary_dim: int) -> None:
    """UserError: heads that key/value heads do not divide, or an odd number of features to rotate."""
    if heads % kv_heads:
        raise UserError(
            f"num_attention_heads={heads} of the model is not a multiple of num_key_value_heads={kv_heads}",
            why="each key/value head serves the same number of query heads",
        )
    if rotary_dim % 2:
        raise UserError(f"head_dim={rotary_dim} of the model is odd", why="RoPE rotates pairs of features")


def check_activation(name: str) -> None:
    """UserError: an activation that is not among `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise UserError(f"hidden_act={name!r} of the model is not supported", why=f"{', '.join(ACTIVATIONS)} are")


def rope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    """The stretching that `rope_scaling` of a configuration asks for. UserError: of an unknown or incomplete kind."""
    scaling = config.get("rope_scaling")
    if not scaling or scaling.get("rope_type", "default") == "default":
        return None
    rope_type = scaling["rope_type"]
    if rope_type in _LENGTH_DEPENDENT:
        raise UserError(
            f"rope scaling {rope_type!r} of the model is not supported",
            why="its frequencies change with the length of the text: one token's keys would differ from batch to batch",
            fix='in config.json "rope_scaling": null, for texts up to the length it was pretrained with',
        )
    if rope_type not in ("linear", "llama3", "yarn"):
        raise UserError(
            f"rope scaling {rope_type!r} of the model is not supported",
            why="default, linear, llama3 and yarn are; with another the model would compute wrong numbers, not fail",
        )
    if rope_type == "yarn":
        return _yarn(scaling, config)
    needed = ["factor"]
    if rope_type == "llama3":
        needed += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    if missing := [key for key in needed if scaling.get(key) is None]:
        raise UserError(f"rope scaling {rope_type!r} of the model lacks {', '.join(missing)}", fix="see config.json")
    return RopeScaling(rope_type, **{key: scaling[key] for key in needed})


def _yarn(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling:
    """YaRN (arXiv 2309.00071) with what HF fills in."""
    positions = config.get("max_position_embeddings")
    original = scaling.get("original_max_position_embeddings") or positions
    factor = scaling.get("factor") or (positions / original if positions and original else None)
    if factor is None or original is None:
        raise UserError(
            "rope scaling 'yarn' of the model lacks factor or original_max_position_embeddings", fix="see config.json"
        )

    def gain(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, over_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = gain(mscale) / gain(over_all) if mscale and over_all else gain(1.0)
    return RopeScaling(
        "yarn",
        float(factor),
        original_max_position_embeddings=int(original),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        truncate=bool(scaling.get("truncate", True)),
        attention_factor=float(attention),
    )
