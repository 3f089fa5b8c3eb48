"""Modules on a GPU, without one: the layout their weights get, and the program that is lowered for CUDA."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from qlora_jax import linen, nf4_dense, quantize, quantize_model, scan_layers
from qlora_jax.nf4 import kernels, use_kernels, use_layout


@pytest.fixture
def cuda_loaded(monkeypatch):
    """As if the CUDA kernels were loaded. JAX's caches do not know of it, hence the clearing."""
    monkeypatch.setitem(kernels._REPORT, "cuda", "loaded")
    monkeypatch.delenv("QLORA_JAX_COMPUTE_CAPABILITY", raising=False)
    jax.clear_caches()
    yield
    jax.clear_caches()


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> jax.Array:
    return (0.05 * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def adapted(kernel: jax.Array, **options) -> nf4_dense:
    dense = nf4_dense.from_kernel(kernel, rank=4, rngs=nnx.Rngs(0), **options)
    dense.lora_b.set_value(normal(*dense.lora_b.get_value().shape, seed=3))
    return dense


def test_every_door_repacks_what_it_freezes():
    kernel = normal(128, 70)
    expected = quantize(kernel).to_layout("fragments").packed
    with use_layout("fragments"):
        linear = nnx.Linear(128, 70, kernel_init=lambda *_: kernel, rngs=nnx.Rngs(0))
        model, report = quantize_model(nnx.Sequential(linear, nnx.relu))
        variables = linen.from_params({"a": {"kernel": kernel}})
        initialized = linen.nf4_dense(70, kernel_init=lambda *_: kernel).init(jax.random.key(0), jnp.ones((1, 128)))
        made = {
            "from_linear": nf4_dense.from_linear(linear).kernel.get_value(),
            "from_kernel": nf4_dense.from_kernel(kernel).kernel.get_value(),
            "from_kernel, quantized": nf4_dense.from_kernel(quantize(kernel)).kernel.get_value(),
            "constructor": nf4_dense(128, 70, kernel_init=lambda *_: kernel, rngs=nnx.Rngs(0)).kernel.get_value(),
            "quantize_model": model.layers[0].kernel.get_value(),
            "linen.from_params": variables["nf4"]["a"]["kernel"],
            "linen init": initialized["nf4"]["kernel"],
        }
        ragged = nf4_dense.from_kernel(normal(50, 33)).kernel.get_value()
    for name, w in made.items():
        assert w.layout == "fragments", name
        np.testing.assert_array_equal(w.packed, expected, err_msg=name)
    assert ragged.layout == "rows"
    assert report.swapped["layers.0"].packed_bytes == made["quantize_model"].nbytes
    assert quantize(kernel).layout == "rows"


def test_a_scanned_stack_computes_the_same_from_fragments():
    kernel, x = normal(3, 64, 64), normal(5, 64, seed=1)

    def run(dense):
        graphdef, lora, frozen = nnx.split(dense, nnx.LoRAParam, ...)
        loss = lambda lora, x: scan_layers(nnx.merge(graphdef, lora, frozen), x).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(lora, x)

    rows = run(adapted(kernel))
    with use_layout("fragments"):
        dense = adapted(kernel)
    assert dense.kernel.get_value().num_layers == 3
    for left, right in zip(jax.tree.leaves(rows), jax.tree.leaves(run(dense)), strict=True):
        np.testing.assert_array_equal(left, right)


def step(dense):
    """Value and gradients of a layer as a function of (x, dy); the adapter is a constant but its gradient is made."""
    graphdef, lora, frozen = nnx.split(dense, nnx.LoRAParam, ...)

    def run(x, dy):
        y, pullback = jax.vjp(lambda lora, x: nnx.merge(graphdef, lora, frozen)(x), lora, x)
        return y, *pullback(dy)

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_the_cpu_computes_the_same_bits_with_cuda_kernels_loaded(request, dtype, quant_type):
    dense = adapted(normal(128, 70), alpha=3.0, quant_type=quant_type)
    x, dy = normal(2, 5, 128, dtype=dtype, seed=1), normal(2, 5, 70, dtype=dtype, seed=2)
    plain = jax.jit(step(dense))(x, dy)
    request.getfixturevalue("cuda_loaded")
    for left, right in zip(jax.tree.leaves(plain), jax.tree.leaves(jax.jit(step(dense))(x, dy)), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(("quant_type", "kernels"), [("nf4", "dequantize"), ("nf4", "tile"), (None, "auto")])
def test_an_adapters_product_can_ride_on_the_frozen_one(cuda_loaded, quant_type, kernels):
    """Both terms of the sum are bfloat16 as they leave their products, and the scale is in the smallest operand."""
    with use_layout("fragments"):
        dense = adapted(normal(128, 192), quant_type=quant_type)
    x, dy = (jax.ShapeDtypeStruct((2, 300, features), jnp.bfloat16) for features in (128, 192))
    with use_kernels(kernels):
        text = jax.jit(step(dense)).trace(x, dy).lower(lowering_platforms=("cuda",)).as_text()
    # Nothing as large as y or dx is ever float32, cast or scaled ...
    assert not re.findall(r"tensor<(?:600|2x300)x(?:128|192)xf32>", text)
    assert not re.findall(r"stablehlo\.(?:multiply|convert) .*tensor<2x300x(?:128|192)xbf16>", text)
    assert len(re.findall(r"stablehlo\.multiply .*tensor<2x300x4xbf16>", text)) == 2
    # ... and each is added once, the frozen product's first, in y as in dx: XLA then lets the larger one do the sum.
    main = text[: text.index("func.func private")] if "func.func private" in text else text
    for features in (192, 128):
        ((frozen, branch),) = re.findall(rf"stablehlo\.add (%\w+), (%\w+) : tensor<2x300x{features}xbf16>", main)
        if quant_type is not None:
            assert re.search(rf"{frozen} = stablehlo\.reshape %\d+ : \(tensor<600x{features}xbf16>\)", main)
        assert re.search(rf"{branch} = \"stablehlo\.case\"", main)
    # An adapter's gradients are summed and kept in float32.
    assert len(re.findall(r"dot_general .*-> tensor<(?:128x4|4x192)xf32>", text)) == 2


def test_float32_products_are_never_tf32(cuda_loaded):
    with use_layout("fragments"):
        dense = adapted(normal(128, 192))
    x, dy = (jax.ShapeDtypeStruct((300, features), jnp.float32) for features in (128, 192))
    text = jax.jit(step(dense)).trace(x, dy).lower(lowering_platforms=("cuda",)).as_text()
    dots = re.findall(r"dot_general .*", text)
    assert len(dots) >= 7
    assert all("precision = [HIGHEST, HIGHEST]" in dot for dot in dots)


def test_linen_and_nnx_lower_to_the_same_products(cuda_loaded):
    kernel = normal(128, 192)
    with use_layout("fragments"):
        variables = linen.from_params({"kernel": kernel}, rank=4)
        dense = adapted(kernel)
    x = jax.ShapeDtypeStruct((2, 300, 128), jnp.bfloat16)
    ours = jax.jit(linen.nf4_dense(192, rank=4).apply).trace(variables, x)
    theirs = jax.jit(dense).trace(x)
    kinds = [
        re.findall(
            r"stablehlo\.(dot_general|custom_call|add|multiply)", traced.lower(lowering_platforms=("cuda",)).as_text()
        )
        for traced in (ours, theirs)
    ]
    assert sorted(kinds[0]) == sorted(kinds[1])
    assert isinstance(linen.nf4_dense(192), nn.Module)
