"""A product with a low-rank addition to it, where the kernel that multiplies takes the addition into its own sums.

Added on its own, an adapter's product writes and reads matrices of the result's size twice more, which on a CPU costs
as much as the product itself. The CPU's kernels take it as a few more elements of what they sum over.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.nf4.calls import multiply
from qlora_jax.nf4.decode import as_rows
from qlora_jax.nf4.dispatch import pure_jax_only
from qlora_jax.nf4.kernels import cpu_kernels_asked, cuda_kernels_loaded
from qlora_jax.nf4.matmul import matmul_rows
from qlora_jax.nf4.platforms import per_platform
from qlora_jax.nf4.tensor import NF4Tensor


def cpu_kernel_adds(w: NF4Tensor) -> bool:
    """Whether the kernel that multiplies w in programs for the CPU, if there are any, can add to its sums."""
    return (cuda_kernels_loaded() or jax.default_backend() == "cpu") and cpu_kernels_asked() and not pure_jax_only(w)


def matmul_and_add(
    x: Float[Array, "*batch in"],
    w: NF4Tensor,
    u: Float[Array, "*batch rank"],
    v: Float[Array, "out rank"],
    *,
    input_gradient: bool = False,
) -> Float[Array, "*batch out"]:
    """`x @ w + u @ v.T`, or `x @ w.T + u @ v.T`, on a CPU summed in float32 and rounded once. Has no derivative.

    In programs for CUDA the terms are products in x's dtype, so that XLA can let one start from the other (nn/lora.py).

    Args:
      x: activations, as nf4_matmul takes them; for the input's gradient `[..., out]`.
      w: a weight for which `cpu_kernel_adds`.
      u, v: in x's dtype; for the input's gradient v is `[in, rank]`.

    Returns:
      `[..., out]`, or `[..., in]`, in x's dtype.
    """
    *batch, _ = x.shape
    rows = math.prod(batch)
    product = _input_gradient if input_gradient else _forward
    y = product(x.reshape(rows, x.shape[-1]), w, u.reshape(rows, u.shape[-1]), v)
    return y.reshape(*batch, y.shape[-1])


@jax.custom_batching.custom_vmap
def _forward(x: Array, w: NF4Tensor, u: Array, v: Array) -> Array:
    return _product(x, w, u, v, input_gradient=False)


@jax.custom_batching.custom_vmap
def _input_gradient(x: Array, w: NF4Tensor, u: Array, v: Array) -> Array:
    return _product(x, w, u, v, input_gradient=True)


def _product(x: Array, w: NF4Tensor, u: Array, v: Array, *, input_gradient: bool) -> Array:
    if x.shape[0] == 0:
        return jnp.zeros((0, v.shape[0]), x.dtype)

    def in_one_kernel(x: Array, w: NF4Tensor, u: Array, v: Array) -> Array:
        return multiply(x, as_rows(w) if w.layout == "fragments" else w, input_gradient=input_gradient, adapter=(u, v))

    def apart(x: Array, w: NF4Tensor, u: Array, v: Array) -> Array:
        branch = jax.lax.dot_general(
            u,
            v,
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,  # not TF32
            preferred_element_type=x.dtype,
        )
        return matmul_rows(x, w, input_gradient=input_gradient) + branch

    return per_platform(x, w, u, v, cuda=apart, cpu=in_one_kernel, default=apart)


def _batching_rule(product: Any, size: int, batched: Any, x: Array, w: NF4Tensor, u: Array, v: Array) -> Any:
    x_batched, w_batched, u_batched, v_batched = batched
    if x_batched and u_batched and not v_batched and not any(jax.tree.leaves(w_batched)):
        rows = size * x.shape[1]
        y = product(x.reshape(rows, x.shape[-1]), w, u.reshape(rows, u.shape[-1]), v)
        return y.reshape(size, x.shape[1], -1), True
    leaves, structure = jax.tree.flatten((x, w, u, v))
    flags = jax.tree.leaves(batched)

    def one(mapped: list[Array]) -> Array:
        rest = iter(mapped)
        return product(
            *jax.tree.unflatten(structure, [next(rest) if f else a for a, f in zip(leaves, flags, strict=True)])
        )

    return jax.lax.map(one, [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]), True


@_forward.def_vmap
def _forward_rule(size: int, batched: Any, *operands: Any) -> Any:
    return _batching_rule(_forward, size, batched, *operands)


@_input_gradient.def_vmap
def _input_gradient_rule(size: int, batched: Any, *operands: Any) -> Any:
    return _batching_rule(_input_gradient, size, batched, *operands)
