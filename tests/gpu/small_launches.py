"""Every CUDA kernel once or twice on small operands, and little else: what compute-sanitizer watches.

usage: python small_launches.py cpu|cuda. Random numbers and layouts are made by NumPy and on the CPU, so that hardly a
kernel of XLA's own runs on the GPU.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "cuda")]

from gpu_cases import error, normal, tensor
from packed_weight import make_weight

from qlora_jax.nf4 import dequantize, nf4_matmul, use_kernels


def main(platform: str) -> None:
    cpu, device = jax.local_devices(backend="cpu")[0], jax.local_devices(backend=platform)[0]
    ways = ("skinny", "tile") if platform == "cuda" else ("ffi",)
    rng = np.random.default_rng(0)
    launches = 0
    # Ragged on every axis; long enough for a split contraction; a layer that is not the first.
    cases = (((128, 72), 1, 1), ((1088, 200), 9, 2), ((192, 328), 33, 1), ((256, 136), 70, 2))
    for shape, rows, layers in cases if platform == "cuda" else cases[1:2]:
        for dtype in ("bfloat16", "float16"):
            weight = make_weight(rng, *shape, layers=layers, layer=layers - 1, dtype=dtype)
            with jax.default_device(cpu):
                packed = {layout: tensor(weight, layout) for layout in ("rows", "fragments")}
            packed = {layout: jax.device_put(w, device) for layout, w in packed.items()}
            matrix = weight.dense(dtype).astype(np.float64)
            x, dy = (normal(rng, (rows, features), dtype) for features in matrix.shape[::-1])
            for way in ways:
                with use_kernels(way):
                    y, dx = _both(*jax.device_put((x, dy), device), packed["fragments"])
                assert error(np.asarray(y), x.astype(np.float64) @ matrix.T) < 6e-3
                assert error(np.asarray(dx), dy.astype(np.float64) @ matrix) < 6e-3
                launches += 2
            for w in packed.values():
                for result in (dtype, "float32"):
                    got = np.asarray(jax.jit(dequantize, static_argnums=1)(w, result))
                    np.testing.assert_array_equal(got, weight.dense(result).T)
                    launches += 1
    print(f"{launches} launches, all right")


@jax.jit
def _both(x: jax.Array, dy: jax.Array, w: object) -> tuple[jax.Array, jax.Array]:
    y = nf4_matmul(x, w)
    return y, jax.vjp(lambda x: nf4_matmul(x, w), jnp.zeros_like(x))[1](dy)[0]


if __name__ == "__main__":
    main(sys.argv[1])
