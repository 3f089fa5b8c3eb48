"""What is timed through XLA: many products in one program, each with a weight of its own.

One call of a small product takes less time than starting it from Python does. So a program makes `copies` of them, one
after another, with copies of the weight at as many places in memory; on a GPU XLA records it as one CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.benchmarks.shapes import Size
from qlora_jax.nf4 import NF4Tensor, dequantize, nf4_matmul, place, quantize, use_kernels

OPS = ("forward", "dx")
# Read by the GPU's compiler alone. Graphs whatever their size, in which nothing runs side by side; and cuBLAS for the
# dense products, where XLA may else try its own kernels on each shape, which takes seconds.
COMPILER_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL",
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
    "xla_gpu_enable_triton_gemm": False,
}


@dataclass(frozen=True)
class Weights:
    """Copies of one random weight.

    Attributes:
      stack: NF4Tensor `[copies]`, in the layout of the device.
      rows: the same in bitsandbytes' layout (the same object where that is the device's).
      matrices: the weight unpacked, `[in, out]`, in the activations' dtype, `copies` times.
    """

    stack: NF4Tensor
    rows: NF4Tensor
    matrices: list[jax.Array]

    @property
    def copies(self) -> int:
        return len(self.matrices)


def make_matrix(shape: tuple[int, int]) -> jax.Array:
    """A Gaussian weight, bfloat16 `[in, out]`."""
    return jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) * 0.02


def make_weights(shape: tuple[int, int], dtype: str, copies: int) -> Weights:
    """make_matrix's weight, quantized with double quantization."""
    w = quantize(make_matrix(shape))
    matrix = dequantize(w, dtype)
    rows = NF4Tensor.stack([w] * copies)
    # Each copy at a place of its own.
    return Weights(place(rows), rows, [jnp.array(matrix, copy=True) for _ in range(copies)])


def make_activations(size: Size, dtype: str, copies: int) -> dict[str, list[jax.Array]]:
    """x `[rows, in]` for "forward" and dy `[rows, out]` for "dx", `copies` times.

    Each product gets its own: XLA makes one wide product of dense products that share an operand.
    """
    activations = {}
    for key, (op, features) in enumerate(zip(OPS, size.shape, strict=True), start=1):
        x = jax.random.normal(jax.random.key(key), (size.rows, features)).astype(dtype)
        activations[op] = [jnp.array(x, copy=True) for _ in range(copies)]
    return activations


@dataclass
class XlaProgram:
    """A compiled program. Results are donated to the next run, so that buffers stay where they are."""

    compiled: Any
    operands: tuple[Any, ...]
    results: list[jax.Array]

    @property
    def calls(self) -> int:
        return len(self.results)

    def run(self, times: int) -> None:
        for _ in range(times):
            self.results = self.compiled(*self.operands, self.results)
        jax.block_until_ready(self.results)

    def last_result(self) -> np.ndarray:
        """The last product of the last run, float32 `[rows, features]`."""
        return np.asarray(self.results[-1], np.float32)


@dataclass(frozen=True)
class Source:
    """A program that is traced and not yet compiled, which may be done in another thread."""

    jitted: Any
    traced: Any
    operands: tuple[Any, ...]
    results: list[jax.ShapeDtypeStruct]

    def compile(self) -> XlaProgram:
        compiled = self.traced.lower().compile(compiler_options=COMPILER_OPTIONS)
        return XlaProgram(compiled, self.operands, [jnp.zeros(result.shape, result.dtype) for result in self.results])


def packed_product(op: str, xs: list[jax.Array], weights: Weights, kernels: str) -> Source:
    """nf4_matmul, or its input gradient, with the given choice of kernels (see use_kernels)."""

    def product(x: jax.Array, w: NF4Tensor) -> jax.Array:
        if op == "forward":
            return nf4_matmul(x, w)
        # The product at 0 is not used, so XLA leaves it out.
        return jax.vjp(lambda x: nf4_matmul(x, w), jnp.zeros((x.shape[0], w.in_features), x.dtype))[1](x)[0]

    def program(xs: list[jax.Array], stack: NF4Tensor, results: list[jax.Array]) -> list[jax.Array]:
        return [product(x, stack.layer(i)) for i, x in enumerate(xs)]

    with use_kernels(kernels):
        return _trace(program, (xs, weights.stack), _result(op, xs, weights), weights.copies)


def dense_product(op: str, xs: list[jax.Array], weights: Weights) -> Source:
    """XLA's product with unpacked weights."""

    def program(xs: list[jax.Array], matrices: list[jax.Array], results: list[jax.Array]) -> list[jax.Array]:
        pairs = zip(xs, matrices, strict=True)
        return [jnp.matmul(x, matrix if op == "forward" else matrix.T) for x, matrix in pairs]

    return _trace(program, (xs, weights.matrices), _result(op, xs, weights), weights.copies)


def dequantized(weights: Weights, kernels: str) -> Source:
    """The dense weights."""
    shape = weights.stack.shape

    def program(stack: NF4Tensor, results: list[jax.Array]) -> list[jax.Array]:
        # As [out, in] where a kernel writes that order: a transpose at the end would be a pass of its own.
        return [dequantize(stack.layer(i)).T for i in range(len(results))]

    with use_kernels(kernels):
        result = jax.ShapeDtypeStruct(shape[::-1], weights.stack.dtype)
        return _trace(program, (weights.stack,), result, weights.copies)


def copied(size: int, copies: int, *, negate: bool) -> Source:
    """A pass that reads and writes `size` bfloat16 numbers, `copies` times: what memory gives at best.

    `negate`: by a kernel; else by the driver's own copy.
    """

    def program(arrays: list[jax.Array], results: list[jax.Array]) -> list[jax.Array]:
        return [-array if negate else jnp.copy(array) for array in arrays]

    arrays = [jnp.ones((size,), jnp.bfloat16) for _ in range(copies)]
    return _trace(program, (arrays,), jax.ShapeDtypeStruct((size,), jnp.bfloat16), copies)


def _result(op: str, xs: list[jax.Array], weights: Weights) -> jax.ShapeDtypeStruct:
    in_features, out_features = weights.stack.shape
    return jax.ShapeDtypeStruct((xs[0].shape[0], out_features if op == "forward" else in_features), xs[0].dtype)


def _trace(program: Callable[..., Any], operands: tuple[Any, ...], result: jax.ShapeDtypeStruct, copies: int) -> Source:
    jitted, results = jax.jit(program, donate_argnums=len(operands), keep_unused=True), [result] * copies
    return Source(jitted, jitted.trace(*operands, results), operands, results)
