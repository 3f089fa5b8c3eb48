"""DoRA against its definition, with the dense weight: outputs in float64, gradients by JAX's own derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.nf4 import NF4Tensor, dequantize
from qlora_jax.nn import attach_dora, nf4_dense, scan_layers, trainable

SHAPE, RANK, ALPHA = (128, 192), 4, 12.0


def layer(quant_type, *, dropout=0.0, layers=None, seed=0, fill=True):
    rng = np.random.default_rng(seed)
    shape = SHAPE if layers is None else (layers, 128, 128)
    kernel = jnp.asarray(0.05 * rng.normal(size=shape), jnp.bfloat16)
    dense = nf4_dense.from_kernel(kernel, quant_type=quant_type)
    attach_dora(dense, rank=RANK, alpha=ALPHA, dropout=dropout, rngs=nnx.Rngs(seed))
    if fill:
        for variable in (dense.lora_b, dense.lora_magnitude):
            value = variable.get_value()
            variable.set_value(value + jnp.asarray(0.1 * rng.normal(size=value.shape), jnp.float32))
    return dense


def weight(dense) -> jax.Array:
    kernel = dense.kernel.get_value()
    return dequantize(kernel, jnp.float32) if isinstance(kernel, NF4Tensor) else kernel.astype(jnp.float32)


def by_definition(x, w, a, b, m, scaling, d=None):
    """PEFT's: V = W + s A B; the lengths are constants for the derivative. `d`: x after dropout."""
    v = w + scaling * a @ b
    factor = m / jax.lax.stop_gradient(jnp.sqrt(jnp.sum(v**2, axis=0)))
    d = x if d is None else d
    return x @ w + (factor - 1)[None] * (d @ w) + factor[None] * scaling * (d @ a @ b)


@pytest.mark.parametrize("quant_type", ["nf4", None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 6e-3)])
def test_output_and_gradients_are_the_definitions(quant_type, dtype, tolerance):
    """Relative Frobenius error; in bfloat16 products are rounded on the way."""
    dense = layer(quant_type)
    x = jax.random.normal(jax.random.key(1), (48, SHAPE[0]), dtype)
    cotangent = jax.random.normal(jax.random.key(2), (48, SHAPE[1]), jnp.float32)
    values = tuple(v.get_value() for v in (dense.lora_a, dense.lora_b, dense.lora_magnitude))

    graph, adapter, frozen = nnx.split(dense, nnx.LoRAParam, ...)

    def ours(x, adapter):
        return jnp.sum(nnx.merge(graph, adapter, frozen)(x).astype(jnp.float32) * cotangent)

    def theirs(x, values):
        return jnp.sum(by_definition(x, weight(dense), *values, dense.scaling) * cotangent)

    with jax.default_matmul_precision("highest"):
        exact = by_definition(*(np.asarray(v, np.float64) for v in (x, weight(dense), *values)), dense.scaling)
        found = np.asarray(dense(x), np.float64)
        assert dense(x).dtype == dtype
        wanted_gradients = jax.grad(theirs, (0, 1))(x.astype(jnp.float32), values)
        d_x, d_adapter = jax.jit(jax.grad(ours, (0, 1)))(x, adapter)
        gradients = d_x, tuple(d_adapter[name].get_value() for name in ("lora_a", "lora_b", "lora_magnitude"))
    assert np.linalg.norm(found - exact) <= tolerance * np.linalg.norm(exact)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        assert np.linalg.norm(np.asarray(one, np.float64) - other) <= 2 * tolerance * np.linalg.norm(other)


def test_it_starts_as_the_base_layer():
    dense = layer("nf4", fill=False)
    x = jax.random.normal(jax.random.key(0), (8, SHAPE[0]))
    np.testing.assert_allclose(dense(x), x @ weight(dense), rtol=1e-5, atol=1e-5)
    assert {type(v) for v in (dense.lora_a, dense.lora_b, dense.lora_magnitude)} == {nnx.LoRAParam}
    assert len(jax.tree.leaves(nnx.state(dense, trainable(dense)))) == 3
    assert not isinstance(dense.squares, nnx.LoRAParam)


def test_a_column_of_zeros_stays_one():
    kernel = jnp.ones((64, 8)).at[:, 3].set(0)
    dense = nf4_dense.from_kernel(kernel, quant_type=None)
    attach_dora(dense, rank=2, rngs=nnx.Rngs(0))
    y = dense(jnp.ones((2, 64)))
    assert np.isfinite(y).all()
    assert not y[:, 3].any()


@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_dropout_acts_on_what_is_added_alone(quant_type):
    from qlora_jax.nn.lora import dropped

    dense, key = layer(quant_type, dropout=0.5), jax.random.key(3)
    x = jax.random.normal(jax.random.key(1), (48, SHAPE[0]))
    d = dropped(x, 0.5, key)
    assert 0.4 < float((d == 0).mean()) < 0.6
    values = (v.get_value() for v in (dense.lora_a, dense.lora_b, dense.lora_magnitude))
    with jax.default_matmul_precision("highest"):
        expected = by_definition(x, weight(dense), *values, dense.scaling, d)
        np.testing.assert_allclose(dense(x, rngs=key), expected, rtol=1e-4, atol=1e-4)
        assert np.abs(dense(x, rngs=key) - dense(x)).max() > 0.1


@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_a_stack_is_scanned_layer_by_layer(quant_type):
    stack = layer(quant_type, layers=3)
    h = jax.random.normal(jax.random.key(1), (5, 128))
    found = scan_layers(stack, h)
    weights, values = weight(stack), [v.get_value() for v in (stack.lora_a, stack.lora_b, stack.lora_magnitude)]
    for i in range(3):
        h = by_definition(h, weights[i], *(value[i] for value in values), stack.scaling)
    np.testing.assert_allclose(found, h, rtol=1e-4, atol=1e-4)
