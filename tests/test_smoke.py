"""The shortest path through the installed package: quantize, adapt, one training step."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import qlora_jax


def test_one_step_on_the_adapters_lowers_the_loss():
    dense = qlora_jax.nf4_dense.from_linear(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), rank=4, rngs=nnx.Rngs(1))
    graph, adapters, frozen = nnx.split(dense, qlora_jax.trainable(dense), ...)
    x, y = jax.random.normal(jax.random.key(2), (8, 64)), jnp.ones((8, 32))
    tx = qlora_jax.paged(optax.adamw(1e-2))
    state = tx.init(adapters)

    def loss(adapters):
        return ((nnx.merge(graph, adapters, frozen)(x) - y) ** 2).mean()

    before, gradient = jax.value_and_grad(loss)(adapters)
    updates, state = tx.update(gradient, state, adapters)
    assert loss(optax.apply_updates(adapters, updates)) < before
    assert {leaf.shape for leaf in jax.tree.leaves(gradient)} == {(64, 4), (4, 32)}


def test_the_compiled_kernels_were_installed():
    assert qlora_jax.nf4.kernel_report()["cpu"] == "loaded"
