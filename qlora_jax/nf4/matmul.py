"""nf4_matmul: activations times a frozen 4-bit weight, differentiable in the activations.

Built as custom_vjp(custom_vmap(product)): the backward pass keeps the packed weight and nothing dense, and a mapped
batch axis is folded into rows, so that the weight is read once. The product is a compiled kernel (XLA FFI) or pure JAX.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qlora_jax.nf4.blockwise import FLOATS, dequantize
from qlora_jax.nf4.kernels import MATMUL_DX_TARGET, MATMUL_TARGET, chosen_kernels
from qlora_jax.nf4.tensor import NF4Tensor

_WEIGHT_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


def nf4_matmul(x: Float[Array, "*batch in"], w: NF4Tensor) -> Float[Array, "*batch out"]:
    """`x @ dequantize(w)` with float32 accumulation, without keeping a dense weight.

    The weight's values are rounded to `w.dtype`, then to x's dtype. Differentiable in x only: the weight is frozen.

    Args:
      x: float32, bfloat16 or float16, `[..., in_features]`.
      w: one layer, `stack.layer(i)`, or, inside `jax.shard_map`, `local.shard(first_row, first_block)`.

    Returns:
      `[..., out_features]` in x's dtype.

    Raises:
      TypeError: w is not an NF4Tensor, or x has another dtype.
      ValueError: the shapes do not fit, or w is a stack without a layer view.
    """
    if not isinstance(w, NF4Tensor):
        raise TypeError(f"w must be an NF4Tensor (see quantize), got {type(w).__name__}")
    x = jnp.asarray(x)
    if str(x.dtype) not in FLOATS:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if w.num_layers is not None and w.where is None:
        raise ValueError(f"w is a stack of {w.num_layers} layers: multiply by w.layer(i), or use scan_layers")
    in_features, out_features = _extents(w)
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x of shape {x.shape} does not fit a weight of shape [in={in_features}, out={out_features}]")
    # In shard_map an x that is equal on all devices meets a weight that is not: its gradient is a sum over devices,
    # which the transpose of this cast does.
    return _matmul(_vary_like(x, w), w)


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
    return _product(x, w, MATMUL_TARGET)


@jax.custom_batching.custom_vmap
def _input_gradient(dy: Float[Array, "m out"], w: NF4Tensor) -> Float[Array, "m in"]:
    return _product(dy, w, MATMUL_DX_TARGET)


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


def _product(x: Array, w: NF4Tensor, target: str) -> Array:
    in_features, out_features = _extents(w)
    result = jax.ShapeDtypeStruct((x.shape[0], out_features if target == MATMUL_TARGET else in_features), x.dtype)
    if x.shape[0] == 0:
        return jnp.zeros(result.shape, result.dtype)
    if chosen_kernels() == "ffi":
        return _product_ffi(x, w, target, result)
    return _product_xla(x, w, target)


def _product_xla(x: Array, w: NF4Tensor, target: str) -> Array:
    # The barrier keeps XLA from dequantizing every layer of a model before the first product.
    w, x = jax.lax.optimization_barrier((w, x))
    dense = dequantize(w, x.dtype)
    contracting = ((1,), (0 if target == MATMUL_TARGET else 1,))
    y = jax.lax.dot_general(
        x, dense, (contracting, ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return y.astype(x.dtype)


def _product_ffi(x: Array, w: NF4Tensor, target: str, result: jax.ShapeDtypeStruct) -> Array:
    n_layers = w.num_layers or 1
    # Without double quantization the second-level operands are never read.
    scale = jnp.zeros((n_layers, 1), jnp.float32) if w.absmax_scale is None else w.absmax_scale
    offset = jnp.zeros((n_layers,), jnp.float32) if w.absmax_offset is None else w.absmax_offset
    operands = (
        x,
        w.packed.reshape(n_layers, -1),
        w.absmax.reshape(n_layers, -1),
        scale.reshape(n_layers, -1),
        offset.reshape(n_layers),
        jnp.zeros(3, jnp.int32) if w.where is None else w.where,
    )
    y = jax.ffi.ffi_call(target, result)(
        *operands,
        row_blocks=np.int64(0 if w.is_flat else w.shape[0] // w.block_size),
        block_size=np.int64(w.block_size),
        weight_dtype=np.int64(_WEIGHT_DTYPES[w.dtype]),
    )
    # Inside shard_map a foreign call's result is typed as equal on all devices; it varies where an operand does.
    return _vary_like(y, operands)


def _vary_like(x: Array, others: Any) -> Array:
    """Casts x to vary over every mesh axis of shard_map over which one of `others` varies; itself elsewhere."""

    def axes(array: Array) -> set[str]:
        return set(jax.typeof(array).manual_axis_type.varying)

    missing = set().union(*(axes(leaf) for leaf in jax.tree.leaves(others))) - axes(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _extents(w: NF4Tensor) -> tuple[int, int]:
    """(in, out) of the local buffers: a shard's are smaller than the static shape."""
    if w.is_flat:
        return w.shape
    return w.packed.shape[-1] * 2, w.packed.shape[-2]
