"""The kernel that adds the parts of a split contraction, from nvcc's PTX: float32 sums in order, rounded once."""

import numpy as np
import pytest
from packed_weight import DTYPES
from ptx_interpreter import DeviceMemory
from replay import execute

from qlora_jax._lib import _plan

all_dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def sum_splits(parts: np.ndarray, dtype: str, **options) -> np.ndarray:
    """The last launch of a split product of as many tokens and outputs as `parts` [splits, tokens, outputs] has."""
    splits, tokens, outputs = parts.shape
    plan = _plan.plan(
        "forward", route="skinny", dtype=dtype, weight_dtype=dtype, tokens=tokens, in_features=64 * splits,
        out_features=outputs, row_blocks=splits, splits=splits,
    )  # fmt: skip
    assert plan["partials_bytes"] == parts.nbytes
    plan["launches"] = plan["launches"][1:]
    memory = DeviceMemory((3 * parts.nbytes + 65536) // 4096 * 4096)
    addresses = {"partials": memory.upload(parts), "y": memory.alloc(tokens * outputs * 2)}
    launches = execute(plan, addresses, memory, **options)
    assert [launch.kernel.name for launch in launches] == [f"nf4_sum_splits_{'bf16' if dtype == 'bfloat16' else 'f16'}"]
    return memory.download(addresses["y"], (tokens, outputs), np.uint16).view(DTYPES[dtype])


def in_order(parts: np.ndarray, dtype: str) -> np.ndarray:
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    assert total.dtype == np.float32
    return total.astype(DTYPES[dtype])


def assert_same_bits(y: np.ndarray, expected: np.ndarray) -> None:
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(y), nan)
    np.testing.assert_array_equal(y.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


@all_dtypes
@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize(("tokens", "outputs"), [(8, 128), (1, 1), (3, 67), (5, 100), (1, 1023), (1, 1025), (16, 576)])
def test_sums_in_order(tokens: int, outputs: int, splits: int, dtype: str):
    rng = np.random.default_rng([tokens, outputs, splits])
    # Magnitudes that make the order of a sum show.
    parts = (rng.standard_normal((splits, tokens, outputs)) * 10.0 ** rng.integers(-3, 4, (splits, 1, 1))).astype(
        np.float32
    )
    assert_same_bits(sum_splits(parts, dtype), in_order(parts, dtype))


@all_dtypes
def test_any_schedule_gives_the_same_bits(dtype: str):
    parts = np.random.default_rng(0).standard_normal((4, 7, 333)).astype(np.float32)
    for seed in (1, 2, 3):
        assert_same_bits(sum_splits(parts, dtype, seed=seed), in_order(parts, dtype))


@all_dtypes
@pytest.mark.parametrize("outputs", [128, 131])
def test_what_is_not_finite_spoils_itself_alone(dtype: str, outputs: int):
    parts = np.random.default_rng(0).standard_normal((3, 2, outputs)).astype(np.float32)
    parts[1, 0, 5], parts[2, 1, 7], parts[0, 1, 9] = np.nan, np.inf, 1e38
    parts[0, 0, 100], parts[2, 0, 100] = np.inf, -np.inf
    with np.errstate(all="ignore"):
        assert_same_bits(sum_splits(parts, dtype), in_order(parts, dtype))
