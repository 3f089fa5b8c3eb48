"""Cross-entropy at the trained positions only: the logits of a whole batch never exist.

Finetuning on responses trains a fifth of the tokens, and a vocabulary is fifty times wider than a small model: the
output head over every position would be the largest array and a third of the work of a step. Here the hidden states
of trained positions are gathered, and a loop whose length follows their number sends them through the head a few
rows at a time. Since a loss is a scalar per row, its gradient with respect to the hidden states is computed in the
same pass; the head is frozen and gets none.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Rows that go through the head together: [128, 49152] float32 logits are 25 MB. Larger chunks waste more of the
# last one, smaller ones reread the head's weight more often.
CHUNK_ROWS = 128

Head = Callable[[Float[Array, "rows embed"]], Float[Array, "rows vocab"]]


def trained_token_losses(
    hidden: Float[Array, "batch seq embed"],
    input_ids: Int[Array, "batch seq"],
    loss_mask: Bool[Array, "batch seq"],
    head: Head,
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Float[Array, " batch"], Int[Array, " batch"]]:
    """Sums of -log p(token) over the trained tokens of each row, and how many there are.

    Token s of a row is predicted from `hidden[:, s - 1]`; `loss_mask[:, s]` marks it as trained. The first token of a
    row has nothing before it and is never counted.

    Args:
      hidden: states after the final norm, any floating dtype; the only argument that gets a gradient.
      input_ids: tokens of the batch.
      loss_mask: True at trained target tokens.
      head: maps `[rows, embed]` to float32 logits `[rows, vocab]`. It may close over arrays, which are constants here:
        differentiating with respect to them is an error.
      chunk_rows: rows that go through the head together.

    Returns:
      Sums of losses, float32 `[batch]` (log-softmax in float32), and counts, int32 `[batch]`.
    """
    hidden, input_ids, loss_mask = jnp.asarray(hidden), jnp.asarray(input_ids), jnp.asarray(loss_mask)
    batch, seq, embed = hidden.shape
    trained = jnp.pad(loss_mask[:, 1:], ((0, 0), (0, 1)))  # by the position that predicts
    targets = jnp.pad(input_ids[:, 1:], ((0, 0), (0, 1))).reshape(-1)
    chunk = min(chunk_rows, batch * seq)
    capacity = -(-batch * seq // chunk) * chunk
    (where,) = jnp.nonzero(trained.reshape(-1), size=capacity, fill_value=0)
    total = jnp.sum(trained, dtype=jnp.int32)
    num_chunks = (total + chunk - 1) // chunk
    # Place of a trained position among the trained ones: turns compact results back into [batch, seq] by a gather.
    place = jnp.maximum(jnp.cumsum(trained.reshape(-1), dtype=jnp.int32) - 1, 0)

    def spread(compact: Array) -> Array:
        mask = trained.reshape(-1, *[1] * (compact.ndim - 1))
        return jnp.where(mask, compact[place], 0).reshape(batch, seq, *compact.shape[1:])

    def chunk_of(flat_hidden: Array, start: Array) -> tuple[Array, Array]:
        """States and targets of trained positions; the last chunk is filled up with position 0: `spread` drops it."""
        rows = jax.lax.dynamic_slice(where, (start,), (chunk,))
        return flat_hidden[rows], targets[rows]

    def negative_log_likelihood(logits: Array, target: Array) -> tuple[Array, Array]:
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        return log_normalizer - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0], log_normalizer

    @jax.custom_vjp
    def row_losses(hidden: Array) -> Array:
        flat = hidden.reshape(-1, embed)

        def body(i: Array, losses: Array) -> Array:
            states, target = chunk_of(flat, i * chunk)
            loss, _ = negative_log_likelihood(head(states), target)
            return jax.lax.dynamic_update_slice(losses, loss, (i * chunk,))

        return spread(jax.lax.fori_loop(0, num_chunks, body, jnp.zeros(capacity, jnp.float32))).sum(axis=1)

    def forward(hidden: Array) -> tuple[Array, Array]:
        flat = hidden.reshape(-1, embed)

        def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            losses, grads = carry
            states, target = chunk_of(flat, i * chunk)
            logits, pull_back = jax.vjp(head, states)
            loss, log_normalizer = negative_log_likelihood(logits, target)
            # d loss / d logits = softmax(logits) - one_hot(target)
            is_target = jnp.arange(logits.shape[1])[None, :] == target[:, None]
            (grad,) = pull_back(jnp.exp(logits - log_normalizer[:, None]) - is_target)
            losses = jax.lax.dynamic_update_slice(losses, loss, (i * chunk,))
            return losses, jax.lax.dynamic_update_slice(grads, grad, (i * chunk, 0))

        empty = jnp.zeros(capacity, jnp.float32), jnp.zeros((capacity, embed), hidden.dtype)
        losses, grads = jax.lax.fori_loop(0, num_chunks, body, empty)
        return spread(losses).sum(axis=1), spread(grads)

    def backward(grads: Array, cotangent: Array) -> tuple[Array]:
        return ((grads * cotangent[:, None, None]).astype(hidden.dtype),)

    row_losses.defvjp(forward, backward)
    return row_losses(hidden), jnp.sum(trained, axis=1, dtype=jnp.int32)
