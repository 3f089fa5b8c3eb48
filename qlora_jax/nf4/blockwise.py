"""Blockwise quantization to NF4 and back, in pure JAX, with bitsandbytes' bytes."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qlora_jax.nf4.codebook import (
    BLOCK_SIZES,
    CODEBOOKS,
    DYNAMIC_MAP,
    DYNAMIC_MAP_MIDPOINTS,
    NF4_THRESHOLDS,
    SCALE_GROUP,
)
from qlora_jax.nf4.tensor import NF4Tensor, leaf_shapes

FLOATS = ("float32", "bfloat16", "float16")


def quantize(
    kernel: Float[Array, "*layers in out"],
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> NF4Tensor:
    """Quantizes a kernel to 4 bits; bytes equal bitsandbytes' for the transpose of `kernel`.

    Each block of `block_size` consecutive elements of the row-major `[out, in]` matrix is scaled by the reciprocal of
    its largest magnitude (float32) and takes the nearest of 16 NF4 values (QLoRA, section 3). Double quantization then
    stores the block scales, less their mean, as 8-bit codes with one float32 scale per 256 (bitsandbytes'
    `compress_statistics`). A block of zeros gets code 7, which is exactly zero whatever its scale.

    Args:
      kernel: float32, bfloat16 or float16, `[in, out]`, or `[L, in, out]` for a stack of layers quantized one by one.
      quant_type: "nf4".
      block_size: weights per scale: 32, 64, ... 4096.
      double_quant: whether to quantize the scales.

    Returns:
      An NF4Tensor whose static dtype is the kernel's.

    Raises:
      TypeError: kernel is not an array of a supported floating dtype.
      ValueError: unknown quant_type or block_size, wrong rank, or an empty kernel.
    """
    dtype = str(getattr(kernel, "dtype", type(kernel).__name__))
    if dtype not in FLOATS:
        raise TypeError(f"kernel must be a float32, bfloat16 or float16 array, got {dtype}")
    if quant_type not in CODEBOOKS:
        raise ValueError(f"quant_type must be one of {', '.join(CODEBOOKS)}, got {quant_type!r}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    if kernel.ndim not in (2, 3) or 0 in kernel.shape:
        raise ValueError(f"kernel must have shape [in, out] or [L, in, out], none of them 0; got {kernel.shape}")
    leaves = _encode_layers(kernel, block_size, double_quant)
    in_features, out_features = kernel.shape[-2:]
    return NF4Tensor(
        **leaves, shape=(in_features, out_features), quant_type=quant_type, block_size=block_size, dtype=dtype
    )


def dequantize(w: NF4Tensor, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*layers in out"]:
    """The weights that `w` stands for: `T(float32 code * float32 scale)`, rounded once to `T = w.dtype`.

    Args:
      w: one layer, a view of one, a shard (local extents), or a whole stack.
      dtype: dtype of the result; the values are rounded to `w.dtype` first, whatever it is.

    Returns:
      `[in, out]`, or `[L, in, out]` for a stack without a layer view.
    """
    if w.num_layers is not None and w.where is None:
        return jax.vmap(functools.partial(dequantize, dtype=dtype))(w)
    packed, absmax, scale, offset = select_layer(w)
    weights = jnp.asarray(CODEBOOKS[w.quant_type])[_unpack(packed)]
    if w.is_flat:
        in_features, out_features = w.shape
        blocks = decode_absmax(absmax, scale, offset, jnp.arange(absmax.size) // SCALE_GROUP)
        # Whole blocks first (two codes a byte may end within one), then only the weights that exist.
        padded = jnp.pad(weights, (0, max(0, absmax.size * w.block_size - weights.size)))
        padded = padded[: absmax.size * w.block_size].reshape(-1, w.block_size)
        rows = (padded * blocks[:, None]).reshape(-1)[: in_features * out_features].reshape(out_features, in_features)
    else:
        out_features, row_bytes = packed.shape
        blocks = decode_absmax(absmax, scale, offset, _scale_groups(w, absmax.shape))
        rows = weights.reshape(out_features, -1, w.block_size) * blocks[:, :, None]
        rows = rows.reshape(out_features, row_bytes * 2)
    return rows.astype(w.dtype).astype(dtype or w.dtype).T


def select_layer(w: NF4Tensor) -> tuple[Array, Array, Array | None, Array | None]:
    """Leaves (packed, absmax, absmax_scale, absmax_offset) of the one layer that `w` shows."""

    def of_layer(leaf: Any) -> Any:
        if leaf is None or w.num_layers is None:
            return leaf
        # Clamped, as the compiled kernels do: a negative index would count from the end.
        return jax.lax.dynamic_index_in_dim(leaf, jnp.maximum(w.where[0], 0), keepdims=False)

    return of_layer(w.packed), of_layer(w.absmax), of_layer(w.absmax_scale), of_layer(w.absmax_offset)


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


def _scale_groups(w: NF4Tensor, blocks: tuple[int, ...]) -> Array:
    first_row, first_block = (0, 0) if w.where is None else (w.where[1], w.where[2])
    rows = first_row + jnp.arange(blocks[0], dtype=jnp.int32)[:, None]
    columns = first_block + jnp.arange(blocks[1], dtype=jnp.int32)[None, :]
    return (rows * (w.shape[0] // w.block_size) + columns) // SCALE_GROUP


def _unpack(packed: UInt8[Array, "*dims"]) -> UInt8[Array, "*dims2"]:
    """Codes of the last axis, high nibble first."""
    codes = jnp.stack([packed >> 4, packed & 15], axis=-1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _encode_layers(kernel: Array, block_size: int, double_quant: bool) -> dict[str, Array]:
    encode = functools.partial(_encode, block_size=block_size, double_quant=double_quant)
    return jax.lax.map(encode, kernel) if kernel.ndim == 3 else encode(kernel)


def _encode(kernel: Float[Array, "in out"], *, block_size: int, double_quant: bool) -> dict[str, Array]:
    elements = kernel.astype(jnp.float32).T.reshape(-1)
    n_blocks = math.ceil(elements.size / block_size)
    blocks = jnp.pad(elements, (0, n_blocks * block_size - elements.size)).reshape(n_blocks, block_size)
    absmax = jnp.abs(blocks).max(axis=1)
    normalized = blocks * _reciprocal(absmax)[:, None]
    codes = sum((normalized > threshold).astype(jnp.uint8) for threshold in NF4_THRESHOLDS).reshape(-1)
    packed = (codes[0::2] << 4 | codes[1::2])[: math.ceil(elements.size / 2)]
    leaves = {"packed": packed, "absmax": absmax}
    if double_quant:
        leaves |= _encode_scales(absmax)
    in_features, out_features = kernel.shape
    shapes = leaf_shapes((in_features, out_features), block_size, double_quant)
    return {name: leaf.reshape(shapes[name][0]) for name, leaf in leaves.items()}


def _encode_scales(absmax: Float[Array, " blocks"]) -> dict[str, Array]:
    offset = _mean(absmax)
    n_groups = math.ceil(absmax.size / SCALE_GROUP)
    centred = jnp.pad(absmax - offset, (0, n_groups * SCALE_GROUP - absmax.size)).reshape(n_groups, SCALE_GROUP)
    scale = jnp.abs(centred).max(axis=1)
    normalized = (centred * _reciprocal(scale)[:, None]).reshape(-1)[: absmax.size]
    midpoints = jnp.asarray(DYNAMIC_MAP_MIDPOINTS)
    lower = jnp.searchsorted(midpoints, normalized, side="left")
    # The nearest value; on an exact midpoint the one with the even index, as in bitsandbytes' CUDA search.
    tie = midpoints[jnp.minimum(lower, midpoints.size - 1)] == normalized
    codes = lower + (tie & (lower % 2 == 1) & (lower < midpoints.size))
    return {"absmax": codes.astype(jnp.uint8), "absmax_scale": scale, "absmax_offset": offset}


def _reciprocal(scale: Array) -> Array:
    """1/scale, and 0 for 0, which sends a block of zeros to the code of zero."""
    return jnp.where(scale > 0, 1.0 / scale, 0.0)


def _mean(values: Float[Array, " n"]) -> Float[Array, ""]:
    """Mean by a tree of short sums: a running float32 sum over a million scales would lose the sixth digit."""
    sums = values
    while sums.size > 1:
        width = min(sums.size, 64)
        rows = math.ceil(sums.size / width)
        sums = jnp.pad(sums, (0, rows * width - sums.size)).reshape(rows, width).sum(axis=1)
    return sums.reshape(()) / values.size
