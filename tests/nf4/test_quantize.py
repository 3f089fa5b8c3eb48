"""Properties of quantize and dequantize, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.nf4 import NF4Tensor, dequantize, quantize
from qlora_jax.nf4.codebook import NF4_CODE
from qlora_jax.nf4.tensor import leaf_shapes


def normal(*shape: int, dtype: str = "bfloat16", seed: int = 0, scale: float = 0.02) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 40)),
    block_size=st.sampled_from([32, 64, 128]),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape_round_trips_within_half_a_step(shape, block_size, double_quant, seed):
    kernel = normal(*shape, dtype="float32", seed=seed)
    w = quantize(kernel, block_size=block_size, double_quant=double_quant)
    for name, (dims, dtype) in leaf_shapes(shape, block_size, double_quant).items():
        leaf = getattr(w, name)
        assert (leaf.shape, leaf.dtype) == (dims, dtype), name
    flat = np.asarray(kernel).T.reshape(-1)
    absmax = np.maximum.reduceat(np.abs(flat), np.arange(0, flat.size, block_size)).repeat(block_size)[: flat.size]
    error = np.abs(np.asarray(dequantize(w)).T.reshape(-1) - flat)
    # Half the widest gap of the code, plus at most 1 % for a scale through its 8-bit code.
    half_step = np.diff(NF4_CODE).max() / 2
    offset = 0.0 if w.absmax_offset is None else float(w.absmax_offset)
    slack = 0.0 if not double_quant else 0.05 * np.abs(absmax - offset).max() + 1e-6 * absmax
    assert (error <= absmax * half_step * 1.0001 + slack).all()


def test_relative_error_on_gaussian_weights():
    """0.00845 relative MSE at block 64 (information content of NF4 on N(0, 1)); double quantization adds 0.05 %."""
    kernel = normal(1024, 1024, dtype="float32", scale=1.0)
    plain, double = (
        float(jnp.mean((dequantize(quantize(kernel, double_quant=dq)) - kernel) ** 2) / jnp.mean(kernel**2))
        for dq in (False, True)
    )
    assert plain == pytest.approx(0.00845, rel=0.01)
    assert plain < double < plain * 1.003


def test_requantizing_dequantized_weights_changes_nothing():
    w = quantize(normal(128, 96), double_quant=False)
    again = quantize(dequantize(w), double_quant=False)
    np.testing.assert_array_equal(w.packed, again.packed)
    np.testing.assert_array_equal(w.absmax, again.absmax)


def test_zero_blocks_are_exact_zeros_and_code_seven():
    kernel = jnp.zeros((64, 8), jnp.bfloat16).at[:, 3].set(0.5)
    w = quantize(kernel)
    np.testing.assert_array_equal(w.packed[0], np.full(32, 0x77, np.uint8))
    np.testing.assert_array_equal(dequantize(w)[:, :3], np.zeros((64, 3)))


def test_storage_of_a_large_layer_is_at_most_4_13_bits_per_parameter():
    """Design table: storage of a quantized linear layer of >= 1M parameters."""
    w = quantize(normal(1024, 1024))
    assert w.nbytes * 8 / 1024**2 <= 4.13


def test_a_stack_is_its_layers():
    kernel = normal(3, 128, 48)
    stack = quantize(kernel)
    assert stack.num_layers == 3
    assert stack.shape == (128, 48)
    layers = [quantize(kernel[i]) for i in range(3)]
    for left, right in zip(jax.tree.leaves(stack), jax.tree.leaves(NF4Tensor.stack(layers)), strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(dequantize(stack)[1], dequantize(layers[1]))
    np.testing.assert_array_equal(dequantize(stack.layer(2)), dequantize(layers[2]))


def test_layer_views_share_buffers_and_check_their_index():
    stack = quantize(normal(3, 64, 16))
    view = stack.layer(1)
    assert view.packed is stack.packed
    assert jax.tree.structure(view) != jax.tree.structure(stack)
    with pytest.raises(IndexError, match="layer 3 of a stack of 3"):
        stack.layer(3)
    with pytest.raises(IndexError, match="layer -1"):
        stack.layer(-1)
    with pytest.raises(ValueError, match="needs a stack"):
        quantize(normal(64, 16)).layer(0)


def test_a_traced_layer_index_is_clamped():
    stack = quantize(normal(3, 64, 16))
    values = jax.jit(lambda i: dequantize(stack.layer(i)))
    np.testing.assert_array_equal(values(7), dequantize(stack.layer(2)))
    for below in (-1, -5):
        np.testing.assert_array_equal(values(below), dequantize(stack.layer(0)))


def test_ragged_weights_refuse_to_be_sharded():
    with pytest.raises(ValueError, match="in_features 50 is not a multiple of block_size 64"):
        quantize(normal(50, 33)).shard(0)


def test_views_set_their_own_entries():
    view = quantize(normal(2, 128, 16)).layer(1).shard(4, 1)
    np.testing.assert_array_equal(view.where, [1, 4, 1])


def test_quantize_and_dequantize_under_jit_equal_eager():
    kernel = normal(128, 64)
    eager, jitted = quantize(kernel), jax.jit(quantize)(kernel)
    for left, right in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_array_equal(left, right)
    rounded = dequantize(eager, jnp.float32)
    np.testing.assert_array_equal(rounded, dequantize(eager).astype(jnp.float32))


def test_pytrees_accept_any_leaf():
    w = quantize(normal(64, 16))
    nones = jax.tree.map(lambda _: None, w)
    assert dataclasses.replace(nones).shape == (64, 16)
    hash(jax.tree.structure(w))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((64, 4), np.int8),), TypeError, "got int8"),
        (("kernel",), TypeError, "got str"),
        ((np.zeros((64, 4), np.float32), "nf5"), ValueError, "got 'nf5'; did you mean 'nf4'"),
        ((np.zeros((64, 4), np.float32), "nf4", 48), ValueError, "got 48"),
        ((np.zeros(64, np.float32),), ValueError, r"got \(64,\)"),
        ((np.zeros((0, 4), np.float32),), ValueError, r"got \(0, 4\)"),
    ],
)
def test_refusals_name_what_was_given(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(*arguments)
