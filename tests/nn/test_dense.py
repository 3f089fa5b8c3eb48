"""nf4_dense: how it comes to be, what it computes, what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax import NF4Tensor, dequantize, nf4_dense, quantize
from qlora_jax.errors import UserError
from qlora_jax.nn import FrozenParam, NF4Param

KEY = jax.random.key(7)


def kernel(*shape: int, dtype: str = "float32") -> jax.Array:
    return (0.02 * jax.random.normal(KEY, shape)).astype(dtype)


def inputs(*shape: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape).astype(dtype)


def exact(dense: nf4_dense, x: jax.Array) -> np.ndarray:
    """The formula in float64 over the weights as they are stored: x W + bias + alpha/r (x A) B."""
    x64 = np.asarray(x, np.float64)
    w = dense.kernel.get_value()
    y = x64 @ np.asarray(dequantize(w) if isinstance(w, NF4Tensor) else w, np.float64)
    if dense.bias is not None:
        y = y + np.asarray(dense.bias.get_value(), np.float64)
    if dense.rank:
        a, b = (np.asarray(p.get_value(), np.float64) for p in (dense.lora_a, dense.lora_b))
        y = y + dense.alpha / dense.rank * (x64 @ a) @ b
    return y


def with_random_b(dense: nf4_dense, size: float = 0.1) -> nf4_dense:
    dense.lora_b.set_value(size * jax.random.normal(jax.random.key(3), dense.lora_b.get_value().shape))
    return dense


def relative(y: jax.Array, reference: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("use_bias", [False, True])
def test_init_makes_the_kernel_of_nnx_linear(use_bias):
    ours = nf4_dense(128, 48, use_bias=use_bias, rank=4, rngs=nnx.Rngs(5))
    linear = nnx.Linear(128, 48, use_bias=use_bias, rngs=nnx.Rngs(5))
    theirs = nf4_dense.from_linear(linear, rank=4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(ours.kernel.get_value().packed, theirs.kernel.get_value().packed)
    assert ours.kernel.get_value().shape == (128, 48)
    assert (ours.bias is None) == (not use_bias)


def test_from_linear_quantizes_the_kernel_keeps_the_bias_and_leaves_the_linear_alone():
    linear = nnx.Linear(128, 48, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, bias_init=nnx.initializers.normal())
    before = jnp.array(linear.kernel.get_value())
    dense = nf4_dense.from_linear(linear, rank=4, rngs=nnx.Rngs(0))
    expected = quantize(before)
    np.testing.assert_array_equal(dense.kernel.get_value().packed, expected.packed)
    np.testing.assert_array_equal(dense.kernel.get_value().absmax, expected.absmax)
    np.testing.assert_array_equal(dense.bias.get_value(), linear.bias.get_value())
    np.testing.assert_array_equal(linear.kernel.get_value(), before)
    assert type(linear.kernel) is nnx.Param
    assert dense.dtype == jnp.bfloat16
    assert dense(inputs(2, 128)).dtype == jnp.bfloat16


def test_from_kernel_takes_quantized_weights_as_they_are():
    w = quantize(kernel(64, 32, dtype="bfloat16"), block_size=32, double_quant=False)
    dense = nf4_dense.from_kernel(w, bias=jnp.ones(32))
    assert dense.kernel.get_value().packed is w.packed
    assert dense.kernel.get_value().block_size == 32
    assert (dense.in_features, dense.out_features, dense.rank) == (64, 32, 0)


def test_quant_type_none_keeps_a_dense_frozen_kernel():
    dense = nf4_dense.from_kernel(kernel(64, 32, dtype="bfloat16"), quant_type=None, rank=4, rngs=nnx.Rngs(0))
    assert type(dense.kernel) is FrozenParam
    x = inputs(6, 64)
    assert relative(with_random_b(dense)(x), exact(dense, x)) < 2e-6
    dx = jax.grad(lambda x: dense(x).sum())(x)
    dense_weight = np.asarray(dense.kernel.get_value(), np.float64)
    a, b = (np.asarray(p.get_value(), np.float64) for p in (dense.lora_a, dense.lora_b))
    assert relative(dx, np.ones((6, 32)) @ (dense_weight + dense.scaling * a @ b).T) < 2e-6


def test_the_kinds_of_leaves_say_what_is_frozen():
    made = nf4_dense(64, 32, rank=4, use_bias=True, rngs=nnx.Rngs(0))
    taken = nf4_dense.from_linear(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), rank=4, rngs=nnx.Rngs(0))
    for dense in (made, taken):
        check_kinds(dense)


def check_kinds(dense):
    assert type(dense.kernel) is NF4Param
    assert type(dense.bias) is FrozenParam
    assert type(dense.lora_a) is type(dense.lora_b) is nnx.LoRAParam
    # Nothing but the adapter is an nnx.Param, so `wrt=nnx.Param` cannot reach integer leaves or the bias.
    assert {path[-1] for path, _ in nnx.to_flat_state(nnx.state(dense, nnx.Param))} == {"lora_a", "lora_b"}
    assert dense.lora_a.get_value().dtype == dense.lora_b.get_value().dtype == jnp.float32


def test_no_random_state_is_stored():
    dense = nf4_dense(64, 32, rank=4, dropout=0.5, rngs=nnx.Rngs(0))
    assert not nnx.to_flat_state(nnx.state(dense, nnx.RngState))


def test_an_adapted_layer_starts_as_its_base():
    base = nf4_dense.from_kernel(kernel(128, 64))
    adapted = nf4_dense.from_kernel(base.kernel.get_value(), rank=8, rngs=nnx.Rngs(0))
    x = inputs(5, 128)
    np.testing.assert_array_equal(base(x), adapted(x))
    np.testing.assert_array_equal(adapted.lora_b.get_value(), 0)


def test_a_starts_as_pefts_kaiming_uniform():
    a = np.asarray(nf4_dense(256, 64, rank=64, rngs=nnx.Rngs(0)).lora_a.get_value())
    bound = 1 / np.sqrt(256)
    assert np.abs(a).max() <= bound
    assert np.abs(a).max() > 0.99 * bound
    assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)


# Design table: 2e-6 float32, 1.8e-3 bfloat16, 2.3e-4 float16, for one rounding; here the sum of base and adapter is
# rounded once more, and the adapter's own path (x A, then times B) twice, at a tenth of the base's size.
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 2 * 1.8e-3), ("float16", 2 * 2.3e-4)])
def test_lora_agrees_with_the_formula_in_float64(dtype, bound):
    dense = nf4_dense.from_kernel(
        kernel(256, 128, dtype="bfloat16"), bias=kernel(128), rank=8, alpha=24.0, rngs=nnx.Rngs(0)
    )
    with_random_b(dense, 0.006)
    x = inputs(3, 16, 256, dtype=dtype)
    y = dense(x)
    assert y.dtype == dtype
    assert y.shape == (3, 16, 128)
    assert relative(y, exact(dense, x)) < bound
    # The adapter is a visible part of that: without it the same check fails.
    reference = exact(dense, x)
    dense.lora_b.set_value(jnp.zeros_like(dense.lora_b.get_value()))
    assert relative(dense(x), reference) > 10 * bound


def test_bfloat16_products_are_summed_in_float32():
    # 1 + 4096 terms of 2^-9: a bfloat16 sum would stay at 1; the float32 sum is 9.
    dense = nf4_dense.from_kernel(jnp.zeros((4096, 64)), rank=1, alpha=1.0, rngs=nnx.Rngs(0))
    dense.lora_a.set_value(jnp.full((4096, 1), 2.0**-9).at[0].set(1.0))
    dense.lora_b.set_value(jnp.ones((1, 64)))
    y = dense(jnp.ones((1, 4096), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(y, np.float32), 9.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_gradients_agree_with_float64_and_are_float32(dtype):
    dense = with_random_b(nf4_dense.from_kernel(kernel(128, 64), rank=4, alpha=8.0, rngs=nnx.Rngs(0)))
    x = inputs(2, 32, 128, dtype=dtype)
    graphdef, lora, frozen = nnx.split(dense, nnx.LoRAParam, ...)
    dy = inputs(2, 32, 64, dtype=dtype)
    grads = jax.grad(lambda lora: jnp.vdot(nnx.merge(graphdef, lora, frozen)(x).astype(jnp.float32), dy))(lora)
    a, b = (np.asarray(p.get_value(), np.float64) for p in (dense.lora_a, dense.lora_b))
    x64, dy64 = (np.asarray(v, np.float64).reshape(64, -1) for v in (x, dy))
    expected = {"lora_a": 2 * x64.T @ (dy64 @ b.T), "lora_b": 2 * (x64 @ a).T @ dy64}
    for name, reference in expected.items():
        gradient = grads[name].get_value()
        assert gradient.dtype == jnp.float32
        assert relative(gradient, reference) < {"float32": 2e-6, "bfloat16": 4e-3}[dtype]
    if dtype == "bfloat16":  # Not rounded to bfloat16 on its way.
        gradient = grads["lora_a"].get_value()
        assert bool((gradient.astype(jnp.bfloat16).astype(jnp.float32) != gradient).any())


def test_dropout_acts_on_the_adapters_input_alone():
    dense = with_random_b(nf4_dense.from_kernel(kernel(512, 64), rank=4, dropout=0.25, rngs=nnx.Rngs(0)))
    x = inputs(8, 512)
    key = jax.random.key(11)
    base = np.asarray(nf4_dense.from_kernel(dense.kernel.get_value())(x), np.float64)
    a, b = (np.asarray(p.get_value(), np.float64) for p in (dense.lora_a, dense.lora_b))
    mask = np.asarray(jax.random.bernoulli(key, 0.75, x.shape))
    dropped = np.asarray(x, np.float64) * mask / 0.75
    assert relative(dense(x, rngs=key), base + dense.scaling * (dropped @ a) @ b) < 2e-6
    assert mask.mean() == pytest.approx(0.75, abs=0.03)


def test_dropout_is_on_only_with_a_key():
    dense = with_random_b(nf4_dense.from_kernel(kernel(64, 32), rank=4, dropout=0.5, rngs=nnx.Rngs(0)))
    x = inputs(8, 64)
    np.testing.assert_array_equal(dense(x), dense(x))
    assert relative(dense(x), exact(dense, x)) < 2e-6
    same = [dense(x, rngs=jax.random.key(0)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert bool((dense(x, rngs=jax.random.key(1)) != same[0]).any())


def test_an_nnx_rngs_gives_each_layer_its_next_key():
    dense = with_random_b(nf4_dense.from_kernel(kernel(64, 32), rank=4, dropout=0.5, rngs=nnx.Rngs(0)))
    x = inputs(8, 64)
    rngs = nnx.Rngs(dropout=3)
    first, second = dense(x, rngs=rngs), dense(x, rngs=rngs)
    assert bool((first != second).any())
    replay = nnx.Rngs(dropout=3)
    np.testing.assert_array_equal(dense(x, rngs=replay.dropout()), first)
    sequential = nnx.Sequential(dense, nnx.relu, nf4_dense(32, 8, rank=2, dropout=0.5, rngs=nnx.Rngs(0)))
    assert sequential(x, rngs=nnx.Rngs(dropout=3)).shape == (8, 8)


def test_works_under_jit_vmap_checkpoint_and_eval_shape():
    dense = with_random_b(nf4_dense(64, 32, rank=4, use_bias=True, rngs=nnx.Rngs(0)))
    x = inputs(4, 3, 64)
    expected = dense(x)
    graphdef, state = nnx.split(dense)
    run = lambda state, x: nnx.merge(graphdef, state)(x)  # noqa: E731
    np.testing.assert_allclose(jax.jit(run)(state, x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(run, (None, 0))(state, x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.checkpoint(run)(state, x), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: jax.checkpoint(run)(state, x).sum()))(x)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: dense(x).sum())(x), rtol=1e-5, atol=1e-6)
    abstract = nnx.eval_shape(lambda: nf4_dense(4096, 4096, rank=16, rngs=nnx.Rngs(0)))
    assert abstract.kernel.get_value().packed.shape == (4096, 2048)


def test_vmap_over_construction_makes_a_stack():
    make = lambda key: nnx.split(nf4_dense(64, 32, rank=4, rngs=nnx.Rngs(key)))[1]  # noqa: E731
    stacked = jax.vmap(make)(jax.random.split(KEY, 3))
    assert stacked["kernel"].get_value().num_layers == 3
    single = make(jax.random.split(KEY, 3)[1])
    np.testing.assert_array_equal(stacked["kernel"].get_value().packed[1], single["kernel"].get_value().packed)


def test_a_stack_draws_each_layers_a_by_itself():
    dense = nf4_dense.from_kernel(kernel(3, 64, 32), bias=jnp.zeros((3, 32)), rank=4, rngs=nnx.Rngs(0))
    a = np.asarray(dense.lora_a.get_value())
    assert dense.num_layers == 3
    assert a.shape == (3, 64, 4)
    assert dense.lora_b.get_value().shape == (3, 4, 32)
    assert len({layer.tobytes() for layer in a}) == 3
    he = nf4_dense.from_kernel(
        kernel(3, 64, 512), rank=256, rngs=nnx.Rngs(0), a_init=nnx.initializers.variance_scaling(1, "fan_in", "normal")
    )
    assert np.asarray(he.lora_a.get_value()).std() == pytest.approx(64**-0.5, rel=0.05)  # Not fan-in 3 * 64.
    with pytest.raises(ValueError, match="scan_layers"):
        dense(inputs(2, 64))


def test_gradients_of_a_replicated_adapter_are_summed_over_devices():
    dense = with_random_b(nf4_dense.from_kernel(kernel(64, 32), rank=4, rngs=nnx.Rngs(0)))
    graphdef, lora, frozen = nnx.split(dense, nnx.LoRAParam, ...)
    x = inputs(8, 64)

    def loss(lora, frozen, x):
        return (nnx.merge(graphdef, lora, frozen)(x) ** 2).sum()

    mesh = jax.make_mesh((4,), ("data",))
    local = jax.shard_map(
        lambda lora, frozen, x: jax.lax.psum(loss(lora, frozen, x), "data"),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
    )
    sharded = jax.jit(jax.grad(local))(lora, frozen, jax.device_put(x, NamedSharding(mesh, P("data"))))
    expected = jax.grad(loss)(lora, frozen, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), sharded, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": -1}, "rank=-1"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"rank": 4, "alpha": 0}, "alpha=0"),
        ({"rank": 4, "dropout": 1.0}, "dropout=1.0"),
        ({"rank": 4}, "without rngs"),
        ({"bias": np.zeros(64)}, "bias of shape"),
    ],
)
def test_what_no_layer_can_have_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        nf4_dense.from_kernel(kernel(64, 32), **arguments)


def test_from_linear_refuses_what_is_not_a_plain_linear():
    class Scaled(nnx.Linear):
        pass

    custom = nnx.Linear(64, 32, rngs=nnx.Rngs(0), dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k))
    for linear, message in ((Scaled(64, 32, rngs=nnx.Rngs(0)), "subclass"), (custom, "custom dot_general")):
        with pytest.raises(UserError, match=message):
            nf4_dense.from_linear(linear)


def test_a_wrong_input_is_refused_with_its_shape():
    for quant_type in ("nf4", None):
        dense = nf4_dense.from_kernel(kernel(64, 32), quant_type=quant_type)
        with pytest.raises(ValueError, match=r"\(2, 63\)"):
            dense(inputs(2, 63))
    with pytest.raises(TypeError, match="random key"):
        nf4_dense(64, 32, rank=2, dropout=0.1, rngs=nnx.Rngs(0))(inputs(2, 64), rngs=3)
