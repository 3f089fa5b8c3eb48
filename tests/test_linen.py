"""The Linen layer: the same numbers as the NNX layer, adapters alone in `params`, ports of whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from qlora_jax import NF4Tensor, quantize
from qlora_jax import nf4_dense as nnx_dense
from qlora_jax.errors import UserError
from qlora_jax.linen import from_params, merge_adapters, nf4_dense, split_adapters

KEY = jax.random.key(0)


def inputs(*shape: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape).astype(dtype)


def dense_params(use_bias: bool = True) -> dict:
    params = nn.Dense(32, use_bias=use_bias).init(KEY, jnp.ones((1, 64)))["params"]
    return params | ({"bias": 0.1 * inputs(32)} if use_bias else {})


def with_random_b(variables: dict) -> dict:
    b = variables["params"]["lora_b"]
    return variables | {"params": variables["params"] | {"lora_b": 0.1 * inputs(*b.shape)}}


def twin(variables: dict, **options) -> nnx_dense:
    """The NNX layer with the same leaves."""
    frozen, params = variables["nf4"], variables["params"]
    dense = nnx_dense.from_kernel(frozen["kernel"], bias=frozen.get("bias"), rank=4, rngs=nnx.Rngs(0), **options)
    dense.lora_a.set_value(params["lora_a"])
    dense.lora_b.set_value(params["lora_b"])
    return dense


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_nnx_layer(dtype):
    variables = with_random_b(from_params(dense_params(), rank=4))
    layer = nf4_dense(32, rank=4, alpha=8.0, use_bias=True)
    dense = twin(variables, alpha=8.0)
    x = inputs(2, 5, 64, dtype=dtype)
    y = layer.apply(variables, x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, dense(x))
    graphdef, lora, frozen = nnx.split(dense, nnx.LoRAParam, ...)
    theirs = jax.grad(lambda lora: (nnx.merge(graphdef, lora, frozen)(x) ** 2).sum().astype(jnp.float32))(lora)
    ours = jax.grad(lambda params: (layer.apply(variables | {"params": params}, x) ** 2).sum().astype(jnp.float32))(
        variables["params"]
    )
    for name in ("lora_a", "lora_b"):
        np.testing.assert_array_equal(ours[name], theirs[name].get_value())


def test_from_params_quantizes_a_denses_kernel_and_starts_as_its_base():
    params = dense_params()
    variables = from_params(params, rank=4, rngs=jax.random.key(3))
    assert set(variables) == {"params", "nf4"}
    assert set(variables["params"]) == {"lora_a", "lora_b"}
    assert set(variables["nf4"]) == {"kernel", "bias"}
    np.testing.assert_array_equal(variables["nf4"]["kernel"].packed, quantize(params["kernel"]).packed)
    x = inputs(3, 64)
    base = nf4_dense(32, use_bias=True).apply({"nf4": variables["nf4"]}, x)
    np.testing.assert_array_equal(nf4_dense(32, rank=4, use_bias=True).apply(variables, x), base)
    error = np.linalg.norm(base - nn.Dense(32).apply({"params": params}, x)) / np.linalg.norm(base)
    assert error < 0.15  # 4-bit weights: about a tenth.


def test_init_has_the_collections_of_from_params():
    layer = nf4_dense(32, rank=4, use_bias=True)
    variables = layer.init(KEY, jnp.ones((1, 64)))
    ported = from_params(dense_params(), rank=4)
    assert jax.tree.structure(variables) == jax.tree.structure(ported)
    assert list(map(jnp.shape, jax.tree.leaves(variables))) == list(map(jnp.shape, jax.tree.leaves(ported)))
    assert variables["params"]["lora_a"].dtype == jnp.float32
    assert np.abs(variables["params"]["lora_a"]).max() <= 64**-0.5
    assert set(nf4_dense(32).init(KEY, jnp.ones((1, 64)))) == {"nf4"}


def test_dropout_is_on_only_with_its_stream_and_only_on_the_adapter():
    variables = with_random_b(from_params(dense_params(), rank=4))
    layer = nf4_dense(32, rank=4, dropout=0.5, use_bias=True)
    x = inputs(16, 64)
    plain = layer.apply(variables, x)
    np.testing.assert_array_equal(plain, nf4_dense(32, rank=4, use_bias=True).apply(variables, x))
    first, again, second = (layer.apply(variables, x, rngs={"dropout": jax.random.key(i)}) for i in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert bool((first != second).any())
    zeroed = variables | {"params": jax.tree.map(jnp.zeros_like, variables["params"])}
    np.testing.assert_array_equal(layer.apply(zeroed, x, rngs={"dropout": KEY}), layer.apply(zeroed, x))


def test_dtype_and_dense_kernels():
    variables = from_params(dense_params(), quant_type=None, rank=4)
    assert not isinstance(variables["nf4"]["kernel"], NF4Tensor)
    layer = nf4_dense(32, rank=4, use_bias=True, quant_type=None, dtype=jnp.bfloat16)
    y = layer.apply(variables, inputs(3, 64))
    assert y.dtype == jnp.bfloat16
    reference = nn.Dense(32).apply({"params": dense_params()}, inputs(3, 64))
    np.testing.assert_allclose(np.asarray(y, np.float32), reference, atol=0.05)


class Net(nn.Module):
    """A Linen model, before (`dense=nn.Dense`) and after the port."""

    dense: type
    options: tuple = ()

    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(16, 64, name="embed")(tokens)
        for i in range(2):
            h = h + self.dense(64, use_bias=False, name=f"layer_{i}", **dict(self.options))(
                nn.LayerNorm(name=f"norm_{i}")(h)
            )
        return nn.Dense(16, name="head")(h)


def test_a_ported_model_trains_its_adapters_alone():
    tokens = jnp.arange(8)
    params = Net(nn.Dense).init(KEY, tokens)["params"]
    port = Net(nf4_dense, (("rank", 2),))
    variables = from_params(params, rank=2)
    assert set(variables["nf4"]) == {"layer_0", "layer_1"}
    assert set(variables["params"]["head"]) == {"kernel", "bias"}
    adapters, frozen = split_adapters(variables)
    assert set(adapters) == {"layer_0", "layer_1"}
    assert bool((adapters["layer_0"]["lora_a"] != adapters["layer_1"]["lora_a"]).any())
    assert jax.tree.structure(merge_adapters(adapters, frozen)) == jax.tree.structure(variables)
    assert "head" in frozen["params"]
    assert not any("lora" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(frozen))

    @jax.jit
    def step(adapters, frozen):
        loss, grads = jax.value_and_grad(
            lambda adapters: (port.apply(merge_adapters(adapters, frozen), tokens) ** 2).mean()
        )(adapters)
        return jax.tree.map(lambda p, g: p - 0.01 * g, adapters, grads), loss

    losses = []
    for _ in range(5):
        adapters, loss = step(adapters, frozen)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_a_scanned_stack_stays_stacked():
    class Layer(nn.Module):
        dense: type
        options: tuple = ()

        @nn.compact
        def __call__(self, h, _):
            return h + nn.tanh(self.dense(64, use_bias=False, name="up", **dict(self.options))(h)), None

    def stack(*args):
        axes = {"params": 0, "nf4": 0}
        return nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)(*args)

    h = inputs(4, 64)
    params = stack(nn.Dense).init(KEY, h, None)["params"]
    with pytest.raises(UserError, match=r"up \[3, 64, 64\]"):
        from_params(params)  # Three axes might be a DenseGeneral's: they have to be named.
    variables = from_params(params, rank=2, include=["up"])
    assert variables["nf4"]["up"]["kernel"].num_layers == 3
    port = stack(nf4_dense, (("rank", 2),))
    assert jax.tree.structure(port.init(KEY, h, None)) == jax.tree.structure(variables)
    y, _ = port.apply(variables, h, None)
    expected = h
    for i in range(3):
        dense = nnx_dense.from_kernel(quantize(params["up"]["kernel"][i]))
        expected = expected + jnp.tanh(dense(expected))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_partitioned_parameters_are_unboxed():
    dense = nn.Dense(32, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    params = dense.init(KEY, jnp.ones((1, 64)))["params"]
    assert isinstance(from_params(params)["nf4"]["kernel"], NF4Tensor)


def test_refusals():
    params = Net(nn.Dense).init(KEY, jnp.arange(8))["params"]
    with pytest.raises(UserError, match="'layer' matches no layer"):
        from_params(params, include=["layer"])
    with pytest.raises(UserError, match="no Dense kernel"):
        from_params({"head": dense_params()})
    with pytest.raises(UserError, match=r"NaN"):
        from_params({"kernel": jnp.full((64, 32), jnp.nan)})
    with pytest.raises(UserError, match="no adapters"):
        split_adapters(from_params(params))
    with pytest.raises(UserError, match="rank=-1"):
        from_params(params, rank=-1)
