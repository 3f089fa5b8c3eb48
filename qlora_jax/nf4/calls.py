"""The compiled kernels as functions of JAX arrays: operands and attributes of the XLA FFI calls, the same everywhere.

Every call takes the whole stack of layers and says in `where` which layer, and which part of the unsharded weight, is
meant: nothing is sliced.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qlora_jax.nf4.codebook import CODEBOOKS
from qlora_jax.nf4.dispatch import contraction_splits
from qlora_jax.nf4.kernels import DEQUANTIZE_TARGET, MATMUL_DX_TARGET, MATMUL_TARGET, QUANTIZE_TARGET, ROUTE_CODES
from qlora_jax.nf4.layout import LAYOUT_CODES
from qlora_jax.nf4.platforms import vary_like
from qlora_jax.nf4.tensor import NF4Tensor, leaf_shapes

# Value of the attribute `weight_dtype`.
DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}


def multiply(
    x: Array,
    w: NF4Tensor,
    *,
    input_gradient: bool,
    cuda_route: str | None = None,
    adapter: tuple[Array, Array] | None = None,
) -> Array:
    """`x @ w`, or `x @ w.T` for the gradient, by one kernel.

    Args:
      x: `[m, in]`, or `[m, out]`, m > 0.
      w: a weight in layout "rows" for the CPU, "fragments" for CUDA.
      cuda_route: "skinny" or "tile" on CUDA; None: the CPU's kernel.
      adapter: u `[m, rank]` and v `[out, rank]` (`[in, rank]`) in x's dtype; the CPU's kernel adds `u @ v.T` to its
        sums before it rounds them.
    """
    rows, outputs = x.shape[0], w.local_shape[0 if input_gradient else 1]
    results = [jax.ShapeDtypeStruct((rows, outputs), x.dtype)]
    attributes = _attributes(w)
    if cuda_route is not None:
        attributes |= {"layout": np.int64(LAYOUT_CODES[w.layout]), "route": np.int64(ROUTE_CODES[cuda_route])}
        in_features, out_features = w.local_shape
        splits = contraction_splits(cuda_route, rows, in_features, out_features, input_gradient=input_gradient)
        if splits > 1:
            # Partial sums are a result, not scratch memory of the call: a CUDA graph replays the launches without the
            # call, when its scratch memory would long be another's.
            results.append(jax.ShapeDtypeStruct((splits, rows, outputs), jnp.float32))
    operands: tuple[Array, ...] = (x, *_operands(w))
    if cuda_route is None:
        operands += adapter or (jnp.zeros((rows, 0), x.dtype), jnp.zeros((outputs, 0), x.dtype))
    y, *_ = jax.ffi.ffi_call(MATMUL_DX_TARGET if input_gradient else MATMUL_TARGET, results)(*operands, **attributes)
    # Inside shard_map a foreign call's result is typed as equal on all devices; it varies where an operand does.
    return vary_like(y, operands)


def dequantize_rows(w: NF4Tensor, dtype: Any) -> Float[Array, "out in"]:
    """The dense weight `[out, in]` by one launch, on CUDA; rounded to `w.dtype`, then to `dtype`."""
    in_features, out_features = w.local_shape
    operands = _operands(w)
    call = jax.ffi.ffi_call(
        DEQUANTIZE_TARGET, jax.ShapeDtypeStruct((out_features, in_features), dtype), vmap_method="sequential"
    )
    return vary_like(call(*operands, **_attributes(w), layout=np.int64(LAYOUT_CODES[w.layout])), operands)


def quantize_kernel(
    kernel: Float[Array, "*layers in out"],
    quant_type: str,
    block_size: int,
    double_quant: bool,
    layer: Array | None = None,
) -> dict[str, Array]:
    """The leaves of an NF4Tensor in layout "rows" by one kernel, on the CPU, for `[in, out]` or `[L, in, out]`.

    Args:
      layer: int32, the one layer of a stack that is meant, of rows of whole blocks; nothing is sliced. None: all.
    """
    *layers, in_features, out_features = kernel.shape
    stack = kernel.reshape(-1, in_features, out_features)
    # The kernel turns rows of whole blocks around as it reads them; where blocks straddle rows, XLA does.
    input_major = in_features % block_size == 0
    if not input_major:
        stack = stack.swapaxes(1, 2)
    if layer is not None:
        layers = []
    count = len(stack) if layer is None else 1
    shapes = leaf_shapes((in_features, out_features), block_size, double_quant)
    results = {name: jax.ShapeDtypeStruct((count, math.prod(dims)), dtype) for name, (dims, dtype) in shapes.items()}
    if double_quant:
        results["absmax_offset"] = jax.ShapeDtypeStruct((count,), jnp.float32)
    else:
        results["absmax_scale"] = jax.ShapeDtypeStruct((count, 0), jnp.float32)
        results["absmax_offset"] = jax.ShapeDtypeStruct((0,), jnp.float32)
    thresholds, codes = table(quant_type)
    call = jax.ffi.ffi_call(QUANTIZE_TARGET, tuple(results.values()), vmap_method="sequential")
    leaves = call(
        stack,
        jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1),
        block_size=np.int64(block_size),
        input_major=np.int64(input_major),
        thresholds=thresholds,
        codes=codes,
    )
    named = dict(zip(results, leaves, strict=True))
    return {name: vary_like(named[name].reshape(*layers, *dims), kernel) for name, (dims, _) in shapes.items()}


def table(quant_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and codes of a 4-bit type as the kernel takes them: 15 and 16, or 7 and 8 for sign and magnitude."""
    book = CODEBOOKS[quant_type]
    codes = np.arange(16, dtype=np.uint8) if book.by_magnitude is None else book.by_magnitude
    return book.thresholds, codes


def _operands(w: NF4Tensor) -> tuple[Array, ...]:
    """packed `[L, bytes]`, absmax `[L, blocks]`, absmax_scale `[L, groups]`, absmax_offset `[L]`, where `[3]`."""
    n_layers = w.num_layers or 1
    # Without double quantization the second-level operands are never read.
    scale = jnp.zeros((n_layers, 1), jnp.float32) if w.absmax_scale is None else w.absmax_scale
    offset = jnp.zeros((n_layers,), jnp.float32) if w.absmax_offset is None else w.absmax_offset
    return (
        w.packed.reshape(n_layers, -1),
        w.absmax.reshape(n_layers, -1),
        scale.reshape(n_layers, -1),
        offset.reshape(n_layers),
        jnp.zeros(3, jnp.int32) if w.where is None else w.where,
    )


def _attributes(w: NF4Tensor) -> dict[str, np.int64]:
    return {
        "row_blocks": np.int64(0 if w.is_flat else w.shape[0] // w.block_size),
        "block_size": np.int64(w.block_size),
        "weight_dtype": np.int64(DTYPE_CODES[w.dtype]),
    }
