"""Attention in blocks, one head at a time, against the library's over all scores at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models import attention, blockwise
from qlora_jax.models.attention import visible

SHAPES = [(2, 40, 4, 2, 16), (1, 33, 3, 1, 8), (2, 16, 2, 2, 8)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK_QUERIES", 16)
    monkeypatch.setattr(attention, "SHORT", 0)


def draw(shape, dtype=jnp.float32):
    batch, seq, heads, kv_heads, head_dim = shape
    rng = np.random.default_rng(shape)
    sizes = {"query": heads, "key": kv_heads, "value": kv_heads, "dy": heads}
    return [jnp.asarray(rng.standard_normal((batch, seq, n, head_dim)), dtype) for n in sizes.values()]


def segments(batch, seq):
    """Two examples and padding in a row, cut at other places in each."""
    cuts = np.arange(batch)[:, None] + seq // 3
    at = np.arange(seq)[None, :]
    return jnp.asarray(np.where(at < cuts, 1, np.where(at < seq - 3, 2, 0)), jnp.int32)


def library(query, key, value, mask):
    mask = None if mask is None else mask[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=mask is None)


def with_gradients(attend, query, key, value, mask, dy):
    y, pull_back = jax.vjp(lambda *operands: attend(*operands, mask), query, key, value)
    return y, *pull_back(dy)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_library(shape, masked):
    *operands, dy = draw(shape)
    mask = visible(*[segments(*shape[:2])] * 2) if masked else None
    ours = jax.jit(lambda *a: with_gradients(blockwise.blockwise_attention, *a, mask, dy))(*operands)
    for own, expected in zip(ours, with_gradients(library, *operands, mask, dy), strict=True):
        np.testing.assert_allclose(own, expected, atol=2e-6 * float(jnp.abs(expected).max()))


def test_bfloat16_is_no_further_from_float32_than_the_library():
    shape = (2, 48, 4, 2, 32)
    *operands, dy = draw(shape, jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (*operands, dy)]
    exact = with_gradients(library, *wide[:3], None, wide[3])
    ours = with_gradients(blockwise.blockwise_attention, *operands, None, dy)
    theirs = with_gradients(library, *operands, None, dy)
    for own, other, expected in zip(ours, theirs, exact, strict=True):
        assert own.dtype == jnp.bfloat16
        norm = np.linalg.norm(expected)
        error, reference = (np.linalg.norm(x.astype(jnp.float32) - expected) / norm for x in (own, other))
        assert error <= 1.1 * reference


def test_a_later_token_leaves_no_trace():
    query, key, value, _ = draw((1, 40, 2, 1, 8))
    y = blockwise.blockwise_attention(query, key, value, None)
    changed = blockwise.blockwise_attention(query, key.at[:, 30:].set(9.0), value.at[:, 30:].set(9.0), None)
    np.testing.assert_array_equal(y[:, :30], changed[:, :30])
    assert not np.allclose(y[:, 30:], changed[:, 30:])


def test_attend_takes_it_for_tokens_among_themselves_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(
        attention, "blockwise_attention", lambda *args: calls.append(1) or blockwise.blockwise_attention(*args)
    )
    monkeypatch.setattr(attention, "cuda_kernels_loaded", lambda: False)
    query, key, value, _ = draw((2, 40, 4, 2, 16))
    y = attention.attend(query, key, value, None, same_tokens=True)
    assert calls
    full = jnp.tril(jnp.ones((2, 40, 40), bool))
    np.testing.assert_allclose(attention.attend(query, key, value, full, same_tokens=False), y, atol=1e-5)
    monkeypatch.setattr(attention, "SHORT", 64)
    attention.attend(query, key, value, None, same_tokens=True)
    assert len(calls) == 1
