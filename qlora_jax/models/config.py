"""What shapes a LLaMA: its configuration, and the tensors that follow from it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

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
BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was pretrained with.

    Attributes:
      rope_type: "linear" (all frequencies divided by `factor`) or "llama3" (only the low ones, see `models/rope.py`).
      factor: how many times longer.
      low_freq_factor, high_freq_factor, original_max_position_embeddings: "llama3" only.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """HF's LLaMA configuration, as far as it changes what is computed. Names and meanings are HF's; hashable."""

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
    mlp_bias: bool = False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Takes what is needed from `Checkpoint.config` and refuses what would compute something else.

        Raises:
          UserError: another activation than SiLU, partial rotary embeddings, an unknown kind of RoPE scaling or one
            with a key missing, heads that key/value heads do not divide, or an odd head_dim.
        """
        if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise UserError(f"hidden_act={activation!r} of the model is not supported", why="LLaMA's MLP is SwiGLU")
        if (share := config.get("partial_rotary_factor", 1.0)) != 1.0:
            raise UserError(
                f"partial_rotary_factor={share} of the model is not supported", why="whole heads are rotated"
            )
        own = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in config.items() if key in own and value is not None}
        made = cls(**values | {"rope_scaling": _rope_scaling(config.get("rope_scaling"))})
        if made.num_attention_heads % made.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={made.num_attention_heads} of the model is not a multiple of "
                f"num_key_value_heads={made.num_key_value_heads}",
                why="each key/value head serves the same number of query heads",
            )
        if made.head_dim % 2:
            raise UserError(f"head_dim={made.head_dim} of the model is odd", why="RoPE rotates pairs of features")
        return made

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """`(out, in)` of one of `BLOCK_LINEARS`, as checkpoints store it."""
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
        return self.attention_bias if linear.startswith("self_attn.") else self.mlp_bias

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint of this model, by HF name."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        for layer in range(self.num_hidden_layers):
            for norm in BLOCK_NORMS:
                shapes[f"model.layers.{layer}.{norm}.weight"] = (self.hidden_size,)
            for linear in BLOCK_LINEARS:
                shape = self.linear_shape(linear)
                shapes[f"model.layers.{layer}.{linear}.weight"] = shape
                if self.has_bias(linear):
                    shapes[f"model.layers.{layer}.{linear}.bias"] = shape[:1]
        return shapes


def _rope_scaling(scaling: Mapping[str, Any] | None) -> RopeScaling | None:
    if not scaling or scaling.get("rope_type", "default") == "default":
        return None
    rope_type = scaling["rope_type"]
    if rope_type not in ("linear", "llama3"):
        raise UserError(
            f"rope scaling {rope_type!r} of the model is not supported",
            why="default, linear and llama3 are; with another the model would compute wrong numbers, not fail",
        )
    needed = ["factor"]
    if rope_type == "llama3":
        needed += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    if missing := [key for key in needed if scaling.get(key) is None]:
        raise UserError(f"rope scaling {rope_type!r} of the model lacks {', '.join(missing)}", fix="see config.json")
    return RopeScaling(rope_type, **{key: scaling[key] for key in needed})
