"""nf4_matmul: activations times a frozen 4-bit weight, differentiable in the activations.

Built as custom_vjp(custom_vmap(product)): the backward pass keeps the packed weight and nothing dense, and a mapped
batch axis is folded into rows, so that the weight is read once. The product is a compiled kernel (XLA FFI) or pure JAX.
Where CUDA kernels are loaded, that is decided for the platform a program is compiled for, and on CUDA by dispatch.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.nf4.blockwise import FLOATS
from qlora_jax.nf4.calls import dequantize_rows, multiply
from qlora_jax.nf4.decode import as_rows, decode
from qlora_jax.nf4.dispatch import cuda_route, pure_jax_only
from qlora_jax.nf4.kernels import ROUTE_CODES, asked_kernels, chosen_kernels, cuda_kernels_loaded
from qlora_jax.nf4.platforms import per_platform, refuse, vary_like
from qlora_jax.nf4.tensor import NF4Tensor


def nf4_matmul(x: Float[Array, "*batch in"], w: NF4Tensor) -> Float[Array, "*batch out"]:
    """`x @ dequantize(w)` with float32 accumulation, without keeping a dense weight.

    The weight's values are rounded to `w.dtype`, then to x's dtype. Differentiable in x only: the weight is frozen. The
    compiled kernels know NF4; the other 4-bit types are dequantized and multiplied in pure JAX on every platform.

    Args:
      x: float32, bfloat16 or float16, `[..., in_features]`.
      w: one layer, `stack.layer(i)`, or, inside `jax.shard_map`, `local.shard(first_row, first_block)`.

    Returns:
      `[..., out_features]` in x's dtype.

    Raises:
      TypeError: w is not an NF4Tensor, or x has another dtype.
      ValueError: the shapes do not fit, or w is a stack without a layer view, or "fragments" cut within a tile.
      RuntimeError: kernels were asked for (see use_kernels) that the platform does not have, or that cannot take these
        operands.
    """
    x = jnp.asarray(x)
    check_operands(x, w)
    # In shard_map an x that is equal on all devices meets a weight that is not: its gradient is a sum over devices,
    # which the transpose of this cast does.
    return _matmul(vary_like(x, w), w)


def check_operands(x: Array, w: NF4Tensor) -> None:
    """Whether nf4_matmul takes x and w.

    Raises:
      TypeError, ValueError: it does not; see there.
    """
    if not isinstance(w, NF4Tensor):
        raise TypeError(f"w must be an NF4Tensor (see quantize), got {type(w).__name__}")
    if str(x.dtype) not in FLOATS:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if w.num_layers is not None and w.where is None:
        raise ValueError(f"w is a stack of {w.num_layers} layers: multiply by w.layer(i), or use scan_layers")
    in_features, out_features = w.local_shape
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x of shape {x.shape} does not fit a weight of shape [in={in_features}, out={out_features}]")


def matmul_rows(x: Float[Array, "m k"], w: NF4Tensor, *, input_gradient: bool) -> Float[Array, "m n"]:
    """`x @ w`, or `x @ w.T` for the input's gradient, as nf4_matmul multiplies; has no derivative."""
    return (_input_gradient if input_gradient else _forward)(x, w)


@jax.custom_vjp
def _matmul(x: Array, w: NF4Tensor) -> Array:
    return _on_rows(_forward, x, w)


def _matmul_fwd(x: Array, w: NF4Tensor) -> tuple[Array, NF4Tensor]:
    return _matmul(x, w), w


def _matmul_bwd(w: NF4Tensor, dy: Array) -> tuple[Array, None]:
    return _on_rows(_input_gradient, dy, w), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _on_rows(product: Any, x: Array, w: NF4Tensor) -> Array:
    rows = math.prod(x.shape[:-1])
    y = product(x.reshape(rows, x.shape[-1]), w)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@jax.custom_batching.custom_vmap
def _forward(x: Float[Array, "m in"], w: NF4Tensor) -> Float[Array, "m out"]:
    return _product(x, w, input_gradient=False)


@jax.custom_batching.custom_vmap
def _input_gradient(dy: Float[Array, "m out"], w: NF4Tensor) -> Float[Array, "m in"]:
    return _product(dy, w, input_gradient=True)


def _batching_rule(product: Any, axis_size: int, in_batched: Any, x: Array, w: NF4Tensor) -> tuple[Array, bool]:
    x_batched, w_batched = in_batched
    flags = jax.tree.leaves(w_batched)
    if not any(flags):
        y = product(x.reshape(axis_size * x.shape[1], x.shape[2]), w)
        return y.reshape(axis_size, x.shape[1], y.shape[-1]), True
    leaves, structure = jax.tree.flatten(w)
    mapped = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]

    def one(arguments: tuple[Array, list[Array]]) -> Array:
        x_i, rest = arguments[0], iter(arguments[1])
        own = [next(rest) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
        return product(x_i if x_batched else x, jax.tree.unflatten(structure, own))

    return jax.lax.map(one, (x if x_batched else None, mapped)), True


_forward.def_vmap(functools.partial(_batching_rule, _forward))
_input_gradient.def_vmap(functools.partial(_batching_rule, _input_gradient))


def _product(x: Array, w: NF4Tensor, input_gradient: bool) -> Array:
    if x.shape[0] == 0:
        return jnp.zeros((0, w.local_shape[0 if input_gradient else 1]), x.dtype)
    if pure_jax_only(w):
        return _product_xla(x, w, input_gradient)
    if cuda_kernels_loaded() and asked_kernels()[0] != "xla":
        return _product_per_platform(x, w, input_gradient)
    return _product_with(chosen_kernels(), x, w, input_gradient)


@functools.partial(jax.jit, static_argnums=2)
def _product_per_platform(x: Array, w: NF4Tensor, input_gradient: bool) -> Array:
    # Under jit the platform is that of the operands, also where it is not JAX's default.
    def on(platform: str) -> Callable[[Array, NF4Tensor], Array]:
        def run(x: Array, w: NF4Tensor) -> Array:
            try:
                if platform == "cuda":
                    kernels = cuda_route(x.shape[0], w, str(x.dtype), input_gradient=input_gradient)
                else:
                    kernels = chosen_kernels(platform)
            except RuntimeError as refusal:
                result = jax.ShapeDtypeStruct((x.shape[0], w.local_shape[0 if input_gradient else 1]), x.dtype)
                return vary_like(refuse(str(refusal), result), (x, w))
            return _product_with(kernels, x, w, input_gradient)

        return run

    return per_platform(x, w, cuda=on("cuda"), cpu=on("cpu"), default=on("this platform"))


def _product_with(kernels: str, x: Array, w: NF4Tensor, input_gradient: bool) -> Array:
    if kernels == "ffi":
        return multiply(x, as_rows(w) if w.layout == "fragments" else w, input_gradient=input_gradient)
    if kernels in ROUTE_CODES:
        return multiply(x, w, input_gradient=input_gradient, cuda_route=kernels)
    if kernels == "dequantize":
        return _dequantize_and_dot(x, w, input_gradient)
    return _product_xla(x, w, input_gradient)


# One program also where it is called eagerly: compiling its operations one by one takes seconds.
@functools.partial(jax.jit, static_argnums=2, inline=True)
def _product_xla(x: Array, w: NF4Tensor, input_gradient: bool) -> Array:
    # The barrier keeps XLA from dequantizing every layer of a model before the first product.
    w, x = jax.lax.optimization_barrier((w, x))
    contracting = ((1,), (1 if input_gradient else 0,))
    y = jax.lax.dot_general(
        x,
        decode(w, x.dtype),
        (contracting, ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)


def _dequantize_and_dot(x: Array, w: NF4Tensor, input_gradient: bool) -> Array:
    # The kernel's call hangs on x through the three integers of `where`. So it cannot run before x is there; the
    # backward pass, which hangs on dy, is another call, which XLA cannot merge with the forward one to keep its dense
    # weight in between; and nothing as large as a stack goes through the barrier.
    where = jnp.zeros(3, jnp.int32) if w.where is None else w.where
    x, where = jax.lax.optimization_barrier((x, where))
    dense = dequantize_rows(dataclasses.replace(w, where=where), x.dtype)
    # XLA merges products that share an operand, as q, k and v share x: it would write their dense weights side by side
    # once more. What leaves this barrier is shared with nobody.
    x, dense = jax.lax.optimization_barrier((x, dense))
    # The sum is in float32 whatever the result's dtype; a 16-bit result with no cast after it lets XLA add an adapter's
    # product inside this one (nn/lora.py). HIGHEST: a GPU's default for float32 is TF32, with 10 bits of mantissa.
    return jax.lax.dot_general(
        x,
        dense,
        (((1,), (0 if input_gradient else 1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=x.dtype,
    )
