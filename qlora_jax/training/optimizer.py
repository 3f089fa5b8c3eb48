"""AdamW for the adapters, its learning-rate schedule, and clipping where it belongs: outside the paging."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from qlora_jax.optim import paged
from qlora_jax.training.config import OptimSection


def learning_rate_schedule(config: OptimSection, total_steps: int) -> optax.Schedule:
    """Learning rate of each optimizer step, a function of the number of steps taken before it.

    The rate rises linearly and reaches the peak at step `warmup_steps` (counted from 1, so the first step is not spent
    at rate 0). Then it stays, or falls along a line or half a cosine that would reach 0 one step after the last.

    Args:
      config: `learning_rate`, `schedule`, `warmup_steps`.
      total_steps: optimizer steps of the whole run.
    """
    warmup, peak = config.warmup_steps, config.learning_rate
    shape = {
        "constant": jnp.ones_like,
        "linear": lambda done: 1 - done,
        "cosine": lambda done: (1 + jnp.cos(jnp.pi * done)) / 2,
    }[config.schedule]

    def schedule(steps_taken: Any) -> Float[Array, ""]:
        taken = jnp.asarray(steps_taken, jnp.float32)
        done = jnp.clip((taken - warmup) / max(total_steps - warmup, 1), 0, 1)
        return peak * jnp.minimum((taken + 1) / max(warmup, 1), 1) * shape(done)

    return schedule


def make_optimizer(config: OptimSection, schedule: optax.Schedule) -> optax.GradientTransformation:
    """`chain(clip_by_global_norm, paged(adamw))`.

    The global norm sees every leaf at once, while pages are updated apart: inside `paged` it would be refused.
    """
    adamw: optax.GradientTransformation = optax.adamw(
        schedule, b1=config.betas[0], b2=config.betas[1], eps=config.eps, weight_decay=config.weight_decay
    )
    if config.paged:
        adamw = paged(adamw, config.page_bytes)
    return adamw if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), adamw)
