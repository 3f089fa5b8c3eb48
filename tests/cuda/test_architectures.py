"""PTX of other architectures: nvcc makes one text up to sm_89, nearly the same for sm_90a, another from sm_100a on."""

import re

import numpy as np
import pytest
from packed_weight import DTYPES, make_weight
from product_contract import BOTH
from products import ALL_KERNELS, Kernel
from ptx_interpreter.toolchain import compile_ptx
from replay import KERNELS, NVCC_FLAGS, dequantize


@pytest.mark.parametrize("kernel", ALL_KERNELS, ids=str)
def test_products_on_blackwell(kernel: Kernel):
    ragged = (100, 256) if kernel.operation == "dx" else (256, 100)
    kernel.check_random(kernel.tokens, kernel.long_contraction, kernel.rows, BOTH, run={"architecture": "sm_100a"})
    kernel.check_random(kernel.tokens - 1, *ragged, run={"architecture": "sm_100a", "splits": 2})
    kernel.check_random(
        kernel.tokens, *ragged, run={"architecture": "sm_100a"}, layers=2, layer=1, double_quantized=False
    )


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "fragments"])
def test_dequantize(layout: str, dtype: str, architecture: str):
    shard = slice(20, 156), slice(3, 7)
    for weight_dtype in DTYPES:
        weight = make_weight(np.random.default_rng(0), 576, 200, layers=2, layer=1, shard=shard, dtype=weight_dtype)
        dense = dequantize(weight, dtype, layout, architecture=architecture).output
        np.testing.assert_array_equal(dense.astype(np.float32), weight.dense(dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("source", "same"),
    [
        ("dequantize.cu", ["sm_80", "sm_86", "sm_89"]),
        ("dequantize.cu", ["sm_100a", "sm_120"]),
        ("product_bf16.cu", ["sm_80", "sm_86", "sm_89", "sm_90a"]),
        ("product_bf16.cu", ["sm_100a", "sm_120"]),
    ],
)
def test_what_runs_here_is_what_others_get(source: str, same: list[str]):
    """Where texts are equal but for the name of the target, what is shown for one holds for all."""
    texts = {
        re.sub(r"//.*|\.target .*", "", compile_ptx(KERNELS / source, architecture, flags=NVCC_FLAGS))
        for architecture in same
    }
    assert len(texts) == 1
