"""A layer's frozen product, alone and with its adapter."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from qlora_jax.nf4 import NF4Tensor, nf4_matmul
from qlora_jax.nf4.adapter import cpu_kernel_adds, matmul_and_add
from qlora_jax.nf4.platforms import vary_like
from qlora_jax.nn.lora import lora_branch
from qlora_jax.nn.products import dot, frozen_product, outer_product


def frozen_base(x: Float[Array, "*batch in"], kernel: NF4Tensor | Array) -> Float[Array, "*batch out"]:
    """x times a layer's frozen kernel, 4-bit or dense."""
    return nf4_matmul(x, kernel) if isinstance(kernel, NF4Tensor) else frozen_product(x, kernel)


def adapted(
    x: Float[Array, "*batch in"],
    kernel: NF4Tensor | Array,
    a: Float[Array, "in rank"],
    b: Float[Array, "rank out"],
    *,
    scaling: float,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*batch out"]:
    """`frozen_base(x, kernel) + (scaling * dropout(x) @ A) @ B` in x's dtype, differentiable in x, A and B.

    Args:
      x: activations.
      kernel: 4-bit or dense, one layer's.
      a, b, dropout, key: as lora_branch.
      scaling: alpha / rank, a number that is known when the program is traced.
    """
    scaling = float(scaling)  # a NumPy scalar would make its product float32
    dropping = key is not None and dropout > 0
    if isinstance(kernel, NF4Tensor) and not dropping and cpu_kernel_adds(kernel):
        x = vary_like(x, (kernel, a, b))
        return _with_adapter(x, kernel, vary_like(a, x), vary_like(b, x), scaling)
    branch = lora_branch(x, a, b, scaling=scaling, dropout=dropout, key=key)
    return frozen_base(x, kernel) + branch  # in this order: see lora.py


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _with_adapter(x: Array, w: NF4Tensor, a: Array, b: Array, scaling: float) -> Array:
    return _forward(x, w, a, b, scaling)[0]


def _forward(x: Array, w: NF4Tensor, a: Array, b: Array, scaling: float) -> tuple[Array, tuple]:
    u = scaling * dot(x, a.astype(x.dtype), 0)
    return matmul_and_add(x, w, u, b.T.astype(x.dtype)), (x, w, a, b, u)


def _backward(scaling: float, saved: tuple, dy: Array) -> tuple[Array, None, Array, Array]:
    x, w, a, b, u = saved
    du = scaling * dot(dy, b.astype(x.dtype), 1)
    dx = matmul_and_add(dy, w, du, a.astype(x.dtype), input_gradient=True)
    return dx, None, outer_product(_rows(x), _rows(du), a.dtype), outer_product(_rows(u), _rows(dy), b.dtype)


_with_adapter.defvjp(_forward, _backward)


def _rows(x: Array) -> Array:
    return jnp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
