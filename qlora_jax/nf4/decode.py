"""Dequantization: the float weights that 4-bit codes and scales stand for, in pure JAX or by one compiled kernel."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qlora_jax.nf4 import calls
from qlora_jax.nf4.codebook import CODEBOOKS, COMPILED_TYPES, DYNAMIC_MAP, SCALE_GROUP
from qlora_jax.nf4.dispatch import cuda_kernel
from qlora_jax.nf4.kernels import cuda_kernels_loaded
from qlora_jax.nf4.layout import fragments_to_rows
from qlora_jax.nf4.platforms import per_platform
from qlora_jax.nf4.tensor import NF4Tensor


def dequantize(w: NF4Tensor, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*layers in out"]:
    """The weights that `w` stands for: `T(float32 code * float32 scale)`, rounded once to `T = w.dtype`.

    On a CUDA GPU whose kernels are loaded NF4 is one launch of a kernel for each layer; elsewhere, and for the other
    types everywhere, it is pure JAX. The bits are the same. The weight is frozen: with the kernel there is no
    derivative in its scales.

    Args:
      w: one layer, a view of one, a shard (local extents), or a whole stack; in either layout.
      dtype: dtype of the result; the values are rounded to `w.dtype` first, whatever it is.

    Returns:
      `[in, out]`, or `[L, in, out]` for a stack without a layer view.
    """
    dtype = jnp.dtype(dtype or w.dtype)
    if w.quant_type not in COMPILED_TYPES or not cuda_kernels_loaded() or cuda_kernel() == "xla":
        return _decode_compiled(w, dtype)
    return _decode_per_platform(w, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _decode_per_platform(w: NF4Tensor, dtype: Any) -> Array:
    # Under jit the platform is that of the operands, also where it is not JAX's default.
    return per_platform(w, cuda=lambda w: _decode_cuda(w, dtype), default=lambda w: decode(w, dtype))


def _decode_cuda(w: NF4Tensor, dtype: Any) -> Array:
    if w.num_layers is not None and w.where is None:
        return jax.lax.map(lambda i: _decode_cuda(w.layer(i), dtype), jnp.arange(w.num_layers))
    rows = calls.dequantize_rows(w, dtype if str(dtype) in calls.DTYPE_CODES else w.dtype)
    return rows.astype(dtype).T


def decode(w: NF4Tensor, dtype: Any) -> Float[Array, "*layers in out"]:
    """dequantize in pure JAX."""
    if w.num_layers is not None and w.where is None:
        return jax.vmap(functools.partial(decode, dtype=dtype))(w)
    w = as_rows(w)
    weights = jnp.asarray(CODEBOOKS[w.quant_type].values)[_unpack(w.packed)]
    if w.is_flat:
        in_features, out_features = w.shape
        blocks = decode_absmax(w.absmax, w.absmax_scale, w.absmax_offset, jnp.arange(w.absmax.size) // SCALE_GROUP)
        # Whole blocks first (two codes a byte may end within one), then only the weights that exist.
        padded = jnp.pad(weights, (0, max(0, w.absmax.size * w.block_size - weights.size)))
        padded = padded[: w.absmax.size * w.block_size].reshape(-1, w.block_size)
        rows = (padded * blocks[:, None]).reshape(-1)[: in_features * out_features].reshape(out_features, in_features)
    else:
        out_features, row_bytes = w.packed.shape
        blocks = decode_absmax(w.absmax, w.absmax_scale, w.absmax_offset, _scale_groups(w))
        rows = weights.reshape(out_features, -1, w.block_size) * blocks[:, :, None]
        rows = rows.reshape(out_features, row_bytes * 2)
    if w.dtype == "bfloat16":
        # Told apart from the cast: within a larger program XLA may drop a cast to 16 bits that is followed by one back.
        rows = jax.lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=7)
    return rows.astype(w.dtype).astype(dtype).T


# One program, where one operation after the other would be compiled.
_decode_compiled = jax.jit(decode, static_argnums=1, inline=True)


def as_rows(w: NF4Tensor) -> NF4Tensor:
    """The one layer that `w` shows, alone and in layout "rows"; of a shard, still that shard."""

    def of_layer(leaf: Any) -> Any:
        if leaf is None or w.num_layers is None:
            return leaf
        # Clamped, as the compiled kernels do: a negative index would count from the end.
        return jax.lax.dynamic_index_in_dim(leaf, jnp.maximum(w.where[0], 0), keepdims=False)

    names = ("packed", "absmax", "absmax_scale", "absmax_offset")
    leaves = {name: of_layer(getattr(w, name)) for name in names}
    if w.layout == "fragments":
        leaves["packed"] = fragments_to_rows(leaves["packed"], *w.local_shape)
    where = None if w.where is None else w.where * jnp.array([0, 1, 1], jnp.int32)
    return dataclasses.replace(w, **leaves, where=where, layout="rows")


def decode_absmax(absmax: Array, scale: Array | None, offset: Array | None, groups: Array) -> Float[Array, "*blocks"]:
    """float32 block scales: as stored, or `float32(map[code] * scale[group]) + offset`, two roundings.

    Args:
      absmax: uint8 codes or float32 scales, any shape.
      scale: float32 `[n_groups]`, or None where scales are not quantized.
      offset: float32 `[]`, or None.
      groups: int32, shape of `absmax`: the second-level group of each block.
    """
    if scale is None or offset is None:
        return absmax
    product = jnp.asarray(DYNAMIC_MAP)[absmax] * scale[groups]
    # XLA's CPU compiler would contract product and sum into one FMA (one rounding instead of two, and other bits than
    # bitsandbytes'); a select on a comparison that it cannot decide keeps them apart.
    return jnp.where(product == product, product, jnp.zeros_like(product)) + offset


def _scale_groups(w: NF4Tensor) -> Array:
    first_row, first_block = (0, 0) if w.where is None else (w.where[1], w.where[2])
    rows = first_row + jnp.arange(w.absmax.shape[0], dtype=jnp.int32)[:, None]
    columns = first_block + jnp.arange(w.absmax.shape[1], dtype=jnp.int32)[None, :]
    return (rows * (w.shape[0] // w.block_size) + columns) // SCALE_GROUP


def _unpack(packed: UInt8[Array, "*dims"]) -> UInt8[Array, "*dims2"]:
    """Codes of the last axis, high nibble first."""
    codes = jnp.stack([packed >> 4, packed & 15], axis=-1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * 2)
