"""One small product in each way that this machine offers, against float64."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.nf4 import NF4Tensor, dequantize, kernel_report, nf4_matmul, place, quantize, use_kernels
from qlora_jax.nf4.dispatch import cuda_kernel
from qlora_jax.nf4.kernels import platform_name

# Relative Frobenius error in bfloat16: of products with the exact weight, and of kernels that round the scaled one.
_EXACT, _ROUNDED = 1.8e-3, 3.2e-3
_ROWS, _IN, _OUT = 64, 256, 192


@dataclass(frozen=True)
class Check:
    """A product, or dequantization, by one way. `error` is None where it did not run, for the reason `failure`."""

    what: str
    way: str
    error: float | None
    bound: float
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.bound


def run_checks() -> list[Check]:
    """On JAX's default device: nf4_matmul and its input gradient, and dequantization, by every way that is there."""
    with use_kernels("xla"):
        w = quantize(jax.random.normal(jax.random.key(0), (_IN, _OUT), jnp.bfloat16))
        matrix = np.asarray(dequantize(w), np.float64)
    x = jax.random.normal(jax.random.key(1), (_ROWS, _IN), jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(2), (_ROWS, _OUT), jnp.bfloat16)
    return [check for way in ways() for check in _check(way, w, matrix, x, dy)]


def ways() -> tuple[str, ...]:
    """Choices of kernels that the default device has (see use_kernels)."""
    platform = platform_name(jax.default_backend())
    if kernel_report().get(platform) != "loaded":
        return ("xla",)
    if platform != "cuda":
        return ("ffi",)
    # Also where the kernels were not built for this GPU.
    return ("xla",) if cuda_kernel() == "xla" else ("skinny", "tile", "dequantize")


def _check(way: str, w: NF4Tensor, matrix: np.ndarray, x: jax.Array, dy: jax.Array) -> list[Check]:
    bound = _ROUNDED if way in ("skinny", "tile") else _EXACT

    def run(what: str, expected: np.ndarray, bound: float) -> Check:
        try:
            with use_kernels(way):
                placed = place(w)
                y, pullback = jax.vjp(lambda x: nf4_matmul(x, placed), x)
                got = {"forward": lambda: y, "dx": lambda: pullback(dy)[0], "dequantize": lambda: dequantize(placed)}
                result = np.asarray(got[what](), np.float64)
        except Exception as error:
            return Check(what, way, None, bound, f"{type(error).__name__}: {error}".splitlines()[0])
        return Check(what, way, float(np.linalg.norm(result - expected) / np.linalg.norm(expected)), bound)

    checks = [
        run("forward", np.asarray(x, np.float64) @ matrix, bound),
        run("dx", np.asarray(dy, np.float64) @ matrix.T, bound),
    ]
    # The bits are the same whoever computes them.
    return [*checks, run("dequantize", matrix, 0.0)] if way == "dequantize" else checks
