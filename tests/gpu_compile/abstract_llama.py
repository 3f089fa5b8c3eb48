"""LLaMA's training step as shapes alone: 4-bit weights in the layout of the CUDA kernels, adapters, AdamW."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qlora_jax.models.config import BLOCK_LINEARS, LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.nf4.placement import use_layout
from qlora_jax.nf4.tensor import leaf_shapes
from qlora_jax.nn import add_lora
from qlora_jax.training.step import BATCH_KEYS, SplitModel, init_train_state, make_train_step, split_model

RANK = 16

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
)


def llama_7b(layers: int) -> LlamaConfig:
    """LLaMA 7B's layers, fewer of them."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
    )


def linear_shapes(c: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of a block's linears."""
    h, f, q, kv = (
        c.hidden_size,
        c.intermediate_size,
        *(n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads)),
    )
    shapes = ((h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h))
    return dict(zip(BLOCK_LINEARS, shapes, strict=True))


def nf4(shape: tuple[int, int], layers: int) -> NF4Tensor:
    leaves = leaf_shapes(shape, 64, double_quant=True, layout="fragments")
    zeros = {name: jnp.zeros((layers, *dims), dtype) for name, (dims, dtype) in leaves.items()}
    return NF4Tensor(**zeros, shape=shape, layout="fragments")


def nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class TrainingStep:
    """`function(*arguments)` is one optimizer step; arguments: state (to be donated), frozen weights, batch."""

    config: LlamaConfig
    function: Any
    arguments: tuple[Any, ...]
    model: SplitModel
    rows: int

    @property
    def layer_adapter_bytes(self) -> int:
        return nbytes(self.model.trainable) // self.config.num_hidden_layers

    @property
    def layer_activation_bytes(self) -> int:
        """What the forward pass keeps of a layer for the backward pass: its input, in bfloat16."""
        return self.rows * self.config.hidden_size * 2

    @property
    def layer_dense_bytes(self) -> int:
        """What the layer's weights would take in bfloat16."""
        return sum(2 * k * n for k, n in linear_shapes(self.config).values())


def training_step(config: LlamaConfig, batch: int, seq: int) -> TrainingStep:
    model = split_model(nnx.eval_shape(lambda: _model(config)))
    optimizer = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(1e-3))
    state = jax.eval_shape(lambda adapters: init_train_state(adapters, optimizer), model.trainable)
    dtypes = {name: jnp.bool_ if name == "loss_mask" else jnp.int32 for name in BATCH_KEYS}
    arrays = {name: jax.ShapeDtypeStruct((1, batch, seq), dtype) for name, dtype in dtypes.items()}
    step = make_train_step(model.graphdef, optimizer, optax.constant_schedule(1e-3))
    return TrainingStep(config, step, (state, model.frozen, arrays), model, batch * seq)


def _model(c: LlamaConfig) -> Llama:
    layers = c.num_hidden_layers

    def dense(*shape: int) -> dict[str, Any]:
        return {"weight": jnp.zeros(shape, jnp.bfloat16)}

    block: dict[str, Any] = {
        "input_layernorm": dense(layers, c.hidden_size),
        "post_attention_layernorm": dense(layers, c.hidden_size),
    }
    for name, shape in linear_shapes(c).items():
        room, linear = name.split(".")
        block.setdefault(room, {})[linear] = {"kernel": nf4(shape, layers)}
    weights = {
        "embed_tokens": dense(c.vocab_size, c.hidden_size),
        "lm_head": dense(c.vocab_size, c.hidden_size),
        "norm": dense(c.hidden_size),
        "layers": block,
    }
    with use_layout("fragments"):
        return add_lora(Llama(c, weights), rank=RANK, rngs=nnx.Rngs(0))
