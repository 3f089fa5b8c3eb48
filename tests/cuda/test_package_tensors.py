"""What the package quantizes and repacks is what the kernels read: its own tensors, run through nvcc's PTX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_weight import PackedWeight
from products import Kernel, kernels
from replay import dequantize

import qlora_jax.nf4 as nf4

LAYER = 1


def stacked_tensor(layout: str, double_quant: bool) -> nf4.NF4Tensor:
    """Two layers, [in 192, out 100] each."""
    keys = jax.random.split(jax.random.key(0), 2)
    dense = [jax.random.normal(key, (192, 100), jnp.bfloat16) for key in keys]
    return nf4.NF4Tensor.stack([nf4.quantize(w, double_quant=double_quant) for w in dense]).to_layout(layout)


def operands(tensor: nf4.NF4Tensor) -> tuple[PackedWeight, np.ndarray]:
    """The tensor's buffers, bytes apart; codes and scales stay unread."""
    in_features, out_features = tensor.shape
    doubly = tensor.absmax_scale is not None
    weight = PackedWeight(
        codes=np.zeros((2, out_features, in_features), np.uint8),
        scales=np.zeros(0, np.float32),
        absmax=np.asarray(tensor.absmax),
        group_scales=np.asarray(tensor.absmax_scale) if doubly else None,
        offsets=np.asarray(tensor.absmax_offset) if doubly else None,
        block_size=tensor.block_size,
        row_blocks=in_features // tensor.block_size,
        where=(LAYER, 0, 0),
        dtype=tensor.dtype,
    )
    return weight, np.asarray(tensor.packed)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("layout", ["rows", "fragments"])
def test_dequantize(layout: str, double_quant: bool):
    tensor = stacked_tensor(layout, double_quant)
    weight, packed = operands(tensor)
    dense = dequantize(weight, "bfloat16", layout, packed).output
    expected = np.asarray(nf4.dequantize(tensor.to_layout("rows").layer(LAYER))).T
    np.testing.assert_array_equal(dense.view(np.uint16), np.ascontiguousarray(expected).view(np.uint16))


@pytest.mark.parametrize("kernel", [*kernels("forward", 8, 128)[:2], *kernels("dx", 8, 128)[:2]], ids=str)
def test_products(kernel: Kernel):
    tensor = stacked_tensor("fragments", True)
    weight, packed = operands(tensor)
    x = kernel.activations(np.random.default_rng(0), kernel.tokens, weight, "normal")
    y = kernel.run(weight, x, packed=packed).output.astype(np.float64)
    dense = np.asarray(nf4.dequantize(tensor.to_layout("rows").layer(LAYER)).astype(jnp.float32), np.float64)
    expected = x.astype(np.float64) @ (dense.T if kernel.operation == "dx" else dense)
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert error <= 1.5 * 3.2e-3
