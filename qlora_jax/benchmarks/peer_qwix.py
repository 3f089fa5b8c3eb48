"""Calls of peer_main.py: a QLoRA step with Qwix' NF4 in Flax NNX, on the CPU.

A LLaMA of `nnx.Linear` in bfloat16, with Qwix' LoRA rule for every linear of its blocks: NF4 with one scale for 64
weights of the contracted axis, rank-r adapters. The head stays dense; no activations are recomputed.
"""

import platform
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx

TILE = 64
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Block(nnx.Module):
    """One layer."""

    def __init__(self, hidden: int, intermediate: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm1, self.norm2 = _norm(hidden, rngs), _norm(hidden, rngs)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (_linear(hidden, hidden, rngs) for _ in range(4))
        self.gate_proj, self.up_proj = _linear(hidden, intermediate, rngs), _linear(hidden, intermediate, rngs)
        self.down_proj = _linear(intermediate, hidden, rngs)

    def __call__(self, h: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        x = self.norm1(h)
        query, key, value = (
            projection(x).reshape(*x.shape[:2], self.heads, -1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = jax.nn.dot_product_attention(_rotate(query, cos, sin), _rotate(key, cos, sin), value, is_causal=True)
        h = h + self.o_proj(y.reshape(x.shape))
        x = self.norm2(h)
        return h + self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Llama(nnx.Module):
    """The model."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs) -> None:
        hidden = config["hidden_size"]
        self.head_dim = config["head_dim"]
        self.embed_tokens = nnx.Embed(
            config["vocab_size"], hidden, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs
        )
        self.layers = nnx.List(
            [
                Block(hidden, config["intermediate_size"], config["num_attention_heads"], rngs)
                for _ in range(config["num_hidden_layers"])
            ]
        )
        self.norm = _norm(hidden, rngs)
        self.lm_head = _linear(hidden, config["vocab_size"], rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        h = self.embed_tokens(ids)
        frequencies = 10000.0 ** (-jnp.arange(0, self.head_dim, 2) / self.head_dim)
        angles = jnp.arange(ids.shape[1])[:, None] * frequencies
        cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
        for layer in self.layers:
            h = layer(h, cos, sin)
        return self.lm_head(self.norm(h)).astype(jnp.float32)


class State:
    """A model in training, its compiled step and the batch."""

    model: Any = None
    optimizer: Any = None
    ids: Any = None


def start(threads: int) -> dict[str, str]:
    """Returns the versions. XLA makes as many threads as there are cores for this process."""
    versions = {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    return versions | {"qwix": qwix.__version__}


def build(
    folder: None, config: dict[str, Any], rank: int, alpha: float, learning_rate: float, clip: float
) -> dict[str, Any]:
    """Makes the model with random weights from HF's keys of a LLaMA.

    Returns:
      `trainable`: how many numbers are trained.
    """
    rules = [
        qwix.LoraRule(
            module_path=f".*({'|'.join(LINEARS)})", weight_qtype="nf4", tile_size=TILE, rank=rank, alpha=alpha
        )
    ]
    ids = jnp.zeros((1, config["max_position_embeddings"]), jnp.int32)
    State.model = qwix.apply_lora_to_model(Llama(config, nnx.Rngs(0)), qwix.LoraProvider(rules), ids, rngs=nnx.Rngs(1))
    transformation = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(learning_rate, weight_decay=0.0))
    State.optimizer = nnx.Optimizer(State.model, transformation, wrt=nnx.LoRAParam)
    trained = jax.tree.leaves(nnx.state(State.model, nnx.LoRAParam))
    return {"trainable": sum(leaf.size for leaf in trained)}


def load_batch(rows: list[tuple[list[int], list[bool]]]) -> None:
    """Takes token ids, rows of one length; all but the first are trained."""
    State.ids = jnp.asarray(np.array([ids for ids, _ in rows], np.int32))


def seconds(name: str, times: int) -> float:
    """How long so many optimizer steps on the batch take."""
    began = time.perf_counter()
    for _ in range(times):
        step(name)
    return time.perf_counter() - began


def step(name: str) -> float:
    """One optimizer step; the loss before it."""
    return float(_step(State.model, State.optimizer, State.ids))


CALLS = {call.__name__: call for call in (start, build, load_batch, seconds, step)}


@nnx.jit
def _step(model: Any, optimizer: Any, ids: jax.Array) -> jax.Array:
    def loss(model: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(ids)[:, :-1], ids[:, 1:])
        return jnp.mean(losses)

    value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, gradient)
    return value


def _linear(in_features: int, out_features: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        in_features, out_features, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs
    )


def _norm(features: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(features, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
