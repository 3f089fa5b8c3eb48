"""The dequantize kernels from nvcc's PTX: every weight bit-equal to `T(float32 code * float32 scale)`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from packed_weight import DTYPES, PackedWeight, make_weight
from product_contract import SMOLLM2
from replay import dequantize

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "nf4_golden.npz")
CASES: dict[str, Any] = json.loads(bytes(GOLDEN["meta_json"]))["cases"]

all_dtypes = pytest.mark.parametrize("dtype", DTYPES)
both_layouts = pytest.mark.parametrize("layout", ["rows", "fragments"])


def check(weight: PackedWeight, dtype: str, layout: str, **options: Any) -> np.ndarray:
    dense = dequantize(weight, dtype, layout, **options).output
    assert_same_bits(dense, weight.dense(dtype))
    return dense


def assert_same_bits(dense: np.ndarray, expected: np.ndarray) -> None:
    """Any NaN equals any other: its bits are the processor's."""
    storage = np.dtype(f"u{dense.dtype.itemsize}")
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(dense), nan)
    np.testing.assert_array_equal(dense.view(storage)[~nan], expected.view(storage)[~nan])


def random_weight(in_features: int, out_features: int, **options: Any) -> PackedWeight:
    return make_weight(np.random.default_rng([in_features, out_features]), in_features, out_features, **options)


@all_dtypes
@both_layouts
class TestEveryKernel:
    @pytest.mark.parametrize("weight_dtype", DTYPES)
    def test_full_tiles(self, layout: str, dtype: str, weight_dtype: str):
        check(random_weight(256, 128, dtype=weight_dtype), dtype, layout)

    def test_ragged_rows(self, layout: str, dtype: str):
        for out_features in (1, 63, 65, 100):
            check(random_weight(192, out_features), dtype, layout)

    @pytest.mark.parametrize("in_features", [32, 96, 160])
    def test_ragged_columns(self, layout: str, dtype: str, in_features: int):
        check(random_weight(in_features, 70, block_size=32), dtype, layout)

    @pytest.mark.parametrize("where", [1, 2, 9, -1])
    def test_layer_view(self, layout: str, dtype: str, where: int):
        stack = random_weight(192, 67, layers=3, layer=where)
        viewed = check(stack, dtype, layout)
        assert_same_bits(viewed, dequantize(stack.only_layer(min(max(where, 0), 2)), dtype, layout).output)

    def test_shard_of_a_layer(self, layout: str, dtype: str):
        # Nine blocks in a row: groups of 256 scales end within rows, and within this shard's rows.
        check(random_weight(576, 200, layers=2, layer=1, shard=(slice(20, 156), slice(3, 7))), dtype, layout)
        check(random_weight(576, 200, shard=(slice(100, 200), slice(0, 9))), dtype, layout)
        check(random_weight(576, 200, shard=(slice(0, 200), slice(8, 9))), dtype, layout)

    def test_float32_scales(self, layout: str, dtype: str):
        check(random_weight(192, 100, double_quantized=False, layers=2, layer=1), dtype, layout)

    @pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 4096])
    def test_block_sizes(self, layout: str, dtype: str, block_size: int):
        check(random_weight(max(512, block_size), 20, block_size=block_size), dtype, layout)

    @pytest.mark.parametrize(("in_features", "out_features"), SMOLLM2)
    def test_smollm2_shapes(self, layout: str, dtype: str, in_features: int, out_features: int):
        check(random_weight(in_features, out_features), dtype, layout)

    def test_any_schedule_gives_the_same_bits(self, layout: str, dtype: str):
        weight = random_weight(576, 100)
        for seed in (1, 2, 3):
            check(weight, dtype, layout, seed=seed)

    def test_a_bad_scale_spoils_its_block_alone(self, layout: str, dtype: str):
        weight = random_weight(192, 70, double_quantized=False)
        for place, value in ((7, np.nan), (100, np.inf), (209, -np.inf), (42, 0.0), (43, 1e-42)):
            weight.absmax[0, place] = value
            weight.scales[0].reshape(-1, 64)[place] = value
        check(weight, dtype, layout)

    def test_numbers_beyond_the_dtype(self, layout: str, dtype: str):
        weight = random_weight(192, 70, double_quantized=False, dtype="float32")
        scales = np.geomspace(1e-44, 3e38, weight.absmax.size, dtype=np.float32)  # subnormal, ordinary, too large
        weight.absmax[0] = scales
        weight.scales[0] = np.repeat(scales, 64).reshape(weight.scales[0].shape)
        check(weight, dtype, layout)


@all_dtypes
@pytest.mark.parametrize("double_quantized", [True, False])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(50, 33), (37, 13), (9, 7), (80, 5), (65, 1), (131, 131), (1, 1)]
)
def test_blocks_that_straddle_rows(dtype: str, double_quantized: bool, in_features: int, out_features: int):
    """Stacked layers of odd numbers of bytes begin anywhere; the last block, byte and group of eight are not whole."""
    for layers, layer in ((1, 0), (3, 1), (3, 2)):
        weight = random_weight(in_features, out_features, layers=layers, layer=layer, double_quantized=double_quantized)
        assert weight.row_blocks == 0
        check(weight, dtype, "rows")


def golden(key: str) -> np.ndarray:
    array = GOLDEN[key]
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def has_whole_rows(name: str) -> bool:
    return CASES[name]["shape"][1] % CASES[name]["blocksize"] == 0


NF4_CASES = sorted(name for name, case in CASES.items() if "nf4" in case["quant_types"])


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for name in NF4_CASES
        for layout in ("rows", "fragments")
        if layout == "rows" or has_whole_rows(name)
    ],
)
def test_bitsandbytes_bytes_and_values(name: str, layout: str):
    out_features, in_features = CASES[name]["shape"]
    block_size = CASES[name]["blocksize"]
    nibbles = np.stack([golden(f"{name}/nf4/packed") >> 4, golden(f"{name}/nf4/packed") & 15], 1).reshape(-1)
    dtype = golden(f"{name}/W").dtype.name
    weight = PackedWeight(
        codes=nibbles[: out_features * in_features].reshape(1, out_features, in_features),
        scales=np.zeros(0, np.float32),
        absmax=golden(f"{name}/nf4/absmax")[None],
        group_scales=None,
        offsets=None,
        block_size=block_size,
        row_blocks=in_features // block_size if has_whole_rows(name) else 0,
        where=(0, 0, 0),
        dtype=dtype,
    )
    dense = dequantize(weight, dtype, layout).output
    assert_same_bits(dense, golden(f"{name}/nf4/deq").reshape(dense.shape))
    if CASES[name].get("dq"):
        doubly = dataclasses.replace(
            weight,
            absmax=golden(f"{name}/nf4_dq/absmax_q")[None],
            group_scales=golden(f"{name}/nf4_dq/nested_absmax")[None],
            offsets=golden(f"{name}/nf4_dq/offset")[None],
        )
        dense = dequantize(doubly, dtype, layout).output
        assert_same_bits(dense, golden(f"{name}/nf4_dq/deq").reshape(dense.shape))
