"""A 4-bit layer and its adapter in one kernel on the CPU, and the adapter's gradients in tiles, against float64."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nf4 import dequantize, quantize, use_kernels
from qlora_jax.nf4.kernels import OUTER_PRODUCT_TARGET, cpu_computes_in_tiles
from qlora_jax.nn.adapted import adapted, frozen_base
from qlora_jax.nn.products import outer_product

tiles = pytest.mark.skipif(
    not cpu_computes_in_tiles(jnp.bfloat16),
    reason="this machine has no AMX; test_every_instruction_set runs these tests on a model of it",
)
# Relative Frobenius errors: results are rounded to the dtype, and so are x @ A and its gradient.
BOUNDS = {"float32": 4e-6, "bfloat16": 4e-3, "float16": 5e-4}
SCALING = 0.75


def operands(dtype, rank=5, in_features=128, out_features=72, rows=(2, 9)):
    rng = np.random.default_rng(rank + out_features)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    w = quantize(jnp.asarray(draw(in_features, out_features)))
    x, dy = (jnp.asarray(draw(*rows, n), dtype) for n in (in_features, out_features))
    return x, w, jnp.asarray(draw(in_features, rank)), jnp.asarray(draw(rank, out_features)), dy


def with_gradients(x, w, a, b, dy):
    y, pull_back = jax.vjp(lambda x, a, b: adapted(x, w, a, b, scaling=SCALING), x, a, b)
    return y, *pull_back(dy)


def exactly(x, w, a, b, dy):
    # A and B meet x in its dtype.
    a, b = (np.asarray(m.astype(x.dtype), np.float64) for m in (a, b))
    x, dy = (np.asarray(m, np.float64) for m in (x, dy))
    w = np.asarray(dequantize(w), np.float64)
    du = SCALING * dy @ b.T

    def rows(m):
        return m.reshape(-1, m.shape[-1])

    return (
        x @ w + SCALING * x @ a @ b,
        dy @ w.T + du @ a.T,
        rows(x).T @ rows(du),
        SCALING * rows(x @ a).T @ rows(dy),
    )


@pytest.mark.parametrize("kernels", ["ffi", "xla"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_values_and_gradients(dtype, kernels):
    given = operands(dtype)
    with use_kernels(kernels):
        results = jax.jit(with_gradients)(*given)
    x, _, a, b, _ = given
    for result, exact, like in zip(results, exactly(*given), (x, x, a, b), strict=True):
        assert result.dtype == like.dtype
        assert result.shape == exact.shape
        assert np.linalg.norm(np.asarray(result, np.float64) - exact) <= BOUNDS[dtype] * np.linalg.norm(exact)


def test_the_compiled_step_adds_nothing_of_the_results_size():
    x, w, a, b, _ = operands("bfloat16")
    with use_kernels("ffi"):
        text = jax.jit(lambda *t: adapted(*t, scaling=SCALING)).lower(x, w, a, b).as_text()
    assert "stablehlo.add" not in text
    assert text.count("@qlora_jax_nf4_matmul") == 1


def test_dropout_acts_on_the_adapters_input_alone():
    x, w, a, b, _ = operands("float32")
    key = jax.random.key(0)
    plain, dropped = (adapted(x, w, a, b, scaling=SCALING, dropout=0.5, key=k) for k in (None, key))
    base = adapted(x, w, a, 0 * b, scaling=SCALING, dropout=0.5, key=key)
    np.testing.assert_allclose(base, adapted(x, w, a, 0 * b, scaling=SCALING), atol=1e-5)
    assert not np.allclose(plain, dropped, atol=1e-2)


def test_a_numpy_scalar_scales_and_rank_0_adds_nothing():
    x, w, a, b, _ = operands("bfloat16")
    y = adapted(x, w, a, b, scaling=np.float32(SCALING))
    np.testing.assert_array_equal(y, adapted(x, w, a, b, scaling=SCALING))
    np.testing.assert_array_equal(adapted(x, w, a[:, :0], b[:0], scaling=1.0), frozen_base(x, w))


@pytest.mark.parametrize("mapped", [(0, None, None), (0, 0, 0), (None, 0, 0)])
def test_under_vmap(mapped):
    x, w, a, b, dy = operands("float32")
    stacked = [jnp.stack([m, 2 * m]) if axis == 0 else m for m, axis in zip((x, a, b), mapped, strict=True)]

    def one(x, a, b):
        return with_gradients(x, w, a, b, dy)

    results = jax.vmap(one, in_axes=mapped)(*stacked)
    for i in range(2):
        own = [m[i] if axis == 0 else m for m, axis in zip(stacked, mapped, strict=True)]
        for result, expected in zip(results, one(*own), strict=True):
            np.testing.assert_allclose(result[i], expected, atol=1e-5 * float(jnp.abs(expected).max()))


# Tiles are of 32 tokens by 32 features, 8 of them packed at once; tasks of 128 features.
@tiles
@pytest.mark.parametrize(
    ("tokens", "left", "right"), [(70, 40, 7), (513, 130, 33), (64, 16, 300), (5, 3, 3), (32, 1, 1)]
)
def test_outer_products_in_tiles(tokens, left, right):
    rng = np.random.default_rng(tokens)
    x, dy = (jnp.asarray(rng.standard_normal((tokens, n)), jnp.bfloat16) for n in (left, right))
    result = outer_product(x, dy, jnp.float32)
    exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    assert result.dtype == jnp.float32
    assert np.linalg.norm(np.asarray(result, np.float64) - exact) <= 1e-6 * np.linalg.norm(exact)
    assert "@" + OUTER_PRODUCT_TARGET in jax.jit(lambda *m: outer_product(*m, jnp.float32)).lower(x, dy).as_text()


@tiles
def test_no_tokens_give_zeros_and_wrong_operands_are_refused():
    x = jnp.zeros((0, 40), jnp.bfloat16)
    np.testing.assert_array_equal(outer_product(x, x[:, :4], jnp.float32), np.zeros((40, 4)))
    narrow, wide = jnp.zeros((8, 4), jnp.bfloat16), jnp.zeros((9, 40), jnp.bfloat16)
    call = jax.ffi.ffi_call(OUTER_PRODUCT_TARGET, jax.ShapeDtypeStruct((4, 40), jnp.float32))
    with pytest.raises(Exception, match="do not fit each other"):
        jax.block_until_ready(call(narrow, wide, features_first=np.int64(0)))


def test_every_instruction_set_multiplies_in_tiles():
    """Here too on machines without AMX, where a model of its tiles is the only one that runs this code."""
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "tiles and not every", __file__]
    done = subprocess.run(run, env=os.environ | {"QLORA_JAX_ISA": "amx_model"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
