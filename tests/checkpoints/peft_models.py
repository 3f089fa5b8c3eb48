"""Models with adapters, made to be saved and loaded, and what is compared of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.checkpoints.peft import load_adapter, save_adapter
from qlora_jax.errors import UserError
from qlora_jax.nn import nf4_dense

SHAPES = {  # the tiny LLaMA's projections, [in, out]
    "self_attn": {"q_proj": (128, 128), "k_proj": (128, 64), "v_proj": (128, 64), "o_proj": (128, 128)},
    "mlp": {"gate_proj": (128, 192), "up_proj": (128, 192), "down_proj": (192, 128)},
}


class Group(nnx.Module):
    """A module with the given children."""

    def __init__(self, **children):
        for name, child in children.items():
            setattr(self, name, nnx.data(child))


def stacked_model(layers=2, seed=0):
    """The linears of a LLaMA as models/ has them: one block, every leaf with the layers in front."""
    rng = np.random.default_rng(seed)

    def dense(shape):
        kernel = jnp.asarray(rng.normal(size=(layers, *shape)), jnp.bfloat16)
        return nf4_dense.from_kernel(kernel, quant_type=None)  # 16-bit kernels: adapters are what is tested here

    block = {part: Group(**{name: dense(shape) for name, shape in linears.items()}) for part, linears in SHAPES.items()}
    return Group(layers=Group(**block))


def plain_model(*names, features=(64, 32), quant_type=None):
    """A list of blocks with one dense for each name, and a head, none of them stacked."""

    def dense():
        return nf4_dense(*features, quant_type=quant_type, rngs=nnx.Rngs(0))

    blocks = nnx.List([Group(**{name: dense() for name in names}) for _ in range(2)])
    return Group(layers=blocks, lm_head=dense())


def fill(model, seed=0):
    """Random values in every adapter leaf, B included."""
    rng = np.random.default_rng(seed)
    for _, leaf in adapters(model).items():
        leaf.set_value(jnp.asarray(rng.normal(size=leaf.get_value().shape), jnp.float32))
    return model


def adapters(model):
    return {path: leaf for path, leaf in nnx.iter_graph(model) if isinstance(leaf, nnx.LoRAParam)}


def assert_same_adapters(model, other):
    ours, theirs = adapters(model), adapters(other)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert theirs[path].get_value().dtype == jnp.float32
        np.testing.assert_array_equal(leaf.get_value(), theirs[path].get_value())


def save(model, folder, **more):
    save_adapter(model, folder, base_model="org/base", base_sha256="abc123", **more)


def error(model, folder):
    before = {path: np.asarray(leaf.get_value()) for path, leaf in adapters(model).items()}
    with pytest.raises(UserError) as caught:
        load_adapter(model, folder)
    after = adapters(model)
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path].get_value())
    return str(caught.value)
