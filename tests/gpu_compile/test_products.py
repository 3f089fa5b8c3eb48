"""nf4_matmul in both directions, and a model made by quantize_model, as XLA compiles them for an H100."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from abstract_llama import nf4
from flax import nnx
from hlo import parse

from qlora_jax.nf4 import nf4_matmul, use_kernels
from qlora_jax.nf4.kernels import cuda_kernels_loaded, kernel_report
from qlora_jax.nf4.placement import use_layout
from qlora_jax.nn import quantize_model

pytestmark = pytest.mark.gpu_compile

ROWS = {"skinny": 16, "tile": 256, "dequantize": 2048}


def test_the_kernels_are_loaded_without_a_gpu() -> None:
    assert cuda_kernels_loaded(), kernel_report()


@pytest.mark.parametrize("direction", ["forward", "dx"])
@pytest.mark.parametrize("route", ROWS)
def test_a_product_is_one_call(route: str, direction: str, gpu_compile: Any) -> None:
    k, n, layers = 4096, 11008, 2
    w = jax.eval_shape(lambda: nf4((k, n), layers))
    width, outputs = (k, n) if direction == "forward" else (n, k)
    x = jax.ShapeDtypeStruct((ROWS[route], width), jnp.bfloat16)

    def product(x: jax.Array, w: Any, i: jax.Array) -> jax.Array:
        view = w.layer(i)
        if direction == "forward":
            return nf4_matmul(x, view)
        zeros = jnp.zeros((ROWS[route], k), x.dtype)
        return jax.vjp(lambda x: nf4_matmul(x, view), zeros)[1](x)[0]

    with use_kernels(route):
        result = gpu_compile(jax.jit(product), x, w, jax.ShapeDtypeStruct((), jnp.int32))
    instructions = parse(result.hlo).values()
    targets = [i.target for i in instructions if i.target and "nf4" in i.target]
    matmul = "qlora_jax_nf4_matmul" + ("_dx" if direction == "dx" else "")
    assert targets == ["qlora_jax_nf4_dequantize" if route == "dequantize" else matmul]
    assert not [i for i in instructions if i.opcode in ("copy", "copy-start", "dynamic-slice", "transpose")]
    dense = 2 * k * n if route == "dequantize" else 0
    partials = 64 * ROWS[route] * outputs * 4 if route != "dequantize" else 0  # where the contraction is split
    assert dense <= result.temp <= dense + partials + 8 * 2**20
    assert result.output == 2 * ROWS[route] * outputs


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(576, 1536, rngs=rngs, param_dtype=jnp.bfloat16)
        self.down = nnx.Linear(1536, 576, rngs=rngs, param_dtype=jnp.bfloat16)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.up(x)))


@pytest.mark.parametrize("route", ROWS)
def test_a_model_made_by_quantize_model(route: str, gpu_compile: Any) -> None:
    with use_layout("fragments"):
        model, _ = quantize_model(MLP(nnx.Rngs(0)), rank=8)
    graphdef, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((4, ROWS[route] // 4, 576), jnp.bfloat16)
    with use_kernels(route):
        result = gpu_compile(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)), state, x)
    instructions = parse(result.hlo).values()
    wanted = "qlora_jax_nf4_dequantize" if route == "dequantize" else "qlora_jax_nf4_matmul"
    assert [i.target for i in instructions if i.target and "nf4" in i.target] == [wanted] * 2
