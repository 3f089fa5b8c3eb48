"""The training step and the evaluation step, as functions of arrays.

A model is split once into a static part, the trainable state (adapters) and the frozen state (quantized weights,
embeddings, norms). Steps take and return the states; the model exists as an object only while they are traced.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.errors import UserError
from qlora_jax.nn import trainable
from qlora_jax.training.loss import trained_token_losses

# Arrays of a batch that the model reads; all [micro-batches, batch, seq] in training, [batch, seq] in evaluation.
BATCH_KEYS = ("input_ids", "positions", "segment_ids", "loss_mask")
# Beside them where there is an encoder; their `seq` is the source's.
SOURCE_KEYS = ("source_ids", "source_segment_ids")
Batch = Mapping[str, Array]

_HEAD_MODULES = {"lm_head", "embed_tokens", "embed_out", "embed_in", "shared"}


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: Int[Array, ""]  # optimizer steps taken, int32
    trainable: nnx.State  # adapters, float32
    optimizer: optax.OptState


class StepMetrics(NamedTuple):
    """What one optimizer step measured."""

    loss: Float[Array, ""]  # mean over the trained tokens of all micro-batches, before the update
    learning_rate: Float[Array, ""]
    grad_norm: Float[Array, ""]  # global norm of the gradient of `loss`, before clipping
    tokens: Int[Array, ""]  # trained tokens
    applied: Bool[Array, ""]  # False: the loss or the gradient was not finite, and the state is what it was
    finite_rows: Bool[Array, "micro batch"]  # whether the loss of each row of the batch was finite


class SplitModel(NamedTuple):
    """`nnx.split(model, trainable, rest)`."""

    graphdef: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State


def split_model(model: nnx.Module) -> SplitModel:
    """Splits a model into what is trained and what is frozen.

    Raises:
      UserError: adapters on the output head or the embedding. The loss sees the head as a constant.
      ValueError: no adapters at all (from `trainable`).
    """
    graphdef, adapters, frozen = nnx.split(model, trainable(model), ...)  # type: ignore[misc]
    for path, _ in nnx.to_flat_state(adapters):
        if _HEAD_MODULES & set(map(str, path)):
            raise UserError(
                f"an adapter on {'.'.join(map(str, path[:-1]))}",
                why="head and embedding stay frozen: the loss goes through the head in one pass, without its gradient",
                fix="lora.targets=null (every linear of the blocks)",
            )
    return SplitModel(graphdef, adapters, frozen)


def init_train_state(adapters: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Call it outside jit: `paged` places its arrays here."""
    return TrainState(jnp.zeros((), jnp.int32), adapters, optimizer.init(adapters))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    dropout_seed: int | None = None,
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, StepMetrics]]:
    """One optimizer step over a window of micro-batches, to be jitted with its first argument donated.

    The loss is the sum over the trained tokens of the window divided by their number, so that any division of the
    same rows into micro-batches gives the same step; gradients are summed in float32. A step whose loss or gradient
    is not finite changes nothing and says so in `StepMetrics.applied`.

    Args:
      graphdef: static part of the model, which has `hidden(input_ids, positions=, segment_ids=, rngs=)` and
        `head(states)` as `qlora_jax.models.decoder.Decoder` has, or `hidden` as `qlora_jax.models.t5.T5` where batches
        have `source_ids`.
      optimizer: its `init` made `TrainState.optimizer`.
      schedule: learning rate by the number of steps taken, reported only; the optimizer has its own reference to it.
      dropout_seed: None: no dropout. Else its key is this seed folded with the step and the micro-batch (and, by
        `scan_layers`, the layer): a function of the place in the run, so that a resumed run drops the same.
    """

    def summed_loss(adapters: nnx.State, frozen: nnx.State, batch: Batch, key: Array | None) -> tuple[Array, Any]:
        losses, counts = _row_losses(nnx.merge(graphdef, adapters, frozen), batch, key)
        return jnp.sum(losses), (jnp.isfinite(losses), jnp.sum(counts))

    def train_step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), state.step)

        def micro_step(carry: tuple[Any, Array, Array], item: tuple[Array, Batch]) -> tuple[Any, Array]:
            grads, loss, tokens = carry
            index, micro_batch = item
            micro_key = None if key is None else jax.random.fold_in(key, index)
            gradient = jax.value_and_grad(summed_loss, has_aux=True)
            (micro_loss, (finite, count)), micro_grads = gradient(state.trainable, frozen, micro_batch, micro_key)
            grads = jax.tree.map(lambda total, g: total + g.astype(jnp.float32), grads, micro_grads)
            return (grads, loss + micro_loss, tokens + count), finite

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)
        start = zeros, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        micro_batches = jnp.arange(batch["input_ids"].shape[0]), model_arrays(batch)
        (grads, loss, tokens), finite_rows = jax.lax.scan(micro_step, start, micro_batches)
        # A window without a trained token has loss 0 and gradient 0.
        divisor = jnp.maximum(tokens, 1).astype(jnp.float32)
        loss, grads = loss / divisor, jax.tree.map(lambda g: g / divisor, grads)
        grad_norm = optax.tree.norm(grads)

        def apply(adapters: nnx.State, optimizer_state: optax.OptState) -> tuple[nnx.State, optax.OptState]:
            updates, optimizer_state = optimizer.update(grads, optimizer_state, adapters)
            return optax.apply_updates(adapters, updates), optimizer_state

        applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        adapters, optimizer_state = jax.lax.cond(
            applied, apply, lambda *unchanged: unchanged, state.trainable, state.optimizer
        )
        metrics = StepMetrics(
            loss, jnp.asarray(schedule(state.step), jnp.float32), grad_norm, tokens, applied, finite_rows
        )
        return TrainState(state.step + applied, adapters, optimizer_state), metrics

    return train_step


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[nnx.State, nnx.State, Batch], tuple[Array, Array]]:
    """Losses of a batch without dropout: `(adapters, frozen, batch) -> (float32 [batch], int32 [batch])`.

    The two results are each row's sum of losses over its trained tokens, and their number.
    """

    def eval_step(adapters: nnx.State, frozen: nnx.State, batch: Batch) -> tuple[Array, Array]:
        return _row_losses(nnx.merge(graphdef, adapters, frozen), batch, None)

    return eval_step


def model_arrays(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model reads of a batch."""
    return {key: batch[key] for key in (*BATCH_KEYS, *SOURCE_KEYS) if key in batch}


def _row_losses(model: Any, batch: Batch, key: Array | None) -> tuple[Float[Array, " batch"], Int[Array, " batch"]]:
    ids, segments = batch["input_ids"], batch["segment_ids"]
    if "source_ids" in batch:
        source, source_segments = batch["source_ids"], batch["source_segment_ids"]
        hidden = model.hidden(source, ids, segment_ids=source_segments, decoder_segment_ids=segments, rngs=key)
    else:
        hidden = model.hidden(ids, positions=batch["positions"], segment_ids=segments, rngs=key)
    return trained_token_losses(hidden, ids, batch["loss_mask"], model.head)
