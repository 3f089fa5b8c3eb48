"""The product kernels, data for them, and what their results are held against."""

import dataclasses
from typing import Any

import numpy as np
from packed_weight import DTYPES, PackedWeight, make_weight
from replay import Result, multiply

from qlora_jax._lib import _plan

SHAPES = {shape["tokens"]: shape for shape in _plan.product_shapes()}
# Relative Frobenius error over 4096 outputs or more, of kernels that scale weights in the tensor core's format.
LIMITS = {"bfloat16": 3.2e-3, "float16": 4e-4}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One entry point: a direction, a dtype of the activations, a tile of tokens."""

    operation: str
    dtype: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.operation}_{self.dtype}_t{self.tokens}"

    @property
    def entry(self) -> str:
        kind = f"{self.route}_{self.operation}"
        return f"nf4_{kind}_{'bf16' if self.dtype == 'bfloat16' else 'f16'}_t{self.tokens}"

    @property
    def route(self) -> str:
        return "tile" if self.tokens == 128 else "skinny"

    @property
    def rows(self) -> int:
        """Outputs of a block."""
        return SHAPES[self.tokens]["rows"]

    @property
    def long_contraction(self) -> int:
        """Enough steps of 64 that every group of warps goes once around its stages and on, and one group further."""
        shape = SHAPES[self.tokens]
        return 64 * (shape["k_groups"] * (shape["stages"] + 1) + 1)

    def weight(self, rng: np.random.Generator, contraction: int, outputs: int, **options: Any) -> PackedWeight:
        """A weight of the kernel's dtype for a product of these extents; `options` as `make_weight` takes them."""
        if self.operation == "dx":
            contraction, outputs = outputs, contraction
        return make_weight(rng, contraction, outputs, **{"dtype": self.dtype, **options})

    def activations(self, rng: np.random.Generator, tokens: int, weight: PackedWeight, values: str) -> np.ndarray:
        """x, or dy, for a product with the weight: normal numbers, or integers from -3 to 3."""
        contraction = weight.out_features if self.operation == "dx" else weight.in_features
        shape = tokens, contraction
        numbers = rng.integers(-3, 4, shape) if values == "exact" else rng.standard_normal(shape)
        return numbers.astype(DTYPES[self.dtype])

    def run(self, weight: PackedWeight, x: np.ndarray, **options: Any) -> Result:
        """The product, by this kernel and no other; `options` as `multiply` takes them."""
        result = multiply(self.operation, weight, x, route=self.route, **options)
        assert result.launches[0].kernel.name == self.entry
        return result

    def check(self, weight: PackedWeight, x: np.ndarray, values: str, **options: Any) -> np.ndarray:
        """Runs the product and holds it against float64; returns y."""
        y = self.run(weight, x, **options).output
        self.compare(y, x, weight, values)
        return y

    def compare(self, y: np.ndarray, x: np.ndarray, weight: PackedWeight, values: str) -> None:
        """Exact data: equal bits. Else: within the bound on the relative Frobenius error."""
        expected = self.expected(x, weight)
        if values == "exact":
            np.testing.assert_array_equal(y.astype(np.float32), expected.astype(y.dtype).astype(np.float32))
            return
        assert np.isfinite(y.astype(np.float64)).all()
        error = np.linalg.norm(y.astype(np.float64) - expected) / np.linalg.norm(expected)
        limit = LIMITS[self.dtype] * (1 if y.size >= 4096 else 1.5)
        assert error <= limit, f"relative Frobenius error {error:.2e}, the bound is {limit:.2e}"

    def expected(self, x: np.ndarray, weight: PackedWeight) -> np.ndarray:
        """The product over the dequantized weight, in float64."""
        dense = weight.dense(self.dtype).astype(np.float32).astype(np.float64)
        return x.astype(np.float32).astype(np.float64) @ (dense if self.operation == "dx" else dense.T)

    def check_random(
        self,
        tokens: int,
        contraction: int,
        outputs: int,
        values: tuple[str, ...] = ("exact",),
        run: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Checks the product of random operands, once for each kind of values."""
        for kind in values:
            rng = np.random.default_rng([tokens, contraction, outputs])
            weight = self.weight(rng, contraction, outputs, values=kind, **options)
            self.check(weight, self.activations(rng, tokens, weight, kind), kind, **(run or {}))


def kernels(operation: str, *tokens: int) -> list[Kernel]:
    """The kernels of a direction, of both dtypes."""
    return [Kernel(operation, dtype, count) for dtype in LIMITS for count in tokens]


ALL_KERNELS = [kernel for operation in ("forward", "dx") for kernel in kernels(operation, *SHAPES)]
