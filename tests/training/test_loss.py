"""Chunked cross-entropy against a dense float64 reference, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.training.loss import trained_token_losses

BATCH, SEQ, EMBED, VOCAB = 3, 17, 8, 29


def example(mask_kind: str, seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(BATCH, SEQ, EMBED)).astype(np.float32)
    weight = rng.normal(size=(EMBED, VOCAB)).astype(np.float32)
    ids = rng.integers(0, VOCAB, size=(BATCH, SEQ)).astype(np.int32)
    mask = np.zeros((BATCH, SEQ), bool)
    if mask_kind == "one":
        mask[1, 5] = True
    elif mask_kind == "last":
        mask[2, SEQ - 1] = True
    elif mask_kind == "all":
        mask[:, 1:] = True
    elif mask_kind == "some":
        mask[:, 1:] = rng.random((BATCH, SEQ - 1)) < 0.4
        mask[0] = False
    return hidden, weight, ids, mask


def dense_reference(hidden, weight, ids, mask):
    """Row sums of losses and d(sum of cotangent * row sums)/d hidden in float64, position by position."""
    hidden, weight = hidden.astype(np.float64), weight.astype(np.float64)
    cotangent = np.arange(1.0, BATCH + 1)
    losses, grads = np.zeros(BATCH), np.zeros_like(hidden)
    for b, s in zip(*np.nonzero(mask), strict=True):
        logits = hidden[b, s - 1] @ weight
        p = np.exp(logits - logits.max())
        p /= p.sum()
        losses[b] -= np.log(p[ids[b, s]])
        p[ids[b, s]] -= 1
        grads[b, s - 1] += cotangent[b] * (weight @ p)
    return losses, grads


@pytest.mark.parametrize("mask_kind", ["none", "one", "last", "some", "all"])
@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 1000])
def test_value_and_gradient_equal_the_dense_reference(mask_kind, chunk_rows):
    hidden, weight, ids, mask = example(mask_kind)
    want_losses, want_grads = dense_reference(hidden, weight, ids, mask)

    def weighted(hidden):
        losses, counts = trained_token_losses(hidden, ids, mask, lambda h: h @ weight, chunk_rows=chunk_rows)
        return jnp.sum(losses * jnp.arange(1.0, BATCH + 1)), (losses, counts)

    (_, (losses, counts)), grads = jax.jit(jax.value_and_grad(weighted, has_aux=True))(hidden)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads, want_grads, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(counts, mask.sum(1))
    without_gradient, _ = trained_token_losses(hidden, ids, mask, lambda h: h @ weight, chunk_rows=chunk_rows)
    np.testing.assert_allclose(without_gradient, want_losses, rtol=1e-5, atol=1e-6)


def test_first_token_of_a_row_is_never_counted():
    hidden, weight, ids, mask = example("some")
    marked = mask.copy()
    marked[:, 0] = True
    head = lambda h: h @ weight  # noqa: E731
    for got, want in zip(
        trained_token_losses(hidden, ids, marked, head), trained_token_losses(hidden, ids, mask, head), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_bfloat16_states_give_float32_losses_and_bfloat16_gradients():
    hidden, weight, ids, mask = example("some")
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    head = lambda h: h.astype(jnp.float32) @ weight  # noqa: E731
    loss = lambda h: trained_token_losses(h, ids, mask, head)[0].sum()  # noqa: E731
    value, grads = jax.value_and_grad(loss)(hidden)
    want, _ = dense_reference(np.asarray(hidden, np.float32), weight, ids, mask)
    assert value.dtype == jnp.float32
    assert grads.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, want.sum(), rtol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, weight, ids, mask = example("all")
    value, grads = jax.value_and_grad(
        lambda h: trained_token_losses(h, ids, mask, lambda h: 1e4 * (h @ weight))[0].sum()
    )(hidden)
    assert np.isfinite(value)
    assert np.isfinite(grads).all()


def test_nan_in_one_row_stays_in_that_row():
    hidden, weight, ids, mask = example("all")
    hidden[1, 3] = np.nan
    losses, _ = trained_token_losses(hidden, ids, mask, lambda h: h @ weight)
    np.testing.assert_array_equal(np.isfinite(losses), [True, False, True])


def test_head_parameters_cannot_be_differentiated_by_mistake():
    hidden, weight, ids, mask = example("some")
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.grad(lambda w: trained_token_losses(hidden, ids, mask, lambda h: h @ w)[0].sum())(weight)


def test_logits_of_the_whole_batch_never_exist():
    """Temporary memory of the gradient follows the chunk, not the batch."""
    embed, vocab, chunk = 16, 4096, 8

    def temp_bytes(seq):
        def loss(hidden, weight, ids, mask):
            return trained_token_losses(hidden, ids, mask, lambda h: h @ weight, chunk_rows=chunk)[0].sum()

        shapes = ((4, seq, embed), jnp.float32), ((embed, vocab), jnp.float32), ((4, seq), jnp.int32), ((4, seq), bool)
        args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        return jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis().temp_size_in_bytes

    small, large = temp_bytes(64), temp_bytes(256)
    assert small < 64 * vocab * 4, "less than the logits of a quarter of the batch"
    assert large - small < 20 * 4 * 192 * (embed + 8) * 4, "growth is a few arrays of the hidden states' size"


def test_work_follows_the_number_of_trained_tokens_without_recompiling():
    calls = []

    def head(h):
        jax.debug.callback(lambda: calls.append(1))
        return h @ weight

    hidden, weight, ids, _ = example("none")
    run = jax.jit(lambda mask: trained_token_losses(hidden, ids, mask, head, chunk_rows=8)[0])
    for trained, chunks in ((0, 0), (1, 1), (8, 1), (9, 2), (48, 6)):
        mask = np.zeros((BATCH, SEQ), bool)
        mask[:, 1:] = (np.arange(BATCH * (SEQ - 1)) < trained).reshape(BATCH, SEQ - 1)
        calls.clear()
        jax.block_until_ready(run(mask))
        jax.effects_barrier()
        assert len(calls) == chunks
    assert run._cache_size() == 1
