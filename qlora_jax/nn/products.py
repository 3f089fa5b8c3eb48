"""Products of activations with float matrices: operands in x's dtype, float32 accumulation, the result in x's dtype.

Written with their own derivatives, because JAX's for such a product multiplies float32 by 16-bit operands, which is
slower, and rounds the gradient of a float32 matrix to x's dtype.

On CUDA a 16-bit result is asked for as such: XLA's products sum in float32 there in any case, and only a product with
no cast after it can add to another's result as it writes, and be added to (see lora.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qlora_jax.nf4.kernels import OUTER_PRODUCT_TARGET, cpu_computes_in_tiles
from qlora_jax.nf4.platforms import per_platform, vary_like


def mixed_product(x: Float[Array, "*batch k"], w: Float[Array, "k n"]) -> Float[Array, "*batch n"]:
    """`x @ w` with w rounded to x's dtype, differentiable in both.

    The gradient of x has x's dtype; that of w is summed in float32 and keeps w's dtype, never rounded to x's.
    """
    return _mixed_product(_as_varying(x, w), _as_varying(w, x))


def frozen_product(x: Float[Array, "*batch k"], w: Float[Array, "k n"]) -> Float[Array, "*batch n"]:
    """`x @ w` with w rounded to x's dtype, differentiable in x only, so that x need not be kept."""
    return _frozen_product(_as_varying(x, w), w)


@jax.custom_vjp
def _mixed_product(x: Array, w: Array) -> Array:
    return dot(x, w.astype(x.dtype), 0)


def _mixed_product_fwd(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _mixed_product(x, w), (x, w)


def _mixed_product_bwd(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    x_rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dot(dy, w.astype(x.dtype), 1), outer_product(x_rows, dy_rows, w.dtype)


_mixed_product.defvjp(_mixed_product_fwd, _mixed_product_bwd)


@jax.custom_vjp
def _frozen_product(x: Array, w: Array) -> Array:
    return dot(x, w.astype(x.dtype), 0)


def _frozen_product_fwd(x: Array, w: Array) -> tuple[Array, Array]:
    return _frozen_product(x, w), w


def _frozen_product_bwd(w: Array, dy: Array) -> tuple[Array, None]:
    return dot(dy, w.astype(dy.dtype), 1), None


_frozen_product.defvjp(_frozen_product_fwd, _frozen_product_bwd)


def outer_product(x: Array, dy: Array, dtype: jax.typing.DTypeLike) -> Array:
    """`x.T @ dy` in `dtype`, summed in float32.

    A CPU that computes in tiles has a kernel for it: XLA would write both operands anew in float32 first. Elsewhere
    XLA's CPU backend is several times slower where the wider operand is the transposed one, as it is for A; it turns
    `(dy.T @ x).T` back into `x.T @ dy`, unless a barrier lies between product and transposition.
    """

    def directly(x: Array, dy: Array) -> Array:
        return dot(x.T, dy, 0, dtype)

    def narrow_first(x: Array, dy: Array) -> Array:
        return jax.lax.optimization_barrier(dot(dy.T, x, 0, dtype)).T

    by_xla = narrow_first if x.shape[1] > dy.shape[1] else directly
    in_tiles = dtype == jnp.float32 and cpu_computes_in_tiles(x.dtype)
    return per_platform(x, dy, cuda=directly, cpu=_outer_product_in_tiles if in_tiles else by_xla, default=by_xla)


def _outer_product_in_tiles(x: Array, dy: Array) -> Array:
    wide, narrow = (x, dy) if x.shape[1] > dy.shape[1] else (dy, x)
    result = jax.ShapeDtypeStruct((x.shape[1], dy.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call(OUTER_PRODUCT_TARGET, result, vmap_method="sequential")
    return vary_like(call(narrow, wide, features_first=np.int64(wide is x)), (x, dy))


def dot(x: Array, w: Array, w_axis: int, dtype: jax.typing.DTypeLike | None = None) -> Array:
    """Contracts the last axis of x with axis `w_axis` of w; rounds once, to `dtype` or x's."""
    dimensions = (((x.ndim - 1,), (w_axis,)), ((), ()))

    def in_float32(x: Array, w: Array) -> Array:
        # HIGHEST: the default precision of float32 products on a GPU is TF32, with 10 bits of mantissa.
        y = jax.lax.dot_general(
            x, w, dimensions, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        return y.astype(dtype or x.dtype)

    if x.dtype == jnp.float32 or dtype not in (None, x.dtype):
        return in_float32(x, w)
    narrow = functools.partial(jax.lax.dot_general, dimension_numbers=dimensions, preferred_element_type=x.dtype)
    return per_platform(x, w, cuda=narrow, default=in_float32)


def _as_varying(value: Array, other: Array) -> Array:
    """Inside shard_map, marks a value as differing across the devices over which `other` differs.

    A custom derivative has to return gradients of its operands' types; with this, the gradient of a replicated adapter
    is summed over the devices that share it, as JAX does for its own products.
    """
    varying = jax.typeof(other).manual_axis_type.varying - jax.typeof(value).manual_axis_type.varying
    return jax.lax.pcast(value, tuple(sorted(varying)), to="varying") if varying else value
