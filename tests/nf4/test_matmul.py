"""nf4_matmul: numbers, the transformations of JAX, memory, refusals. Every test runs on each kind of kernels.

"per-platform" are the compiled kernels again, in programs that are traced for CUDA as well.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qlora_jax.nf4 import dequantize, kernel_report, nf4_matmul, quantize, use_kernels
from qlora_jax.nf4 import kernels as kernels_module
from qlora_jax.nf4.kernels import chosen_kernels

# Design table: relative Frobenius error against float64 over the dequantized weight, outputs of >= 4096 elements.
BOUNDS = {"bfloat16": 1.8e-3, "float16": 2.3e-4, "float32": 2e-6}
# (in, out): aligned, the shapes of SmolLM2, and ragged ones whose blocks straddle rows.
SHAPES = [(64, 64), (576, 192), (1536, 576), (50, 33), (100, 7)]


@pytest.fixture(autouse=True, params=["xla", "ffi", "per-platform"])
def kernels(request, monkeypatch):
    if request.param == "per-platform":
        request.getfixturevalue("cuda_loaded")
    else:
        monkeypatch.setitem(kernels_module._REPORT, "cuda", "not built")
    choice = "xla" if request.param == "xla" else "ffi"
    with use_kernels(choice):
        yield choice


def normal(*shape: int, dtype: str = "bfloat16", seed: int = 0, scale: float = 1.0) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)
    return jnp.asarray(values.astype(dtype))


def weight(*shape: int, **options) -> object:
    return quantize(normal(*shape, seed=7, scale=0.05), **options)


def relative_error(value: jax.Array, reference: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(value, np.float64) - reference) / np.linalg.norm(reference))


def test_the_compiled_kernels_are_there():
    assert kernel_report()["cpu"] == "loaded"


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradient_against_float64(shape, dtype, double_quant):
    w = weight(*shape, double_quant=double_quant)
    rows = -(-4096 // min(shape))
    x, dy = normal(rows, shape[0], dtype=dtype, seed=1), normal(rows, shape[1], dtype=dtype, seed=2)
    y, pullback = jax.vjp(lambda x: nf4_matmul(x, w), x)
    (dx,) = pullback(dy)
    dense = np.asarray(dequantize(w).astype(dtype), np.float64)
    assert y.dtype == dx.dtype == dtype
    assert relative_error(y, np.asarray(x, np.float64) @ dense) <= BOUNDS[dtype]
    assert relative_error(dx, np.asarray(dy, np.float64) @ dense.T) <= BOUNDS[dtype]


def test_weights_round_to_their_own_dtype_first():
    """A bfloat16 checkpoint multiplies as bfloat16 weights, also with float32 activations."""
    w = weight(64, 64)
    y = nf4_matmul(jnp.eye(64), w)
    np.testing.assert_array_equal(y, dequantize(w, jnp.float32))
    assert (dequantize(w, jnp.float32) != dequantize(w.__class__(**{**vars(w), "dtype": "float32"}))).any()


def test_leading_dimensions_and_single_vectors():
    w = weight(64, 48)
    x = normal(2, 3, 64)
    y = nf4_matmul(x, w)
    assert y.shape == (2, 3, 48)
    assert nf4_matmul(x[0, 0], w).shape == (48,)
    assert nf4_matmul(x[:, :0], w).shape == (2, 0, 48)


def test_one_result_bit_for_bit_eager_jit_scan_and_layer_view():
    kernel = normal(3, 128, 96, seed=7, scale=0.05)
    stack, x = quantize(kernel), normal(5, 128)
    separate = [quantize(kernel[i]) for i in range(3)]
    expected = np.stack([np.asarray(nf4_matmul(x, w)) for w in separate])
    product = lambda x, i: nf4_matmul(x, stack.layer(i))  # noqa: E731
    views = np.stack([np.asarray(product(x, i)) for i in range(3)])
    jitted = np.stack([np.asarray(jax.jit(product)(x, i)) for i in range(3)])
    _, scanned = jax.lax.scan(lambda carry, i: (carry, product(x, i)), 0, jnp.arange(3))
    for result in (views, jitted, np.asarray(scanned)):
        np.testing.assert_array_equal(result, expected)


def test_gradients_inside_scan_with_remat_equal_the_plain_chain():
    stack = quantize(normal(4, 64, 64, seed=7, scale=0.1))
    x = normal(3, 64, dtype="float32")

    def scanned(x):
        layer = jax.checkpoint(lambda h, i: (jnp.tanh(nf4_matmul(h, stack.layer(i))), None), prevent_cse=False)
        return jax.lax.scan(layer, x, jnp.arange(4))[0].sum()

    def plain(x):
        for i in range(4):
            x = jnp.tanh(x @ dequantize(stack.layer(i), jnp.float32))
        return x.sum()

    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(x), jax.grad(plain)(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.vmap(f),
        lambda f: jax.vmap(jax.vmap(f)),
        lambda f: jax.jit(jax.vmap(jax.vmap(f), in_axes=1, out_axes=1)),
    ],
    ids=["vmap", "nested", "other-axis"],
)
def test_vmap_over_x_and_its_gradient(transform):
    w = weight(64, 32)
    x = normal(2, 3, 4, 64, dtype="float32")
    np.testing.assert_allclose(transform(lambda x: nf4_matmul(x, w))(x), nf4_matmul(x, w), rtol=1e-5, atol=1e-5)
    total = lambda x: transform(lambda x: nf4_matmul(x, w))(x).sum()  # noqa: E731
    expected = jax.grad(lambda x: nf4_matmul(x, w).sum())(x)
    np.testing.assert_allclose(jax.grad(total)(x), expected, rtol=1e-5, atol=1e-5)
    inner = transform(jax.grad(lambda x: nf4_matmul(x, w).sum()))(x)
    np.testing.assert_allclose(inner, expected, rtol=1e-5, atol=1e-5)


def test_a_mapped_x_makes_one_call_that_reads_the_weight_once(kernels):
    w = weight(64, 32)
    text = jax.jit(jax.vmap(lambda x: nf4_matmul(x, w))).lower(normal(5, 4, 64)).as_text()
    assert text.count("custom_call @qlora_jax_nf4_matmul") == (kernels == "ffi")
    assert text.count("stablehlo.dot_general") == (kernels == "xla")
    assert "while" not in text


@pytest.mark.parametrize("axes", [(None, 0), (0, 0)], ids=["weight", "both"])
def test_vmap_over_the_weights(axes):
    kernel = normal(3, 64, 32, seed=7, scale=0.1)
    stack, x = quantize(kernel), normal(3, 4, 64, dtype="float32")
    x = x if axes[0] == 0 else x[0]
    y = jax.jit(jax.vmap(nf4_matmul, in_axes=axes))(x, stack)
    for i in range(3):
        x_i = x[i] if axes[0] == 0 else x
        np.testing.assert_allclose(y[i], nf4_matmul(x_i, stack.layer(i)), rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda x: jax.vmap(nf4_matmul, in_axes=axes)(x, stack).sum())(x)
    assert gradient.shape == x.shape


def test_vmap_over_layer_views():
    stack, x = quantize(normal(3, 64, 32, seed=7, scale=0.1)), normal(4, 64)
    y = jax.vmap(lambda i: nf4_matmul(x, stack.layer(i)))(jnp.arange(3))
    np.testing.assert_array_equal(y[2], nf4_matmul(x, stack.layer(2)))


@pytest.mark.parametrize("split", ["out", "in"])
def test_shards_decode_the_scale_groups_of_the_whole(split):
    """576 x 192 has 9 blocks a row, so groups of 256 scales begin inside rows and inside shards."""
    w = weight(768, 320)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal(8, 768, dtype="float32")

    def local(x, w):
        index = jax.lax.axis_index("x")
        if split == "out":
            return nf4_matmul(x, w.shard(index * 80, 0))
        return jax.lax.psum(nf4_matmul(x, w.shard(0, index * 3)), "x")

    cut = P("x", None) if split == "out" else P(None, "x")
    specs = w.__class__(packed=cut, absmax=cut, absmax_scale=P(), absmax_offset=P(), shape=w.shape)
    x_spec, y_spec = (P(), P(None, "x")) if split == "out" else (P(None, "x"), P())
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(x_spec, specs), out_specs=y_spec)
    np.testing.assert_allclose(jax.jit(sharded)(x, w), nf4_matmul(x, w), rtol=2e-5, atol=2e-5)
    gradient = jax.jit(jax.grad(lambda x: (sharded(x, w) ** 2).sum()))(x)
    expected = jax.grad(lambda x: (nf4_matmul(x, w) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3)


def test_rows_sharded_over_devices_under_vmap_and_grad():
    w = weight(64, 32)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal(8, 2, 64, dtype="float32")
    gradient = jax.vmap(jax.grad(lambda x: jnp.tanh(nf4_matmul(x, w)).sum()))
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    np.testing.assert_allclose(jax.jit(sharded)(x), gradient(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", [True, False])
def test_gradient_memory_does_not_grow_by_dense_layers(remat, kernels):
    """Design table: slope of temp memory over the number of layers < 5 % of one dense layer, remat on.

    Without remat each layer also keeps its own input, x, as any layer does.
    """
    width, rows = 1024, 16

    def temp_bytes(layers: int) -> int:
        stack = quantize(jnp.full((layers, width, width), 0.01, jnp.bfloat16))

        def loss(x, stack):
            def layer(h, i):
                return jnp.tanh(nf4_matmul(h, stack.layer(i))), None

            layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
            return jax.lax.scan(layer, x, jnp.arange(layers))[0].sum()

        compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((rows, width)), stack).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    dense_layer, kept_per_layer = width * width * 4, (1 if remat else 3) * rows * width * 4
    slope = (temp_bytes(12) - temp_bytes(4)) / 8
    assert slope <= kept_per_layer + 0.01 * dense_layer
    assert not remat or slope < 0.05 * dense_layer


@pytest.mark.parametrize(
    ("x", "w", "error", "message"),
    [
        (np.zeros((2, 64), np.int32), weight(64, 32), TypeError, "got int32"),
        (np.zeros((2, 60), np.float32), weight(64, 32), ValueError, r"\(2, 60\).*in=64, out=32"),
        (np.float32(1), weight(64, 32), ValueError, r"shape \(\)"),
        (np.zeros((2, 64), np.float32), np.zeros((64, 32)), TypeError, "got ndarray"),
        (np.zeros((2, 64), np.float32), weight(3, 64, 32), ValueError, "stack of 3 layers"),
    ],
)
def test_refusals_name_what_was_given(x, w, error, message):
    with pytest.raises(error, match=message):
        nf4_matmul(x, w)


def test_the_weight_has_no_gradient():
    w = weight(64, 32)
    gradient = jax.grad(lambda x, w: nf4_matmul(x, w).sum(), argnums=(0, 1), allow_int=True)(jnp.ones((2, 64)), w)[1]
    assert gradient.packed.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(gradient.absmax_scale, np.zeros_like(w.absmax_scale))


def test_the_environment_variable_chooses_and_is_checked(monkeypatch, kernels):
    assert chosen_kernels() == kernels
    from qlora_jax.nf4 import kernels as module

    with module._override(None):
        monkeypatch.setenv("QLORA_JAX_KERNELS", "xla")
        assert chosen_kernels() == "xla"
        monkeypatch.setenv("QLORA_JAX_KERNELS", "cuda")
        with pytest.raises(
            ValueError, match=r"QLORA_JAX_KERNELS must be one of auto, ffi, xla, skinny, tile, dequantize, got 'cuda'"
        ):
            chosen_kernels()
    with pytest.raises(ValueError, match="got 'fast'"), use_kernels("fast"):
        pass


def test_missing_kernels_say_why(monkeypatch, kernels):
    from qlora_jax.nf4 import kernels as module

    monkeypatch.setitem(module._REPORT, "cpu", "not loaded: No module named '_cpu'")
    with use_kernels("auto"):
        assert chosen_kernels() == "xla"
    if kernels == "ffi":
        with pytest.raises(RuntimeError, match="No module named '_cpu'"):
            chosen_kernels()


def test_each_choice_is_traced_apart():
    """JAX caches traces by function and shapes: the kernels chosen first must not stick."""
    w, x = weight(64, 32), normal(4, 64)
    gradient = jax.jit(lambda x: jax.vjp(lambda x: nf4_matmul(x, w), x)[1](x[:, :32]))
    for choice, compiled_kernels in [("xla", False), ("ffi", True), ("xla", False)]:
        with use_kernels(choice):
            assert ("@qlora_jax_nf4_matmul" in gradient.lower(x).as_text()) == compiled_kernels


def test_jit_once_for_every_layer():
    stack, x = quantize(normal(3, 64, 32, seed=7)), normal(2, 64)
    calls = jax.jit(functools.partial(lambda x, w, i: nf4_matmul(x, w.layer(i))))
    for i in range(3):
        calls(x, stack, i)
    assert calls._cache_size() == 1
