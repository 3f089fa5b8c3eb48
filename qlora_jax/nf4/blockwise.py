"""Blockwise quantization to 4 bits with bitsandbytes' bytes: by a compiled kernel on the CPU, else in pure JAX."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qlora_jax.nf4.calls import quantize_kernel
from qlora_jax.nf4.codebook import (
    BLOCK_SIZES,
    CODEBOOKS,
    DYNAMIC_MAP_MIDPOINTS,
    SCALE_GROUP,
    Codebook,
    check_quant_type,
)
from qlora_jax.nf4.kernels import asked_kernels, cuda_kernels_loaded, kernel_report
from qlora_jax.nf4.layout import check_layout, rows_to_fragments
from qlora_jax.nf4.platforms import per_platform
from qlora_jax.nf4.tensor import NF4Tensor, check_not_flat, leaf_shapes

FLOATS = ("float32", "bfloat16", "float16")


def quantize(
    kernel: Float[Array, "*layers in out"],
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    layout: str = "rows",
) -> NF4Tensor:
    """Quantizes a kernel to 4 bits; NF4 and FP4 bytes equal bitsandbytes' (CUDA) for the transpose of `kernel`.

    Each block of `block_size` consecutive elements of the row-major `[out, in]` matrix is scaled by the reciprocal of
    its largest magnitude (float32) and takes the nearest of 16 values (QLoRA, section 3). Double quantization then
    stores the block scales, less their mean, as 8-bit codes with one float32 scale per 256 (bitsandbytes'
    `compress_statistics`). A block of zeros gets the code of zero (NF4: 7), which is exactly zero whatever its
    scale. On the CPU a compiled kernel does it (use_kernels("xla"): pure JAX, as on other platforms); the bits are the
    same. There is no derivative in the kernel.

    Args:
      kernel: float32, bfloat16 or float16, `[in, out]`, or `[L, in, out]` for a stack of layers quantized one by one.
      quant_type: "nf4"; or "fp4" (bitsandbytes'), "int4" (symmetric), "e2m1" (OCP FP4), "e3m0" (powers of two), which
        are dequantized and multiplied in pure JAX alone.
      block_size: weights per scale: 32, 64, ... 4096.
      double_quant: whether to quantize the scales.
      layout: order of the packed bytes: "rows", which are bitsandbytes', or "fragments", which the CUDA kernels read
        fastest (modules and load_model choose it where weights land on a GPU). Made layer by layer.

    Returns:
      An NF4Tensor whose static dtype is the kernel's.

    Raises:
      TypeError: kernel is not an array of a supported floating dtype.
      ValueError: unknown quant_type, block_size or layout, wrong rank, an empty kernel, or layout "fragments" for a
        kernel whose blocks straddle rows.
    """
    dtype = str(getattr(kernel, "dtype", type(kernel).__name__))
    if dtype not in FLOATS:
        raise TypeError(f"kernel must be a float32, bfloat16 or float16 array, got {dtype}")
    check_quant_type(quant_type)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    if kernel.ndim not in (2, 3) or 0 in kernel.shape:
        raise ValueError(f"kernel must have shape [in, out] or [L, in, out], none of them 0; got {kernel.shape}")
    shape = (int(kernel.shape[-2]), int(kernel.shape[-1]))
    if check_layout(layout) == "fragments":
        check_not_flat(shape, block_size)
    leaves = _encode_layers(kernel, quant_type, block_size, double_quant, layout)
    return NF4Tensor(**leaves, shape=shape, quant_type=quant_type, block_size=block_size, dtype=dtype, layout=layout)


def compiled_on_cpu() -> bool:
    """Whether weights on the CPU are quantized by the compiled kernel: it is loaded, and nothing else was asked for."""
    return kernel_report()["cpu"] == "loaded" and asked_kernels()[0] in ("auto", "ffi")


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _encode_layers(
    kernel: Array, quant_type: str, block_size: int, double_quant: bool, layout: str
) -> dict[str, Array]:
    settings = quant_type, block_size, double_quant

    def in_layout(leaves: dict[str, Array]) -> dict[str, Array]:
        return leaves | {"packed": rows_to_fragments(leaves["packed"])} if layout == "fragments" else leaves

    def pure(kernel: Array) -> dict[str, Array]:
        def one(kernel: Array) -> dict[str, Array]:
            return in_layout(_encode(kernel, *settings))

        return jax.lax.map(one, kernel) if kernel.ndim == 3 else one(kernel)

    def compiled(kernel: Array) -> dict[str, Array]:
        if layout == "rows" or kernel.ndim == 2:
            return in_layout(quantize_kernel(kernel, *settings))
        # The kernel takes its layer out of the stack: before jax 0.11, XLA's CPU backend makes a whole stack of 16-bit
        # floats float32 to slice it.
        return jax.lax.map(lambda layer: in_layout(quantize_kernel(kernel, *settings, layer)), jnp.arange(len(kernel)))

    kernel = jax.lax.stop_gradient(kernel)
    on_cpu = compiled if compiled_on_cpu() else pure
    if cuda_kernels_loaded():
        return per_platform(kernel, cuda=pure, cpu=on_cpu, default=pure)
    return on_cpu(kernel) if jax.default_backend() == "cpu" else pure(kernel)


def _encode(kernel: Float[Array, "in out"], quant_type: str, block_size: int, double_quant: bool) -> dict[str, Array]:
    elements = kernel.astype(jnp.float32).T.reshape(-1)
    n_blocks = math.ceil(elements.size / block_size)
    blocks = jnp.pad(elements, (0, n_blocks * block_size - elements.size)).reshape(n_blocks, block_size)
    absmax = _largest_magnitude(blocks)
    normalized = blocks * _reciprocal(absmax)[:, None]
    codes = _nearest(normalized, CODEBOOKS[quant_type]).reshape(-1)
    packed = (codes[0::2] << 4 | codes[1::2])[: math.ceil(elements.size / 2)]
    leaves = {"packed": packed, "absmax": absmax}
    if double_quant:
        leaves |= _encode_scales(absmax)
    in_features, out_features = kernel.shape
    shapes = leaf_shapes((in_features, out_features), block_size, double_quant)
    return {name: leaf.reshape(shapes[name][0]) for name, leaf in leaves.items()}


def _largest_magnitude(rows: Float[Array, "rows n"]) -> Float[Array, " rows"]:
    """Largest magnitude of each row: NaN where there is one, 0 where all are subnormal.

    Magnitudes are compared as integers, whose order is that of the values, NaN above all: what the maximum of floats
    makes of NaN depends on how XLA's CPU compiler vectorises it.
    """
    bits = jax.lax.bitcast_convert_type(rows, jnp.int32) & jnp.int32(0x7FFFFFFF)
    largest = bits.max(axis=1)
    return jax.lax.bitcast_convert_type(jnp.where(largest < 0x00800000, 0, largest), jnp.float32)


def _nearest(normalized: Float[Array, "*dims"], book: Codebook) -> UInt8[Array, "*dims"]:
    compared = normalized if book.by_magnitude is None else jnp.abs(normalized)
    codes: Array = sum((compared > threshold).astype(jnp.uint8) for threshold in book.thresholds)  # type: ignore[assignment]
    if book.by_magnitude is None:
        return codes
    return jnp.asarray(book.by_magnitude)[codes] | (normalized < 0).astype(jnp.uint8) << 3


def _encode_scales(absmax: Float[Array, " blocks"]) -> dict[str, Array]:
    offset = _mean(absmax)
    n_groups = math.ceil(absmax.size / SCALE_GROUP)
    centred = jnp.pad(absmax - offset, (0, n_groups * SCALE_GROUP - absmax.size)).reshape(n_groups, SCALE_GROUP)
    scale = _largest_magnitude(centred)
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
    """Mean by adding halves, over and over: a running float32 sum over a million scales would lose the sixth digit.

    The order of the sum is written out, where `sum` leaves it to the compiler: the compiled kernel has the same, so
    that its bits are the same.
    """
    sums = values
    while sums.size > 1:
        half = math.ceil(sums.size / 2)
        sums = sums[:half] + jnp.pad(sums[half:], (0, 2 * half - sums.size))
    # Behind the barrier the divisor is no constant, which XLA would turn into a product with its reciprocal, and that,
    # with the subtraction that follows, into one FMA.
    return sums.reshape(()) / jax.lax.optimization_barrier(jnp.float32(values.size))
