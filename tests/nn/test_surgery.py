"""quantize_model: what it swaps, what it leaves and says so, what it refuses, and that a refusal changes nothing."""

import collections
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from qlora_jax import dequantize, nf4_dense, quantize, quantize_model, trainable
from qlora_jax.errors import UserError

Pair = collections.namedtuple("Pair", ["left", "right"])


def linear(seed: int = 0, cls: type = nnx.Linear, **options) -> nnx.Linear:
    return cls(64, 64, rngs=nnx.Rngs(seed), **options)


class Holder(nnx.Module):
    """A model that holds what it is given."""

    def __init__(self, **parts) -> None:
        for name, part in parts.items():
            setattr(self, name, nnx.data(part))


class GraphHolder(nnx.Module, pytree=False):
    def __init__(self, layers) -> None:
        self.layers = layers


CONTAINERS = {
    "attribute": (lambda: Holder(a=linear()), {"a"}),
    "nested module": (lambda: Holder(block=Holder(a=linear(), b=linear(1))), {"block.a", "block.b"}),
    "nnx.List": (lambda: Holder(x=nnx.List([linear(), linear(1)])), {"x.0", "x.1"}),
    "nnx.Dict": (lambda: Holder(x=nnx.Dict(a=linear())), {"x.a"}),
    "nnx.Sequential": (lambda: Holder(x=nnx.Sequential(linear(), nnx.relu, linear(1))), {"x.layers.0", "x.layers.2"}),
    "list": (lambda: Holder(x=[linear(), linear(1)]), {"x.0", "x.1"}),
    "tuple": (lambda: Holder(x=(linear(), linear(1))), {"x.0", "x.1"}),
    "dict": (lambda: Holder(x={"b": linear(), "a": linear(1)}), {"x.a", "x.b"}),
    "dict of integers": (lambda: Holder(x={3: linear()}), {"x.3"}),
    "named tuple": (lambda: Holder(x=Pair(linear(), linear(1))), {"x.left", "x.right"}),
    "FrozenDict": (lambda: Holder(x=FrozenDict(a=linear())), {"x.a"}),
    "mixed": (
        lambda: Holder(x={"a": [linear(), (linear(1), {"k": Holder(y=linear(2))})]}),
        {"x.a.0", "x.a.1.0", "x.a.1.1.k.y"},
    ),
    "graph module": (lambda: GraphHolder([linear(), linear(1)]), {"layers.0", "layers.1"}),
}


def modules(model: nnx.Module) -> dict[str, nnx.Module]:
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


@pytest.mark.parametrize("case", CONTAINERS)
def test_swaps_through_every_container(case):
    make, paths = CONTAINERS[case]
    model = make()
    old = {path: module for path, module in modules(model).items() if path in paths}
    result, report = quantize_model(model)
    assert result is model
    assert set(report.swapped) == paths
    new = modules(model)
    for path in paths:
        assert type(new[path]) is nf4_dense
        np.testing.assert_array_equal(
            new[path].kernel.get_value().packed, quantize(old[path].kernel.get_value()).packed
        )
    nnx.split(model)  # Flax still accepts the model.


def test_the_swapped_model_computes_with_the_quantized_weights_and_trains():
    model = nnx.Sequential(linear(), nnx.relu, linear(1))
    x = jax.random.normal(jax.random.key(0), (4, 64))
    weights = [dequantize(quantize(model.layers[i].kernel.get_value())) for i in (0, 2)]
    expected = jnp.maximum(x @ weights[0], 0) @ weights[1]
    quantize_model(model, rank=4, alpha=8.0, dropout=0.1)
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(jax.tree.leaves(nnx.state(model, trainable(model)))) == 4
    first, second = model.layers[0], model.layers[2]
    assert (first.rank, first.alpha, first.dropout) == (4, 8.0, 0.1)
    assert bool((first.lora_a.get_value() != second.lora_a.get_value()).any())


def test_a_model_that_is_a_linear_comes_back_as_a_new_layer():
    model, report = quantize_model(linear())
    assert type(model) is nf4_dense
    assert set(report.swapped) == {"(model)"}


def test_a_bare_container_of_modules_is_a_model_too():
    layers = [linear(), linear(1)]
    result, _ = quantize_model(layers)
    assert result is layers
    assert all(type(layer) is nf4_dense for layer in layers)


def test_a_shared_module_becomes_one_module_on_every_alias():
    shared = linear()
    model = Holder(a=shared, list=[shared], pair=(shared, linear(1)), inner=Holder(b=shared))
    _, report = quantize_model(model)
    assert type(model.a) is nf4_dense
    assert model.a is model.list[0] is model.pair[0] is model.inner.b
    assert model.pair[1] is not model.a
    assert set(report.swapped) == {"a", "list.0", "pair.0", "pair.1", "inner.b"}


def test_cycles_end():
    model = Holder(a=linear())
    model.myself = nnx.data(model)
    _, report = quantize_model(model)
    assert set(report.swapped) == {"a"}
    assert type(model.a) is nf4_dense


def test_stacked_kernels_stay_stacked():
    make = nnx.vmap(lambda key: nnx.Linear(64, 32, rngs=nnx.Rngs(key)))
    model = Holder(a=make(jax.random.split(jax.random.key(0), 3)))
    kernel = model.a.kernel.get_value()
    quantize_model(model, rank=2)
    w = model.a.kernel.get_value()
    assert w.num_layers == 3
    assert model.a.lora_a.get_value().shape == (3, 64, 2)
    assert model.a.bias.get_value().shape == (3, 32)
    np.testing.assert_array_equal(w.packed[2], quantize(kernel[2]).packed)


def test_patterns_match_whole_dotted_components():
    def make():
        return Holder(
            attn_output=linear(), headroom=linear(1), head=linear(2), mlp=Holder(up=linear(3), output=linear(4))
        )

    _, report = quantize_model(make())
    assert set(report.swapped) == {"attn_output", "headroom", "mlp.up"}
    assert report.kept == {"head": "skipped ('head')", "mlp.output": "skipped ('output')"}
    _, report = quantize_model(make(), include=["mlp.up", "head"], skip=())
    assert set(report.swapped) == {"mlp.up", "head"}
    assert report.kept["attn_output"] == "not in include"
    _, report = quantize_model(make(), include="mlp", skip="mlp.output")
    assert set(report.swapped) == {"mlp.up"}


def test_one_skipped_alias_keeps_a_shared_module_dense():
    shared = linear()
    model = Holder(a=shared, head=shared, b=linear(1))
    _, report = quantize_model(model)
    assert model.a is model.head is shared
    assert set(report.kept) == {"a", "head"}


def test_what_is_left_dense_is_named_with_its_reason():
    class Scaled(nnx.Linear):
        pass

    embed = nnx.Embed(64, 64, rngs=nnx.Rngs(0))
    tied = linear()
    tied.kernel = embed.embedding
    twin = linear()
    other = linear()
    other.kernel = twin.kernel
    model = Holder(
        embed=embed,
        tied=tied,
        twin=twin,
        other=other,
        general=nnx.LinearGeneral(64, 64, rngs=nnx.Rngs(0)),
        scaled=linear(cls=Scaled),
        lora=nnx.LoRALinear(64, 64, lora_rank=2, rngs=nnx.Rngs(0)),
        norm=nnx.LayerNorm(64, rngs=nnx.Rngs(0)),
        dense=nf4_dense(64, 64, quant_type=None, rngs=nnx.Rngs(0)),
        plain=linear(),
    )
    _, report = quantize_model(model)
    assert set(report.swapped) == {"plain"}
    assert report.kept == {
        "embed": "Embed is not an nnx.Linear",
        "tied": "its kernel is tied to embed.embedding",
        "twin": "its kernel is tied to other.kernel",
        "other": "its kernel is tied to twin.kernel",
        "general": "LinearGeneral is not an nnx.Linear",
        "scaled": "Scaled is a subclass of nnx.Linear",
        "lora": "LoRALinear is a subclass of nnx.Linear",
        "dense": "an nf4_dense with a dense kernel",
    }
    assert model.tied.kernel is embed.embedding
    assert type(model.scaled) is Scaled


def test_the_report_prints_as_a_table():
    _, report = quantize_model(Holder(a=linear(), head=linear(1)))
    lines = str(report).splitlines()
    assert lines[0] == "1 layers swapped, 1 left dense"
    assert lines[1].split() == ["a", "64", "x", "64", "16.0", "KiB", "->", "2.1", "KiB"]
    assert lines[2].split() == ["head", "dense", "skipped", "('head')"]
    swap = report.swapped["a"]
    assert (swap.shape, swap.dense_bytes) == ((64, 64), 64 * 64 * 4)
    assert swap.packed_bytes == quantize(linear().kernel.get_value()).nbytes


def test_dry_run_reports_the_same_and_changes_nothing():
    def make():
        shared = linear()
        return Holder(a=shared, b=[shared], head=linear(1))

    model = make()
    before = modules(model)
    result, planned = quantize_model(model, rank=4, dry_run=True)
    assert result is model
    after = modules(model)
    assert {path: id(module) for path, module in before.items()} == {path: id(m) for path, m in after.items()}
    assert type(model.a) is nnx.Linear
    _, done = quantize_model(make(), rank=4)
    assert planned == done


def test_swapping_frees_each_dense_kernel_as_it_goes():
    model = Holder(a=linear(), b=linear(1))
    references = [weakref.ref(model.a), weakref.ref(model.b)]
    alive: list[int] = []

    def a_init(key, shape, dtype):
        alive.append(sum(reference() is not None for reference in references))
        return jnp.zeros(shape, dtype)

    quantize_model(model, rank=2, a_init=a_init)
    assert alive == [2, 1]


def nan_kernel() -> nnx.Linear:
    layer = linear(1)
    layer.kernel.set_value(layer.kernel.get_value().at[3, 5].set(jnp.nan))
    return layer


REFUSALS = {
    "nothing at all": (lambda: Holder(norm=nnx.LayerNorm(4, rngs=nnx.Rngs(0))), {}, "no nnx.Linear"),
    "everything skipped": (lambda: Holder(head=linear()), {}, "no nnx.Linear"),
    "no match": (lambda: Holder(attn_output=linear()), {"include": ["attn"]}, "'attn' matches no layer"),
    "one of two patterns": (lambda: Holder(a=linear()), {"include": ["a", "b"]}, "'b' matches no layer"),
    "non-finite": (lambda: Holder(a=linear(), b=nan_kernel()), {}, "b: its kernel has NaN"),
    "abstract": (lambda: nnx.eval_shape(lambda: Holder(a=linear())), {}, "abstract"),
    "dot_general": (
        lambda: Holder(a=linear(), b=linear(1, dot_general=lambda *args, **kwargs: None)),
        {},
        "b: it has a custom dot_general",
    ),
    "preferred type": (lambda: Holder(a=linear(preferred_element_type=jnp.float32)), {}, "preferred_element_type"),
    "integers": (lambda: Holder(a=linear(kernel_init=lambda *_: jnp.ones((64, 64), jnp.int8))), {}, "int8"),
    "quantized already": (lambda: quantize_model(Holder(a=linear(), b=linear(1)))[0], {}, "a: quantized already"),
    "quantized in part": (
        lambda: Holder(a=linear(), b=nf4_dense(64, 64, rngs=nnx.Rngs(0))),
        {},
        "b: quantized already",
    ),
    "rank": (lambda: Holder(a=linear()), {"rank": -1}, "rank=-1"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("dry_run", [False, True])
def test_refusals_name_the_layer_and_change_nothing(case, dry_run):
    make, options, message = REFUSALS[case]
    model = make()
    before = {path: id(module) for path, module in modules(model).items()}
    with pytest.raises(UserError, match=message):
        quantize_model(model, dry_run=dry_run, **options)
    assert {path: id(module) for path, module in modules(model).items()} == before


def test_all_refusals_are_told_at_once():
    with pytest.raises(UserError, match=r"(?s)a: its kernel has NaN.*b: its kernel has NaN"):
        quantize_model(Holder(a=nan_kernel(), b=nan_kernel(), c=linear()))


def test_under_jit_is_refused():
    graphdef, state = nnx.split(Holder(a=linear()))

    @jax.jit
    def run(state):
        return nnx.state(quantize_model(nnx.merge(graphdef, state))[0])

    with pytest.raises(UserError, match="outside jit"):
        run(state)


def test_a_skipped_layer_can_be_quantized_later():
    model, _ = quantize_model(Holder(a=linear(), head=linear(1)))
    _, report = quantize_model(model, include=["head"], skip=())
    assert set(report.swapped) == {"head"}
    assert type(model.head) is nf4_dense
