"""bitsandbytes' own CUDA kernels, called through ctypes without torch: a peer in the timings, an oracle in the tests.

The library is the file `libbitsandbytes_cuda130.so` of its wheel (0.50 or later). What is called with which arguments
follows bitsandbytes/backends/cuda/ops.py (0.50.2, MIT licence).
"""

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.benchmarks.cuda_runtime import CudaGraph, CudaRuntime, pointer
from qlora_jax.benchmarks.programs import Weights
from qlora_jax.errors import UserError
from qlora_jax.nf4.codebook import DYNAMIC_MAP, SCALE_GROUP

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_NF4 = 2
# Its rule sends every product of more rows to dequantization.
MOST_FUSED_ROWS = 1536
_FIX = "--bitsandbytes .../site-packages/bitsandbytes/libbitsandbytes_cuda130.so (pip install bitsandbytes)"


class BitsAndBytes:
    """The library's functions on JAX arrays.

    Args:
      path: the shared library; CUDA's own libraries are looked for beside it first.

    Raises:
      UserError: it does not load, lacks a function, or there is no GPU.
    """

    def __init__(self, path: Path) -> None:
        release = re.search(r"cuda(\d\d)\d", path.name)
        self.runtime = CudaRuntime(int(release.group(1)) if release else 13, [path.parent])
        try:
            self._library = ctypes.CDLL(str(path))
            self._declare()
        except (OSError, AttributeError) as error:
            raise UserError(f"bitsandbytes' library {path} cannot be used", why=str(error), fix=_FIX) from error
        self._code = jax.block_until_ready(jnp.asarray(DYNAMIC_MAP))

    def _declare(self) -> None:
        address, number = ctypes.c_void_p, ctypes.c_int32
        for short in _SHORT.values():
            takes = {
                f"cquantize_blockwise_{short}_nf4": [address] * 4 + [number] * 2,
                f"cquantize_blockwise_{short}": [address] * 4 + [number] * 2,
                f"cdequantize_blockwise_{short}_nf4": [address] * 4 + [number] * 2 + [address],
                f"cdequantize_blockwise_{short}": [address] * 4 + [number] * 2 + [address],
                f"cgemm_4bit_{short}": [address] * 8 + [number] * 5 + [address],
            }
            for name, types in takes.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = types, None

    def quantize(self, elements: jax.Array, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Packed bytes and float32 scales of a flat array of weights, in row-major `[out, in]` order."""
        packed = jnp.zeros(-(-elements.size // 2), jnp.uint8)
        absmax = jnp.zeros(-(-elements.size // block_size), jnp.float32)
        jax.block_until_ready((elements, packed, absmax))
        function = self._of("cquantize_blockwise_{}_nf4", elements)
        function(None, pointer(elements), pointer(absmax), pointer(packed), block_size, elements.size)
        self.runtime.wait_for_device()
        return self.runtime.read(packed), self.runtime.read(absmax)

    def quantize_scales(self, centred: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """8-bit codes, and the float32 scale of 256 of them, of scales less their mean."""
        codes = jnp.zeros(centred.size, jnp.uint8)
        scale = jnp.zeros(-(-centred.size // SCALE_GROUP), jnp.float32)
        jax.block_until_ready((centred, codes, scale))
        function = self._of("cquantize_blockwise_{}", centred)
        addresses = (pointer(self._code), pointer(centred), pointer(scale), pointer(codes))
        function(*addresses, SCALE_GROUP, centred.size)
        self.runtime.wait_for_device()
        return self.runtime.read(codes), self.runtime.read(scale)

    def dequantize(self, packed: jax.Array, absmax: jax.Array, block_size: int, size: int, dtype: str) -> np.ndarray:
        """A flat array of `size` weights."""
        weights = jnp.zeros(size, dtype)
        jax.block_until_ready((packed, absmax, weights))
        self._dequantize(pointer(packed), pointer(absmax), weights, block_size)
        self.runtime.wait()
        return self.runtime.read(weights)

    def fused_product(self, xs: list[jax.Array], weights: Weights) -> "PeerProgram":
        """Its kernel that multiplies 4-bit weights, double-quantized scales decoded inside."""
        w, y = weights.rows, self._result(xs, weights, "forward")
        in_features, out_features = w.shape
        function = self._of("cgemm_4bit_{}", xs[0])

        def put(i: int) -> None:
            scales = (pointer(w.absmax_scale) + 4 * i * w.absmax_scale.shape[-1], self._codes(weights, i))
            offset = pointer(w.absmax_offset) + 4 * i
            operands = (
                pointer(xs[i]),
                self._packed(weights, i),
                *scales,
                pointer(self._code),
                offset,
                pointer(y),
                None,
            )
            function(*operands, y.shape[0], out_features, in_features, w.block_size, _NF4, self.runtime.stream)

        return self._program(put, xs, weights, y)

    def dequantized_product(self, op: str, xs: list[jax.Array], weights: Weights) -> "PeerProgram":
        """What it does beyond its kernel's range and in every backward pass: scales, weight and product in turn."""
        w, y = weights.rows, self._result(xs, weights, op)
        in_features, out_features = w.shape
        blocks = w.absmax.size // weights.copies
        absmax, ones = jnp.zeros(blocks, jnp.float32), jnp.ones(blocks, jnp.float32)
        dense = jnp.zeros((out_features, in_features), y.dtype)
        offset = float(np.asarray(w.absmax_offset)[0])
        jax.block_until_ready((absmax, ones, dense))
        features, outputs = (in_features, out_features) if op == "forward" else (out_features, in_features)
        scales = self._library.cdequantize_blockwise_fp32

        def put(i: int) -> None:
            group_scales = pointer(w.absmax_scale) + 4 * i * w.absmax_scale.shape[-1]
            operands = (pointer(self._code), self._codes(weights, i), group_scales, pointer(absmax))
            scales(*operands, SCALE_GROUP, blocks, self.runtime.stream)
            self.runtime.add(offset, pointer(ones), pointer(absmax), blocks)
            self._dequantize(self._packed(weights, i), pointer(absmax), dense, w.block_size)
            addresses = (pointer(xs[i]), pointer(dense), pointer(y))
            by_rows = op == "forward"
            self.runtime.multiply(*addresses, y.shape[0], features, outputs, dtype=str(y.dtype), by_rows=by_rows)

        return self._program(put, xs, weights, y, absmax, ones, dense)

    def dense_product(self, op: str, xs: list[jax.Array], weights: Weights) -> "PeerProgram":
        """cuBLAS alone, with unpacked weights."""
        y = self._result(xs, weights, op)
        in_features, out_features = weights.rows.shape
        features, outputs = (in_features, out_features) if op == "forward" else (out_features, in_features)

        def put(i: int) -> None:
            addresses = (pointer(xs[i]), pointer(weights.matrices[i]), pointer(y))
            # The matrices are [in, out]: by rows of outputs in the backward pass only.
            by_rows = op == "dx"
            self.runtime.multiply(*addresses, y.shape[0], features, outputs, dtype=str(y.dtype), by_rows=by_rows)

        return self._program(put, xs, weights, y)

    def _program(
        self, put: Callable[[int], None], xs: list[jax.Array], weights: Weights, y: jax.Array, *scratch: jax.Array
    ) -> "PeerProgram":
        def put_all() -> None:
            for i in range(weights.copies):
                put(i)

        jax.block_until_ready((xs, weights.rows, weights.matrices, y))
        graph = self.runtime.record(put_all)
        return PeerProgram(self.runtime, graph, weights.copies, y, (xs, weights, *scratch))

    def _of(self, name: str, array: jax.Array) -> Callable[..., None]:
        return getattr(self._library, name.format(_SHORT[str(array.dtype)]))

    def _dequantize(self, packed: int, absmax: int, weights: jax.Array, block_size: int) -> None:
        function = self._of("cdequantize_blockwise_{}_nf4", weights)
        function(None, packed, absmax, pointer(weights), block_size, weights.size, self.runtime.stream)

    @staticmethod
    def _result(xs: list[jax.Array], weights: Weights, op: str) -> jax.Array:
        in_features, out_features = weights.rows.shape
        return jnp.zeros((xs[0].shape[0], out_features if op == "forward" else in_features), xs[0].dtype)

    @staticmethod
    def _packed(weights: Weights, i: int) -> int:
        return pointer(weights.rows.packed) + i * (weights.rows.packed.size // weights.copies)

    @staticmethod
    def _codes(weights: Weights, i: int) -> int:
        return pointer(weights.rows.absmax) + i * (weights.rows.absmax.size // weights.copies)


@dataclass
class PeerProgram:
    """A graph of `calls` products. `kept` are the arrays whose buffers it reads and writes."""

    runtime: CudaRuntime
    graph: CudaGraph
    calls: int
    y: jax.Array
    kept: tuple[object, ...]

    def run(self, times: int) -> None:
        self.graph.run(times)

    def last_result(self) -> np.ndarray:
        """The last product, float32 `[rows, features]`."""
        return self.runtime.read(self.y).astype(np.float32)


def uses_fused(rows: int, in_features: int, out_features: int, *, capability: str, multiprocessors: int) -> bool | None:
    """Whether bitsandbytes multiplies 16-bit activations forward by its fused kernel, or dequantizes.

    Its own rule for compute capability 9.0, which depends on how many blocks of 64 outputs a multiprocessor gets.

    Returns:
      None for other devices, whose rules are not written down here: there the quicker of the two counts.
    """
    if not capability.startswith("9."):
        return None
    k, n = in_features, out_features
    blocks = -(-n // 64)
    if rows <= 4 or rows > MOST_FUSED_ROWS:
        return rows <= 4
    if n * k < 4 * 2**20:
        if 2 * k < n:
            return rows <= (512 if 3 * blocks < multiprocessors else 320)
        if 4 * blocks <= multiprocessors:
            return rows <= 32
        return 2 * blocks <= multiprocessors and rows <= 16
    below_three_quarters = 4 * blocks < 3 * multiprocessors
    if rows < 8:
        if rows < 6 or blocks < 36 or not below_three_quarters:
            return True
        return k < n or (k == n and 5 * blocks < 3 * multiprocessors)
    for waves, most in ((3, 64), (2, 48), (1, 32)):
        if blocks >= waves * multiprocessors:
            return rows <= most
    return blocks >= multiprocessors // 2 and not (k >= n and below_three_quarters) and rows <= 16
