"""Mean loss over a set of batches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

EvalStep = Callable[[Mapping[str, Any]], tuple[Float[Array, " batch"], Int[Array, " batch"]]]


class MeanLoss(NamedTuple):
    """Sum of losses over all tokens divided by their number, in nats."""

    loss: float
    tokens: int


def mean_loss(eval_step: EvalStep, batches: Iterable[Mapping[str, Any]]) -> MeanLoss:
    """Evaluates every batch and divides once, so that the result does not depend on how rows were batched.

    Args:
      eval_step: for a batch, each row's sum of losses over its counted tokens (float32) and their number.
      batches: all of one shape, so that one compilation serves them; rows without counted tokens are allowed (padding
        of the last batch).

    Returns:
      Float64 sums divided; NaN or infinite where a row's loss is.

    Raises:
      ValueError: no token is counted in any batch.
    """
    # All batches are queued before the first result is fetched: the device never waits for the host.
    results = jax.device_get([eval_step(batch) for batch in batches])
    total = sum(float(np.sum(losses, dtype=np.float64)) for losses, _ in results)
    tokens = sum(int(counts.sum()) for _, counts in results)
    if tokens == 0:
        raise ValueError("no token to evaluate: every row's loss mask is empty")
    return MeanLoss(total / tokens, tokens)
