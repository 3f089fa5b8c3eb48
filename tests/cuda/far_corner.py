"""The far corner of weights, activations and results of more than 2^31 elements.

No memory holds them here. The block at the far end of the grid runs alone, and a buffer is a window at the far end of
what its pointer spans: one wrong bit in an address leaves the window, which the interpreter reports.
"""

import dataclasses
from typing import Any

import numpy as np
from packed_weight import DTYPES, TILE, pack_fragments, pack_rows
from products import Kernel
from ptx_interpreter import DeviceMemory
from replay import execute

from qlora_jax._lib import _plan
from qlora_jax.nf4.codebook import DYNAMIC_MAP, NF4_CODE

SIDE = 69_632  # in and out features: a last step begins 2^31 bytes behind the first
ROW_BLOCKS = SIDE // 64
LAYER = 40_000
LAYER_GROUPS = 3_000_000
FIRST_ROW = 2_000_000_000  # of a shard of a taller weight
PROBLEM = {
    "in_features": SIDE,
    "out_features": SIDE,
    "layers": LAYER + 1,
    "layer_groups": LAYER_GROUPS,
    "row_blocks": ROW_BLOCKS,
    "block_size": 64,
}


@dataclasses.dataclass
class Corner:
    """The last rows and columns of the last layer of a stack. `dense`: float32 [rows, columns]."""

    dense: np.ndarray
    addresses: dict[str, int]


def far_corner(memory: DeviceMemory, rows: int, columns: int, layout: str) -> Corner:
    """Uploads a corner; pointers are where the whole stack would begin."""
    rng = np.random.default_rng([rows, columns])
    codes = rng.integers(0, 16, (1, rows, columns)).astype(np.uint8)
    scale_codes = rng.integers(0, 256, (rows, columns // 64)).astype(np.uint8)
    first_row, first_block = SIDE - rows, ROW_BLOCKS - columns // 64
    blocks = (np.arange(rows)[:, None] + first_row + FIRST_ROW) * ROW_BLOCKS + first_block + np.arange(columns // 64)
    groups = blocks // 256
    group_scales = rng.uniform(1, 2, groups.max() - groups.min() + 1).astype(np.float32)
    offset = np.float32(0.5)
    scales = DYNAMIC_MAP[scale_codes] * group_scales[groups - groups.min()] + offset

    if layout == "rows":
        packed = np.full((rows, SIDE // 2), 0xEE, np.uint8)
        packed[:, SIDE // 2 - columns // 2 :] = pack_rows(codes).reshape(rows, -1)
    else:
        packed = np.full((rows // TILE, SIDE // TILE, 2048), 0xEE, np.uint8)
        packed[:, SIDE // TILE - columns // TILE :] = pack_fragments(codes).reshape(rows // TILE, -1, 2048)
    absmax = np.full((rows, ROW_BLOCKS), 0xEE, np.uint8)
    absmax[:, first_block:] = scale_codes

    addresses = {
        "packed": memory.upload(packed) - (LAYER * SIDE + first_row) * SIDE // 2,
        "absmax": memory.upload(absmax) - (LAYER * SIDE + first_row) * ROW_BLOCKS,
        "group_scales": memory.upload(group_scales) - (LAYER * LAYER_GROUPS + int(groups.min())) * 4,
        "offsets": memory.upload(offset) - LAYER * 4,
        "where": memory.upload(np.array([LAYER, FIRST_ROW, 0], np.int32)),
    }
    return Corner(NF4_CODE[codes[0]] * np.repeat(scales, 64, 1), addresses)


def check_dequantize(layout: str, rows: int, columns: int, dtype: str) -> None:
    """The last block of 4.8e9 weights, of layer 40,000; it makes `columns` of the last `rows` rows."""
    plan = _plan.plan("dequantize", layout=layout, dtype=dtype, weight_dtype="float32", **PROBLEM)
    itemsize = DTYPES[dtype].itemsize
    memory = DeviceMemory(rows * SIDE * itemsize + (4 << 20))
    corner = far_corner(memory, rows, columns, layout)
    window = memory.alloc(rows * SIDE * itemsize)
    corner.addresses["dense"] = window - (SIDE - rows) * SIDE * itemsize
    (grid, _, _) = plan["launches"][0]["grid"]
    execute(plan, corner.addresses, memory, blocks=[(grid - 1, 0, 0)])
    storage = np.dtype(f"u{itemsize}")
    dense = memory.download(window, (rows, SIDE), storage)
    np.testing.assert_array_equal(dense[:, -columns:], corner.dense.astype(DTYPES[dtype]).view(storage))
    assert (dense[:, :-columns] == np.iinfo(storage).max).all()


def check_product(kernel: Kernel) -> None:
    """The last outputs of the last tokens, over the last part of the contraction.

    Only the largest tile of a route takes more tokens than it holds: the others meet a large weight alone.
    """
    tokens, splits, columns = (40_000 if kernel.tokens >= 64 else kernel.tokens), SIDE // 128, 2 * TILE
    plan = plan_of(kernel, tokens=tokens, splits=splits, **PROBLEM)
    last_tokens = tokens - (tokens - 1) // kernel.tokens * kernel.tokens
    memory = DeviceMemory(last_tokens * SIDE * 6 + (8 << 20))
    corner = far_corner(memory, columns, columns, "fragments")
    first_token = tokens - last_tokens
    x = np.full((last_tokens, SIDE), np.nan, DTYPES[kernel.dtype])
    x[:, -columns:] = np.random.default_rng(0).standard_normal((last_tokens, columns))
    partials = memory.alloc(last_tokens * SIDE * 4)
    corner.addresses |= {
        "x": memory.upload(x.view(np.uint16)) - first_token * SIDE * 2,
        "y": 0,
        "partials": partials - ((splits - 1) * tokens + first_token) * SIDE * 4,
    }
    execute(plan, corner.addresses, memory, blocks=[last_block(plan)])
    part = memory.download(partials, (last_tokens, SIDE), np.float32)
    assert np.isnan(part[:, : -kernel.rows]).all()
    y = part[:, -kernel.rows :].astype(np.float64)
    dense = corner.dense.astype(np.float64)
    expected = x[:, -columns:].astype(np.float64) @ (dense if kernel.operation == "dx" else dense.T)
    expected = expected[:, -kernel.rows :]
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert error < (5e-3 if kernel.dtype == "bfloat16" else 7e-4)


def plan_of(kernel: Kernel, **problem: Any) -> dict[str, Any]:
    return _plan.plan(
        kernel.operation, route=kernel.route, layout="fragments", dtype=kernel.dtype, weight_dtype=kernel.dtype,
        **problem,
    )  # fmt: skip


def last_block(plan: dict[str, Any]) -> tuple[int, int, int]:
    x, y, z = plan["launches"][0]["grid"]
    return x - 1, y - 1, z - 1
