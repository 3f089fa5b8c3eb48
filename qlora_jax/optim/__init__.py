"""Optimizer state in host memory: `paged` wraps an Optax transformation, `paged_jit` compiles steps that donate it."""

from qlora_jax.optim.paging import paged
from qlora_jax.optim.placement import host_kind_available
from qlora_jax.optim.shardings import paged_jit

__all__ = ["host_kind_available", "paged", "paged_jit"]
