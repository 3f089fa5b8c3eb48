"""The data type: NF4 weights with double-quantized scales, and their product with activations."""

from qlora_jax.nf4.blockwise import quantize
from qlora_jax.nf4.decode import dequantize
from qlora_jax.nf4.dispatch import choose_route, dispatch_report, use_compute_capability
from qlora_jax.nf4.kernels import kernel_report, use_kernels
from qlora_jax.nf4.matmul import nf4_matmul
from qlora_jax.nf4.placement import device_layout, place, use_layout
from qlora_jax.nf4.tensor import NF4Tensor

__all__ = [
    "NF4Tensor",
    "choose_route",
    "dequantize",
    "device_layout",
    "dispatch_report",
    "kernel_report",
    "nf4_matmul",
    "place",
    "quantize",
    "use_compute_capability",
    "use_kernels",
    "use_layout",
]
