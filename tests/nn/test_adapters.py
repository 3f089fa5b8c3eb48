"""trainable (what an optimizer may see) and add_lora (adapters on layers that exist)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax import nf4_dense, trainable
from qlora_jax.errors import UserError
from qlora_jax.nn import add_lora


class Attention(nnx.Module):
    def __init__(self, rank: int, rngs: nnx.Rngs) -> None:
        self.q_proj = nf4_dense(64, 64, rank=rank, rngs=rngs)
        self.v_proj = nf4_dense(64, 64, rank=rank, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)

    def __call__(self, x):
        return self.v_proj(nnx.tanh(self.q_proj(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rank: int, rngs: nnx.Rngs) -> None:
        self.attention = Attention(rank, rngs)
        self.head = nf4_dense(64, 64, rank=0, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attention(x))


def leaf_names(state: nnx.State) -> set[str]:
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


ADAPTERS = {f"attention.{name}_proj.lora_{leaf}" for name in "qv" for leaf in "ab"}


def test_trainable_splits_off_exactly_the_adapters():
    model = Model(2, nnx.Rngs(0))
    _, lora, frozen = nnx.split(model, trainable(model), ...)
    assert leaf_names(lora) == ADAPTERS
    assert not leaf_names(frozen) & ADAPTERS


def test_an_nnx_optimizer_over_trainable_changes_the_adapters_and_nothing_else():
    model = Model(2, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=trainable(model))
    moments = jax.tree.leaves(nnx.state(optimizer.opt_state))
    assert not any(leaf.dtype == jnp.uint8 for leaf in moments)
    before = jax.tree.map(jnp.array, nnx.state(model))
    x = jax.random.normal(jax.random.key(1), (4, 64))
    differentiate = nnx.value_and_grad(
        lambda model: ((model(x) - 1) ** 2).mean(), argnums=nnx.DiffState(0, trainable(model))
    )
    losses = []
    for _ in range(3):
        loss, gradients = differentiate(model)
        optimizer.update(model, gradients)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    after = dict(nnx.to_flat_state(nnx.state(model)))
    changed = {
        ".".join(map(str, path))
        for path, old in nnx.to_flat_state(before)
        if any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (old, after[path])), strict=True))
    }
    assert changed == ADAPTERS


def test_trainable_raises_where_nothing_would_be_trained():
    with pytest.raises(UserError, match="Model has no adapters"):
        trainable(Model(0, nnx.Rngs(0)))


def test_add_lora_adapts_every_layer_or_the_targets():
    everywhere = add_lora(Model(0, nnx.Rngs(0)), rank=2, rngs=nnx.Rngs(1))
    assert leaf_names(nnx.state(everywhere, nnx.LoRAParam)) == ADAPTERS | {"head.lora_a", "head.lora_b"}
    model = Model(0, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (4, 64))
    base = model(x)
    assert (
        add_lora(model, rank=2, alpha=4.0, dropout=0.1, targets=["attention.q_proj"], rngs=jax.random.key(0)) is model
    )
    assert leaf_names(nnx.state(model, nnx.LoRAParam)) == {"attention.q_proj.lora_a", "attention.q_proj.lora_b"}
    q = model.attention.q_proj
    assert (q.rank, q.alpha, q.dropout, q.scaling) == (2, 4.0, 0.1, 2.0)
    np.testing.assert_array_equal(model(x), base)
    layer = add_lora(nf4_dense(64, 64, rngs=nnx.Rngs(0)), rank=2, rngs=nnx.Rngs(0))
    assert layer.lora_a.get_value().shape == (64, 2)


def test_add_lora_draws_a_different_a_for_each_layer():
    model = add_lora(Model(0, nnx.Rngs(0)), rank=2, rngs=jax.random.key(0))
    q, v = model.attention.q_proj.lora_a.get_value(), model.attention.v_proj.lora_a.get_value()
    assert bool((q != v).any())


def test_add_lora_refuses_what_would_do_nothing_or_overwrite():
    with pytest.raises(UserError, match="'q' matches no layer"):  # Not a whole component.
        add_lora(Model(0, nnx.Rngs(0)), rank=2, targets=["q"], rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="no nf4_dense"):
        add_lora(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rank=2, rngs=nnx.Rngs(0))
    model = Model(2, nnx.Rngs(0))
    with pytest.raises(UserError, match="attention"):
        add_lora(model, rank=2, rngs=nnx.Rngs(0))
    assert model.head.rank == 0
    with pytest.raises(UserError, match="rank-0"):
        add_lora(model, rank=0, targets=["head"], rngs=nnx.Rngs(0))
