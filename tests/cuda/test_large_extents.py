"""Weights, activations and results of more than 2^31 elements: every address is computed in 64 bits."""

import numpy as np
import pytest
from far_corner import PROBLEM, SIDE, check_dequantize, check_product, last_block, plan_of
from packed_weight import DTYPES, TILE
from products import Kernel, kernels
from ptx_interpreter import DeviceMemory
from replay import execute


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "rows", "columns"), [("rows", 1, 8192), ("fragments", 64, 512)])
def test_dequantize(layout: str, rows: int, columns: int, dtype: str):
    check_dequantize(layout, rows, columns, dtype)


@pytest.mark.parametrize("kernel", [*kernels("forward", 8, 32, 64, 128), *kernels("dx", 8, 32, 64, 128)], ids=str)
def test_product(kernel: Kernel):
    check_product(kernel)


@pytest.mark.parametrize("kernel", [*kernels("forward", 64, 128), *kernels("dx", 64, 128)], ids=str)
def test_result(kernel: Kernel):
    """The last of 4.8e9 results."""
    rng = np.random.default_rng(1)
    tokens = SIDE
    weight = kernel.weight(rng, TILE, SIDE, values="exact")
    x = kernel.activations(rng, kernel.tokens, weight, "exact")
    problem = {**PROBLEM, "in_features": weight.in_features, "out_features": weight.out_features}
    problem |= {"layers": 1, "layer_groups": weight.layer_groups, "row_blocks": weight.row_blocks}
    plan = plan_of(kernel, tokens=tokens, **problem)
    memory = DeviceMemory(kernel.tokens * SIDE * 2 + weight.codes.size + (4 << 20))
    assert weight.group_scales is not None
    assert weight.offsets is not None
    window = memory.alloc(kernel.tokens * SIDE * 2)
    addresses = {
        "packed": memory.upload(weight.packed("fragments")),
        "absmax": memory.upload(weight.absmax),
        "group_scales": memory.upload(weight.group_scales),
        "offsets": memory.upload(weight.offsets),
        "where": memory.upload(np.zeros(3, np.int32)),
        "x": memory.upload(x.view(np.uint16)) - (tokens - kernel.tokens) * TILE * 2,
        "y": window - (tokens - kernel.tokens) * SIDE * 2,
    }
    execute(plan, addresses, memory, blocks=[last_block(plan)])
    y = memory.download(window, (kernel.tokens, SIDE), np.uint16).view(x.dtype)[:, -kernel.rows :]
    expected = kernel.expected(x, weight)[:, -kernel.rows :]
    np.testing.assert_array_equal(y.astype(np.float32), expected.astype(x.dtype).astype(np.float32))


def test_sum_of_splits():
    """The last of 9.1e9 sums. The stride from split to split is as large, and no arena spans two of them: one part."""
    tokens, outputs = 1 << 17, SIDE
    plan = plan_of(
        Kernel("forward", "bfloat16", 128), tokens=tokens, splits=2, **{**PROBLEM, "in_features": 128, "row_blocks": 2}
    )
    launch = plan["launches"][1]
    assert launch["arguments"][3] == ("int32", 2)
    launch["arguments"][3] = ("int32", 1)
    plan["launches"] = [launch]
    memory = DeviceMemory(1 << 20)
    parts = np.random.default_rng(2).standard_normal(1024).astype(np.float32)
    y = memory.alloc(2048)
    far = tokens * outputs - 1024
    addresses = {"partials": memory.upload(parts) - far * 4, "y": y - far * 2}
    execute(plan, addresses, memory, blocks=[(launch["grid"][0] - 1, 0, 0)])
    np.testing.assert_array_equal(memory.download(y, 1024, np.uint16), parts.astype(DTYPES["bfloat16"]).view(np.uint16))
