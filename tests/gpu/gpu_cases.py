"""Ways to multiply, weights for them, and products in float64."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_weight import DTYPES, PackedWeight

from qlora_jax.nf4 import NF4Tensor, nf4_matmul, use_kernels
from qlora_jax.nf4.kernels import DEQUANTIZE_TARGET, MATMUL_TARGET

# Relative Frobenius error of products of 4096 outputs or more; smaller ones get half as much again.
EXACT_WEIGHT = {"float32": 2e-6, "bfloat16": 1.8e-3, "float16": 2.3e-4}
SCALED_IN_16_BITS = {"bfloat16": 3.2e-3, "float16": 4e-4}


@dataclasses.dataclass(frozen=True)
class Way:
    """One of use_kernels' choices on a device, with weights in a layout."""

    device: str
    kernels: str
    layout: str

    def __str__(self) -> str:
        return f"{self.device}-{self.kernels}-{self.layout}"

    @property
    def marks(self) -> list[Any]:
        return [pytest.mark.gpu] if self.device == "gpu" else []

    @property
    def dtypes(self) -> list[str]:
        """Tensor cores would round float32."""
        fused = self.kernels in ("skinny", "tile")
        return ["bfloat16", "float16"] if fused else ["bfloat16", "float16", "float32"]

    @property
    def target(self) -> str | None:
        """The foreign call of the forward product; None where any may be (or none)."""
        targets = {
            "ffi": MATMUL_TARGET,
            "skinny": MATMUL_TARGET,
            "tile": MATMUL_TARGET,
            "dequantize": DEQUANTIZE_TARGET,
        }
        return targets.get(self.kernels)

    def bound(self, dtype: str, outputs: int) -> float:
        scaled = self.device == "gpu" and self.kernels != "dequantize" and dtype != "float32"
        return (SCALED_IN_16_BITS if scaled else EXACT_WEIGHT)[dtype] * (1 if outputs >= 4096 else 1.5)


WAYS = [
    Way("cpu", "ffi", "rows"),
    Way("gpu", "skinny", "fragments"),
    Way("gpu", "tile", "fragments"),
    Way("gpu", "dequantize", "fragments"),
    Way("gpu", "dequantize", "rows"),
    Way("gpu", "auto", "fragments"),
    Way("gpu", "xla", "rows"),
]


def tensor(weight: PackedWeight, layout: str = "rows", whole: tuple[int, int] | None = None) -> NF4Tensor:
    """The same weight as NF4Tensor; of a shard, `whole` is the shape of the tensor that it was cut from."""
    flat = weight.row_blocks == 0
    one = (-1,) if flat else (weight.out_features, weight.in_features // 2)
    blocks = (-1,) if flat else (weight.out_features, weight.in_features // weight.block_size)
    stack = (weight.layers,) if weight.layers > 1 else ()
    leaves = {"packed": weight.packed("rows").reshape(*stack, *one), "absmax": weight.absmax.reshape(*stack, *blocks)}
    if weight.group_scales is not None:
        leaves["absmax_scale"] = weight.group_scales.reshape(*stack, -1)
        leaves["absmax_offset"] = weight.offsets.reshape(stack)
    if any(weight.where):
        leaves["where"] = np.array(weight.where, np.int32)
    return NF4Tensor(
        **{name: jnp.asarray(leaf) for name, leaf in leaves.items()},
        shape=whole or (weight.in_features, weight.out_features),
        block_size=weight.block_size,
        dtype=weight.dtype,
    ).to_layout(layout)


def both(x: jax.Array, dy: jax.Array, w: NF4Tensor, kernels: str) -> tuple[np.ndarray, np.ndarray]:
    """(y, dx), on the host."""
    with use_kernels(kernels):
        y, dx = _both(x, dy, w)
    assert y.dtype == dx.dtype == x.dtype
    return np.asarray(y), np.asarray(dx)


@jax.jit
def _both(x: jax.Array, dy: jax.Array, w: NF4Tensor) -> tuple[jax.Array, jax.Array]:
    y, pullback = jax.vjp(lambda x: nf4_matmul(x, w), x)
    return y, pullback(dy)[0]


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.standard_normal(shape).astype(DTYPES[dtype])


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative Frobenius distance."""
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


def leave_out(part: str) -> None:
    """Skips the test where its part was left out by name."""
    if part in os.environ.get("QLORA_GPU_TESTS_WITHOUT", "").split(","):
        pytest.skip(f"left out by QLORA_GPU_TESTS_WITHOUT: {part}")
