"""scan_layers: equal to a loop over layers, bounded memory, dropout that does not repeat, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax import dequantize, nf4_dense, quantize, quantize_model, scan_layers, trainable
from qlora_jax.errors import UserError
from qlora_jax.nf4 import use_kernels
from qlora_jax.nn import scan_layers_with

LAYERS = 3
WIDTH = 64


class Block(nnx.Module):
    """Norm, two dense layers, a residual connection."""

    def __init__(self, rngs: nnx.Rngs, *, width: int = WIDTH, dropout: float = 0.0, quant_type: str | None = "nf4"):
        options = {"rank": 4, "dropout": dropout, "quant_type": quant_type, "rngs": rngs}
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nf4_dense(width, width, **options, use_bias=True)
        self.down = nf4_dense(width, width, **options)

    def __call__(self, h, scale=1.0, *, rngs=None):
        rngs = None if rngs is None else nnx.Rngs(rngs)
        return h + scale * self.down(jax.nn.silu(self.up(self.norm(h), rngs=rngs)), rngs=rngs)


def stack(num_layers: int = LAYERS, **options) -> Block:
    """A stacked block, and B != 0 so that adapters count."""
    block = nnx.vmap(lambda key: Block(nnx.Rngs(key), **options))(jax.random.split(jax.random.key(0), num_layers))
    for dense in (block.up, block.down):
        dense.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(2), dense.lora_b.get_value().shape))
    return block


def layer_of(block: nnx.Module, i: int) -> nnx.Module:
    graphdef, state = nnx.split(block)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], state))


def inputs(rows: int = 5, width: int = WIDTH) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (rows, width))


@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_equals_a_loop_over_layers(quant_type):
    block, h = stack(quant_type=quant_type), inputs()
    expected = h
    for i in range(LAYERS):
        expected = layer_of(block, i)(expected, 0.5)
    for remat in (True, False):
        np.testing.assert_allclose(scan_layers(block, h, 0.5, remat=remat), expected, rtol=1e-5, atol=1e-5)
    graphdef, state = nnx.split(block)
    jitted = jax.jit(lambda state, h: scan_layers(nnx.merge(graphdef, state), h, 0.5))
    np.testing.assert_allclose(jitted(state, h), expected, rtol=1e-5, atol=1e-5)


def test_a_users_stack_of_linears_is_quantized_and_scanned():
    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, h):
            return h + nnx.tanh(self.up(h))

    block = nnx.vmap(lambda key: Plain(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), LAYERS))
    kernel, h = block.up.kernel.get_value(), inputs()
    quantize_model(block, rank=2)
    expected = h
    for i in range(LAYERS):
        expected = expected + jnp.tanh(expected @ dequantize(quantize(kernel[i])))
    np.testing.assert_allclose(scan_layers(block, h), expected, rtol=1e-4, atol=1e-4)


def gradients(block: Block, run) -> dict:
    graphdef, lora, frozen = nnx.split(block, trainable(block), ...)
    grads = jax.jit(jax.grad(lambda lora, frozen: (run(nnx.merge(graphdef, lora, frozen)) ** 2).sum()))(lora, frozen)
    return {path: leaf.get_value() for path, leaf in nnx.to_flat_state(grads)}


def test_gradients_equal_those_of_a_loop():
    block, h = stack(), inputs()

    def loop(block):
        out = h
        for i in range(LAYERS):
            out = layer_of(block, i)(out)
        return out

    expected = gradients(block, loop)
    for remat in (True, False):
        found = gradients(block, functools.partial(scan_layers, h=h, remat=remat))
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            np.testing.assert_allclose(found[path], leaf, rtol=1e-3, atol=1e-4)


def test_the_carry_may_be_a_tree_and_vmap_goes_through():
    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.dense = nf4_dense(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, h):
            return {"a": self.dense(h["a"]), "n": h["n"] + 1}

    block = nnx.vmap(lambda key: Pair(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), LAYERS))
    out = scan_layers(block, {"a": inputs(), "n": jnp.int32(0)})
    assert int(out["n"]) == LAYERS
    batched = jax.vmap(lambda a: scan_layers(block, {"a": a, "n": jnp.int32(0)})["a"])(inputs()[:, None])
    np.testing.assert_allclose(batched[:, 0], out["a"], rtol=1e-5, atol=1e-6)


def test_per_layer_values_go_in_and_come_out():
    class Cached(nnx.Module):
        def __init__(self, rngs):
            self.dense = nf4_dense(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, h, scale, cache):
            h = scale * self.dense(h) + cache["bias"]
            return h, {"bias": cache["bias"] + 1, "seen": h}

    block = nnx.vmap(lambda key: Cached(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), LAYERS))
    cache = {"bias": jnp.arange(LAYERS * WIDTH, dtype=jnp.float32).reshape(LAYERS, 1, WIDTH)}
    out, new = scan_layers_with(block, inputs(), cache, 0.5)
    expected = inputs()
    for i in range(LAYERS):
        expected, kept = layer_of(block, i)(expected, 0.5, {"bias": cache["bias"][i]})
        np.testing.assert_allclose(new["seen"][i], kept["seen"], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(new["bias"], cache["bias"] + 1)


def test_dropout_differs_from_step_to_step_and_layer_to_layer_in_scan_and_remat():
    class Shown(nnx.Module):
        """Adds up its dropout masks, one bit a layer: with A = B = 1 and no kernel, dense(x) is dropout(x)."""

        def __init__(self):
            eye = jnp.broadcast_to(jnp.eye(WIDTH), (LAYERS, WIDTH, WIDTH))
            self.inner = nf4_dense.from_kernel(
                jnp.zeros_like(eye), rank=WIDTH, alpha=WIDTH, dropout=0.5, rngs=nnx.Rngs(0)
            )
            self.inner.lora_a.set_value(eye)
            self.inner.lora_b.set_value(eye)

        def __call__(self, carry, x, *, rngs=None):
            dropped, weight = carry
            return dropped + weight * (self.inner(x, rngs=rngs) == 0), 2 * weight

    block, x = Shown(), jnp.ones((8, WIDTH))
    graphdef, state = nnx.split(block)

    @jax.jit
    def masks(state, key):
        start = (jnp.zeros_like(x), jnp.float32(1))
        total, _ = scan_layers(nnx.merge(graphdef, state), start, x, rngs=key)
        return total

    def by_layer(key):
        total = np.asarray(masks(state, key)).astype(int)
        return [total >> i & 1 for i in range(LAYERS)]

    key = jax.random.key(5)
    first, second = by_layer(jax.random.fold_in(key, 0)), by_layer(jax.random.fold_in(key, 1))
    seen = [*first, *second]
    for mask in seen:
        assert mask.mean() == pytest.approx(0.5, abs=0.1)
    for i, mask in enumerate(seen):
        for other in seen[i + 1 :]:
            assert (mask == other).mean() == pytest.approx(0.5, abs=0.1)  # Independent: half agrees.
    np.testing.assert_array_equal(by_layer(jax.random.fold_in(key, 0)), first)  # Resuming repeats a step exactly.
    for i in range(LAYERS):  # key_i = fold_in(key, i)
        keep = jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, 0), i), 0.5, x.shape)
        np.testing.assert_array_equal(first[i], ~np.asarray(keep))


def test_the_backward_pass_of_remat_uses_the_forward_passes_masks():
    block, h = stack(dropout=0.5), inputs()
    key = jax.random.key(3)
    recomputed = gradients(block, lambda block: scan_layers(block, h, rngs=key, remat=True))
    kept = gradients(block, lambda block: scan_layers(block, h, rngs=key, remat=False))
    for path, leaf in kept.items():
        np.testing.assert_allclose(recomputed[path], leaf, rtol=1e-4, atol=1e-5)
    without = gradients(block, lambda block: scan_layers(block, h))
    assert any(not np.allclose(without[path], leaf, rtol=1e-2) for path, leaf in kept.items())


def test_an_nnx_rngs_is_advanced_by_one_key():
    block, h = stack(dropout=0.5), inputs()
    rngs = nnx.Rngs(dropout=1)
    first, second = scan_layers(block, h, rngs=rngs), scan_layers(block, h, rngs=rngs)
    assert bool((first != second).any())
    np.testing.assert_array_equal(first, scan_layers(block, h, rngs=nnx.Rngs(dropout=1).dropout()))


def gradient_step(num_layers: int, width: int, quant_type: str | None) -> jax.stages.Lowered:
    """A gradient step over a stack of abstract layers, for width/32 rows of x."""
    abstract = nnx.eval_shape(lambda: Block(nnx.Rngs(0), width=width, quant_type=quant_type))
    graphdef, state = nnx.split(abstract)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((num_layers, *leaf.shape), leaf.dtype), state)
    _, lora, frozen = nnx.split(nnx.merge(graphdef, state), nnx.LoRAParam, ...)

    def loss(lora, frozen, h):
        return (scan_layers(nnx.merge(graphdef, lora, frozen), h) ** 2).sum()

    h = jax.ShapeDtypeStruct((width // 32, width), jnp.float32)
    return jax.jit(jax.grad(loss)).lower(lora, frozen, h)


KERNELS = ["xla", "ffi"]


@pytest.mark.parametrize(("quant_type", "kernels"), [*(("nf4", kernels) for kernels in KERNELS), (None, "xla")])
def test_gradient_memory_does_not_grow_with_dense_layers(quant_type, kernels):
    """Design table: "gradient temp memory against number of layers ... slope < 5 % of one dense layer"."""
    width = 512
    with use_kernels(kernels):
        steps = [gradient_step(n, width, quant_type) for n in (4, 12)]
    assert ("qlora_jax_nf4_matmul_dx" in steps[0].as_text()) == (kernels == "ffi")
    few, many = (step.compile().memory_analysis().temp_size_in_bytes for step in steps)
    dense_layer = width * width * 4
    assert (many - few) / 8 < 0.05 * dense_layer
    # What must grow: the activations kept for each layer.
    assert (many - few) / 8 >= width // 32 * width * 4


def test_leaves_without_a_common_leading_axis_are_named():
    block = stack()
    block.norm.scale.set_value(jnp.ones((LAYERS + 1, WIDTH)))
    with pytest.raises(UserError, match=r"norm\.scale: 4"):
        scan_layers(block, inputs())
    with pytest.raises(UserError, match=r"kernel: none"):
        scan_layers(Block(nnx.Rngs(0)), inputs())
    with pytest.raises(UserError, match=r"xs: 2"):
        scan_layers_with(stack(), inputs(), jnp.zeros((2, 4)))


def test_a_layer_that_changes_its_state_is_refused():
    class Stateful(nnx.Module):
        def __init__(self, rngs):
            self.dense = nf4_dense(WIDTH, WIDTH, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, h):
            return self.drop(self.dense(h))

    block = nnx.vmap(lambda key: Stateful(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), LAYERS))
    with pytest.raises(UserError, match=r"drop\.rngs\.count"):
        scan_layers(block, inputs())
    block.eval()
    assert scan_layers(block, inputs()).shape == (5, WIDTH)
