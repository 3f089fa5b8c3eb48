"""The data type: NF4 weights with double-quantized scales, and their product with activations."""

from qlora_jax.nf4.blockwise import dequantize, quantize
from qlora_jax.nf4.kernels import kernel_report, use_kernels
from qlora_jax.nf4.matmul import nf4_matmul
from qlora_jax.nf4.tensor import NF4Tensor

__all__ = ["NF4Tensor", "dequantize", "kernel_report", "nf4_matmul", "quantize", "use_kernels"]
