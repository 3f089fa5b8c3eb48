"""The 4-bit types beside NF4: what codes stand for, which code a weight takes, and who multiplies them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.nf4 import (
    choose_route,
    dequantize,
    device_layout,
    kernel_report,
    nf4_matmul,
    place,
    quantize,
    use_kernels,
)
from qlora_jax.nf4.codebook import BLOCK_SIZES, CODEBOOKS
from qlora_jax.nf4.dispatch import cuda_route, why_not_fused

OTHERS = [name for name in CODEBOOKS if name != "nf4"]
# Relative mean squared error on N(0, 1), blocks of 64, float32 scales.
GAUSSIAN_ERROR = {"nf4": 0.00845, "fp4": 0.0149, "int4": 0.0116, "e2m1": 0.0112, "e3m0": 0.0354}


def normal(*shape: int, dtype: str = "bfloat16", seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def codes_of(w) -> np.ndarray:
    packed = np.ravel(w.packed)
    return np.stack([packed >> 4, packed & 15], -1).reshape(-1)


def test_values_are_those_of_the_definitions():
    def positive(name):
        return np.unique(np.abs(CODEBOOKS[name].values))

    np.testing.assert_allclose(positive("fp4"), np.array([0, 1 / 16, 2, 3, 4, 6, 8, 12]) / 12, rtol=1e-7)
    np.testing.assert_allclose(positive("int4"), np.arange(9) / 7, rtol=1e-7)
    np.testing.assert_allclose(positive("e2m1"), np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6, rtol=1e-7)
    np.testing.assert_array_equal(positive("e3m0"), [0, *(2.0**e for e in range(-6, 1))])
    assert CODEBOOKS["int4"].values[8] == 0.0


def test_e2m1_bits_are_the_minifloat_of_ocp():
    import ml_dtypes

    stored = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(CODEBOOKS["e2m1"].values, stored / np.float32(6))


@settings(max_examples=15, deadline=None)
@given(
    quant_type=st.sampled_from(list(CODEBOOKS)),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 40)),
    block_size=st.sampled_from(BLOCK_SIZES),
    seed=st.integers(0, 2**31 - 1),
)
def test_each_weight_takes_the_nearest_value(quant_type, shape, block_size, seed):
    kernel = normal(*shape, dtype="float32", seed=seed)
    w = quantize(kernel, quant_type, block_size, double_quant=False)
    flat = np.asarray(kernel).T.reshape(-1)
    starts = np.arange(0, flat.size, block_size)
    absmax = np.maximum.reduceat(np.abs(flat), starts)
    np.testing.assert_array_equal(np.ravel(w.absmax), absmax)
    normalized = flat / absmax.repeat(block_size)[: flat.size]
    values = CODEBOOKS[quant_type].values
    chosen = values[codes_of(w)[: flat.size]]
    best = np.abs(values[None, :] - normalized[:, None]).min(axis=1)
    # FP4's thresholds are not quite midpoints.
    np.testing.assert_allclose(np.abs(chosen - normalized), best, atol=3e-6, rtol=0)
    decoded = np.asarray(dequantize(w)).T.reshape(-1)
    np.testing.assert_array_equal(decoded, chosen * absmax.repeat(block_size)[: flat.size])


@pytest.mark.parametrize("quant_type", CODEBOOKS)
def test_error_on_gaussian_weights(quant_type):
    kernel = normal(1024, 512, dtype="float32")
    plain, double = (
        float(jnp.mean((dequantize(quantize(kernel, quant_type, double_quant=dq)) - kernel) ** 2))
        for dq in (False, True)
    )
    assert plain / float(jnp.mean(kernel**2)) == pytest.approx(GAUSSIAN_ERROR[quant_type], rel=0.01)
    assert double == pytest.approx(plain, rel=0.003)


@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_zero_blocks_are_exact_zeros_and_extremes_are_kept(quant_type, double_quant):
    kernel = jnp.zeros((65, 8), jnp.float32).at[3, 3].set(-0.5).at[4, 3].set(0.5)
    w = quantize(kernel, quant_type, double_quant=double_quant)
    values = np.asarray(dequantize(w))
    assert np.count_nonzero(values) == 2
    np.testing.assert_allclose(values[3:5, 3], [-0.5, 0.5], rtol=0.01)


@pytest.mark.parametrize("quant_type", OTHERS)
@pytest.mark.parametrize("shape", [(128, 96), (50, 33)])
def test_products_and_gradients_are_those_of_the_dense_weight(quant_type, shape):
    x, kernel = normal(5, shape[0], dtype="float32"), normal(3, *shape, seed=1)
    stack = quantize(kernel, quant_type)

    @jax.jit
    def forward_and_back(x, layer):
        y, pull = jax.vjp(lambda x: nf4_matmul(x, stack.layer(layer)), x)
        return y, *pull(y)

    for layer, dense in enumerate(np.asarray(dequantize(stack), np.float64)):
        y, dx = forward_and_back(x, layer)
        np.testing.assert_allclose(y, np.asarray(x, np.float64) @ dense, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dx, np.asarray(y, np.float64) @ dense.T, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quant_type", CODEBOOKS)
def test_weights_are_rounded_inside_a_larger_program_too(quant_type, dtype):
    """XLA is free to drop a cast to 16 bits between float32 operations: jax 0.10's CPU compiler does."""
    w = quantize(normal(256, 128, dtype=dtype), quant_type=quant_type)
    with use_kernels("xla"):
        sums = jax.jit(lambda w: dequantize(w).astype(jnp.float32).sum(0))(w)
    expected = np.asarray(dequantize(w)).astype(np.float64).sum(0)
    np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quant_type", OTHERS)
def test_the_layout_changes_no_value(quant_type):
    w = quantize(normal(192, 100), quant_type, layout="fragments")
    np.testing.assert_array_equal(dequantize(w), dequantize(quantize(normal(192, 100), quant_type)))
    np.testing.assert_array_equal(w.to_layout("rows").packed, quantize(normal(192, 100), quant_type).packed)


def test_compiled_kernels_know_nf4_alone():
    assert kernel_report()["cpu"] == "loaded"
    x, w = normal(2, 128), quantize(normal(128, 64), "fp4")
    with use_kernels("xla"):
        expected = nf4_matmul(x, w)
    np.testing.assert_array_equal(nf4_matmul(x, w), expected)
    for choice in ("ffi", "skinny", "dequantize"):
        with (
            use_kernels(choice),
            pytest.raises(RuntimeError, match=f"'{choice}' .*use_kernels.* is 'fp4', .* nf4 alone"),
        ):
            nf4_matmul(x, w)


def test_programs_for_cuda_call_no_kernel_for_them(for_cuda, monkeypatch):
    x, w = normal(2, 128), quantize(normal(2, 128, 64), "e2m1")
    for program in (for_cuda(nf4_matmul, x, w.layer(1)), for_cuda(dequantize, w)):
        assert "custom_call" not in program or "qlora_jax" not in program
    nf4 = quantize(normal(2, 128, 64))
    assert "qlora_jax" in for_cuda(nf4_matmul, x, nf4.layer(1))
    assert device_layout((128, 64), 64, "cuda") == "fragments"
    assert device_layout((128, 64), 64, "cuda", "e2m1") == "rows"
    assert place(w) is w


def test_routes_on_cuda(cuda_loaded):
    w = quantize(normal(128, 64), "int4", layout="fragments")
    assert "'int4'" in why_not_fused(w, "bfloat16")
    assert choose_route(1, w, "bfloat16", input_gradient=False, compute_capability="9.0") == "xla"
    assert cuda_route(1, w, "bfloat16", input_gradient=False) == "xla"
    for choice in ("ffi", "dequantize", "tile"):
        with use_kernels(choice), pytest.raises(RuntimeError, match="'int4'"):
            cuda_route(1, w, "bfloat16", input_gradient=True)


@pytest.mark.parametrize(
    ("given", "nearest"), [("fp5", "fp4"), ("NF4", "nf4"), ("int8", "int4"), ("e2m", "e2m1"), ("e3mo", "e3m0")]
)
def test_an_unknown_type_gets_the_nearest_name(given, nearest):
    with pytest.raises(ValueError, match=f"nf4, fp4, int4, e2m1, e3m0, got '{given}'; did you mean '{nearest}'"):
        quantize(np.zeros((64, 4), np.float32), given)
