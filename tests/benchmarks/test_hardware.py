"""Floors and rotation."""

import pytest

from qlora_jax.benchmarks.bitsandbytes import uses_fused
from qlora_jax.benchmarks.hardware import floor_seconds, product_bytes, published, rotated_copies

H100 = published("NVIDIA H100 80GB HBM3")


def test_the_nearest_name_counts():
    assert published("NVIDIA H100 PCIe").bandwidth == 2.0e12
    assert H100.bandwidth == 3.35e12
    assert published("NVIDIA A100-SXM4-40GB").bandwidth == 1.555e12
    assert published("cpu") is None


def test_floors_of_an_h100():
    """The arithmetic of a 4096 x 4096 weight: 8.65 MB at 3.35 TB/s; and 2 x 4096^3 operations at 989 TFLOP/s."""
    assert product_bytes(0, 4096, 4096) == 8_654_848
    assert floor_seconds(1, 4096, 4096, H100) == pytest.approx(2.588e-6, rel=1e-3)
    assert floor_seconds(4096, 4096, 4096, H100) == pytest.approx(138.9e-6, rel=1e-3)


def test_a_program_overflows_the_cache_and_is_long_enough_to_start():
    def copies(rows, shape, **changed):
        floor = floor_seconds(rows, *shape, H100)
        return rotated_copies(product_bytes(rows, *shape), floor, on_gpu=True, sheet=H100, **changed)

    assert copies(1, (4096, 4096)) == 64
    assert copies(1, (4096, 4096), most=1000) == 78  # 0.2 ms at 2.6 us
    assert copies(1, (8192, 28672)) == 6
    assert copies(2048, (4096, 4096)) == 3  # 100 MB at 42 MB a call
    assert copies(16384, (8192, 28672)) == 1
    assert rotated_copies(1e6, None, on_gpu=True, sheet=None, most=1000) == 269
    assert rotated_copies(1e6, None, on_gpu=False, sheet=None) == 2


def test_bitsandbytes_rule_on_an_h100():
    """Where its rule, executed, takes its own kernel for bfloat16 (132 multiprocessors)."""
    last = {
        (4096, 4096): 7,
        (4096, 11008): 32,
        (11008, 4096): 5,
        (4096, 14336): 32,
        (4096, 1024): 7,
        (8192, 28672): 64,
        (8192, 8192): 16,
    }
    for (in_features, out_features), most in last.items():
        taken = [
            rows
            for rows in range(1, 2049)
            if uses_fused(rows, in_features, out_features, capability="9.0", multiprocessors=132)
        ]
        assert taken == list(range(1, most + 1))
    assert uses_fused(1, 4096, 4096, capability="8.0", multiprocessors=108) is None
