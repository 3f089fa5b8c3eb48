"""Quantization of weights straight from the host's memory, or a mapped file, into stacks that exist already.

What a checkpoint holds is read once and written once: no copy of the weight, none of its codes. Arrays made here begin
where JAX's do, so that its CPU backend takes them as they are.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.nf4.blockwise import compiled_on_cpu, quantize
from qlora_jax.nf4.calls import DTYPE_CODES, table
from qlora_jax.nf4.kernels import load_module
from qlora_jax.nf4.layout import rows_to_fragments
from qlora_jax.nf4.tensor import NF4Tensor, leaf_shapes

# What XLA's CPU backend asks of memory that it shares.
_ALIGNMENT = 64
# Value of the argument `kind` for float32 elements that are rounded to bfloat16 when they are read.
_ROUNDED = 3


class QuantizedStack:
    """Room for L quantized layers, filled one by one.

    Args:
      layers: L.
      shape: `(in_features, out_features)` of a layer.
      dtype: of the weights: float32 ones are rounded to bfloat16 first, and the tensor's dtype is bfloat16.
      quant_type, block_size, double_quant, layout: see quantize.

    Raises:
      RuntimeError: without the compiled kernels (see compiled_on_cpu).
    """

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int],
        dtype: str,
        *,
        quant_type: str,
        block_size: int,
        double_quant: bool,
        layout: str,
    ) -> None:
        if not compiled_on_cpu():
            raise RuntimeError("quantizing in the host's memory needs the compiled kernels for the CPU")
        self._kind = _ROUNDED if dtype == "float32" else DTYPE_CODES[dtype]
        self._static: dict[str, Any] = {
            "shape": shape,
            "quant_type": quant_type,
            "block_size": block_size,
            "dtype": "bfloat16" if dtype == "float32" else dtype,
            "layout": layout,
        }
        shapes = leaf_shapes(shape, block_size, double_quant, layout)
        self._leaves = {name: aligned_empty((layers, *dims), kind) for name, (dims, kind) in shapes.items()}
        self._rows = None
        if layout == "fragments":
            self._rows = np.empty(*leaf_shapes(shape, block_size, double_quant)["packed"])

    def fill(self, layer: int, weight: np.ndarray) -> bool:
        """Quantizes one layer, the rows `[out, in]` of a C-ordered array.

        Returns:
          Whether all its values are finite; what is stored means nothing otherwise.
        """
        packed = self._leaves["packed"][layer] if self._rows is None else self._rows
        scales = self._leaves.get("absmax_scale")
        offset, largest = load_module("_cpu").quantize(
            np.ascontiguousarray(weight).reshape(-1).view(np.uint8),
            self._kind,
            self._static["block_size"],
            *table(self._static["quant_type"]),
            packed.reshape(-1),
            self._leaves["absmax"][layer].reshape(-1),
            np.empty(0, np.float32) if scales is None else scales[layer],
            threads=_threads(),
        )
        if scales is not None:
            self._leaves["absmax_offset"][layer] = offset
        if self._rows is not None:
            self._leaves["packed"][layer] = _to_fragments(self._rows)
        return bool(np.isfinite(largest))

    def tensor(self) -> NF4Tensor:
        """The stack on JAX's default device; nothing may be filled in afterwards."""
        leaves: dict[str, Any] = {name: on_device(leaf) for name, leaf in self._leaves.items()}
        return NF4Tensor(**leaves, **self._static)


def quantize_rows(
    weight: np.ndarray, *, quant_type: str, block_size: int, double_quant: bool
) -> tuple[NF4Tensor, bool]:
    """One weight quantized in the host's memory, in layout "rows" and NumPy's arrays.

    Args:
      weight: `[out, in]`, C-ordered, perhaps mapped from a file. float32 is rounded to bfloat16 first.
      quant_type, block_size, double_quant: see quantize.

    Returns:
      The weight, and whether all values are finite.
    """
    shape = (weight.shape[1], weight.shape[0])
    settings: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    if compiled_on_cpu():
        stack = QuantizedStack(1, shape, weight.dtype.name, **settings, layout="rows")
        finite = stack.fill(0, weight)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[0], stack.tensor()), finite
    kernel = jnp.asarray(weight).T
    w = quantize(kernel.astype(jnp.bfloat16) if weight.dtype == np.float32 else kernel, **settings)
    return jax.tree.map(np.asarray, w), bool(jnp.isfinite(kernel).all())


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """`np.empty`, in memory that JAX's CPU backend can share."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def on_device(array: np.ndarray) -> jax.Array:
    """An array on JAX's default device. On the CPU it is the same memory where aligned_empty made it, so that it must
    not be written to any more.
    """
    return jax.device_put(array, may_alias=True)


_to_fragments = jax.jit(lambda rows: rows_to_fragments(jnp.asarray(rows)))


def _threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
