"""`paged(tx)` is `tx`: the same parameters and state, step after step, with the large state arrays in host memory."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.errors import UserError
from qlora_jax.optim import host_kind_available, paged, paged_jit, paging

BOUND = 3.6e-7  # from other fusions; parameters are of order 1


def _labels(params: Any) -> Any:
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


TRANSFORMATIONS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "lion": lambda: optax.lion(1e-3),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "stateless": lambda: optax.sgd(1e-2),
    "schedule": lambda: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 4)),
    "masked": lambda: optax.chain(optax.masked(optax.add_decayed_weights(0.1), _matrices), optax.adam(1e-2)),
    "partition": lambda: optax.partition(
        {"matrix": optax.adamw(1e-2), "vector": optax.sgd(0.1, momentum=0.9)}, _labels
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.linear_schedule(1e-2, 0.0, 4)
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=2),
    "one page where the state has another shape": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_equals_the_unpaged_transformation(
    name: str, params: Any, page_bytes: int, max_difference: Callable[..., float]
) -> None:
    assert max_difference(TRANSFORMATIONS[name](), params, page_bytes) <= BOUND


def test_masks_and_labels_may_be_trees(params: Any, page_bytes: int, max_difference: Callable[..., float]) -> None:
    decay = optax.masked(optax.add_decayed_weights(0.1), _matrices(params))
    parts = optax.partition({"matrix": optax.lion(1e-3), "vector": optax.sgd(0.1)}, _labels(params))
    assert max_difference(optax.chain(decay, parts), params, page_bytes, steps=2) <= BOUND


@pytest.mark.parametrize("page_bytes", [1, 1 << 30])
def test_any_page_size(page_bytes: int, params: Any, max_difference: Callable[..., float]) -> None:
    assert max_difference(optax.adamw(1e-2), params, page_bytes) <= BOUND


def test_a_leaf_that_is_the_whole_tree(max_difference: Callable[..., float]) -> None:
    assert max_difference(optax.adamw(1e-2), jnp.linspace(-1.0, 1.0, 11 * 1024).reshape(11, 1024), 8192) <= BOUND


def test_state_and_updates_of_another_dtype(params: Any, page_bytes: int, max_difference: Callable[..., float]) -> None:
    assert max_difference(optax.adamw(1e-2, mu_dtype=jnp.bfloat16), params, page_bytes) <= BOUND
    wider = optax.chain(
        optax.trace(0.9), optax.stateless(lambda u, _: jax.tree.map(lambda x: x.astype(jnp.float32), u))
    )
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"a": params["exact"], "b": params["nested"]["overlap"]})
    tx = paged(wider, page_bytes // 2)
    gradient = jax.tree.map(jnp.sin, half)
    state = tx.init(half)
    updates, state = jax.jit(tx.update)(gradient, state, half)
    want, want_state = jax.jit(wider.update)(gradient, wider.init(half), half)
    for got, wanted in zip(jax.tree.leaves((updates, state)), jax.tree.leaves((want, want_state)), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(wanted, np.float32))


def test_without_params_and_outside_jit(params: Any, page_bytes: int) -> None:
    tx, unpaged = paged(optax.trace(0.9), page_bytes), optax.trace(0.9)
    updates, state = tx.update(params, tx.init(params))
    want, want_state = unpaged.update(params, unpaged.init(params))
    for got, wanted in zip(jax.tree.leaves((updates, state)), jax.tree.leaves((want, want_state)), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


def test_counts_are_found_and_advance_once(params: Any, page_bytes: int) -> None:
    tx = paged(optax.adamw(optax.constant_schedule(1e-2)), page_bytes)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(3):
        _, state = update(params, state, params)
    counts = [count for _, count in optax.tree.get_all_with_path(state, "count")]
    assert [int(count) for count in counts] == [3, 3]
    assert all(count.sharding.memory_kind == "device" for count in counts)
    rate = paged(optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2), page_bytes)
    assert float(optax.tree.get(rate.init(params), "learning_rate")) == pytest.approx(1e-2)


def test_a_hyperparameter_set_by_hand(params: Any, page_bytes: int) -> None:
    unpaged = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0, momentum=0.9)
    tx = paged(unpaged, page_bytes)
    state = optax.tree.set(tx.init(params), learning_rate=0.25)
    updates, _ = jax.jit(tx.update)(params, state, params)
    np.testing.assert_allclose(np.asarray(updates["exact"]), -0.25 * np.asarray(params["exact"]), rtol=1e-6)


def test_extra_arguments_reach_the_transformation(params: Any, page_bytes: int) -> None:
    def update(updates: Any, state: Any, params: Any = None, *, value: Any, like: Any) -> Any:
        return jax.tree.map(lambda u, x: u * value + x, updates, like), jax.tree.map(lambda u, m: m + u, updates, state)

    unpaged = optax.GradientTransformationExtraArgs(optax.tree.zeros_like, update)
    tx = paged(unpaged, page_bytes)
    state = tx.init(params)
    like = jax.tree.map(jnp.cos, params)
    got, _ = jax.jit(tx.update)(params, state, params, value=jnp.float32(2.0), like=like)
    want, _ = unpaged.update(params, unpaged.init(params), params, value=2.0, like=like)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)


def test_extra_arguments_are_tried_out_too(params: Any, page_bytes: int) -> None:
    def update(updates: Any, state: Any, params: Any = None, *, value: Any) -> Any:
        return jax.tree.map(lambda u: u * value / optax.tree.norm(updates), updates), state

    tx = paged(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update), page_bytes)
    state = tx.init(params)
    with pytest.raises(UserError, match="depends on other leaves"):
        jax.jit(tx.update)(params, state, params, value=jnp.float32(1.0))


def test_nnx_states_are_parameters(page_bytes: int) -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a = nnx.LoRAParam(jax.random.normal(rngs.params(), (10, 256)))
            self.b = nnx.LoRAParam(jnp.ones((4, 4)))
            self.base = nnx.Linear(8, 8, rngs=rngs)

    params = nnx.state(Model(nnx.Rngs(0)), nnx.LoRAParam)
    unpaged = optax.chain(optax.masked(optax.add_decayed_weights(0.1), _matrices), optax.adam(1e-2))
    tx = paged(unpaged, page_bytes)
    state, want_state = tx.init(params), unpaged.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(want_state)
    gradient = jax.tree.map(jnp.sin, params)
    step = paged_jit(tx.update, gradient, state, params, donate_argnums=(0, 1))
    updates, state = step(gradient, state, params)
    want, want_state = jax.jit(unpaged.update)(jax.tree.map(jnp.sin, params), want_state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(want)
    assert jax.tree.structure(state) == jax.tree.structure(want_state)
    for a, b in zip(jax.tree.leaves((updates, state)), jax.tree.leaves((want, want_state)), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=BOUND)


def test_sharded_over_four_devices(page_bytes: int) -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "x")
    plain = jnp.linspace(-1.0, 1.0, 10 * 16 * 16).reshape(10, 16, 16)
    params = {"w": jax.device_put(plain, jax.NamedSharding(mesh, spec)), "b": jnp.ones(3)}
    tx, unpaged = paged(optax.adamw(1e-2), page_bytes), optax.adamw(1e-2)
    state, want, want_state = (
        tx.init(params),
        {"w": plain, "b": jnp.ones(3)},
        unpaged.init({"w": plain, "b": jnp.ones(3)}),
    )

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return state, optax.apply_updates(params, updates)

    donating = paged_jit(step, params, state, donate_argnums=(0, 1))
    for _ in range(3):
        state, params = donating(params, state)
        updates, want_state = unpaged.update(jax.tree.map(jnp.sin, want), want_state, want)
        want = optax.apply_updates(want, updates)
    for array, kind in ((params["w"], "device"), (state[0].mu["w"], "pinned_host"), (state[0].nu["w"], "pinned_host")):
        assert array.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec, memory_kind=kind), 3)
    np.testing.assert_allclose(np.asarray(params["w"]), np.asarray(want["w"]), atol=BOUND)


def test_a_state_from_device_memory_goes_to_the_host(params: Any, page_bytes: int) -> None:
    tx, unpaged = paged(optax.adam(1e-2), page_bytes), optax.adam(1e-2)
    _, state = jax.jit(tx.update)(params, unpaged.init(params), params)
    assert state[0].mu["nested"]["overlap"].sharding.memory_kind == "pinned_host"
    assert state[0].mu["deep"].sharding.memory_kind == "pinned_host"


def test_the_transformation_itself_where_there_is_no_host_memory(
    params: Any, page_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging, "host_kind_available", lambda: False)
    unpaged = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))
    tx = paged(unpaged, page_bytes)
    state, want_state = tx.init(params), unpaged.init(params)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == {"device"}
    updates, _ = jax.jit(tx.update)(params, state, params)
    want, _ = jax.jit(unpaged.update)(params, want_state, params)
    np.testing.assert_array_equal(np.asarray(updates["exact"]), np.asarray(want["exact"]))


def test_leaves_that_cannot_be_walked_are_told_at_init(
    params: Any, page_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="qlora_jax"):
        paged(optax.adafactor(1e-2, min_dim_size_to_factor=8), page_bytes).init(params)
    told = [record.getMessage() for record in caplog.records]
    assert any("['exact']: 9216 bytes in one page" in message and "without the axis 0" in message for message in told)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="qlora_jax"):
        paged(optax.adamw(1e-2), page_bytes).init(params)
    assert not caplog.records


def test_trees_without_leaves() -> None:
    tx = paged(optax.adam(1e-2))
    state = tx.init({"a": None})
    updates, state = tx.update({"a": None}, state, {"a": None})
    assert updates == {"a": None}
    assert int(state[0].count) == 1


def test_the_cpu_has_host_memory() -> None:
    assert host_kind_available()


def test_mistakes_are_named(params: Any) -> None:
    with pytest.raises(UserError, match="page_bytes=0"):
        paged(optax.adam(1e-2), 0)
    with pytest.raises(UserError, match=r"\['w'\] has dtype uint8"):
        paged(optax.adam(1e-2)).init({"w": jnp.zeros((4, 4), jnp.uint8)})
    tx = paged(optax.adam(1e-2))
    state = tx.init(params)
    with pytest.raises(UserError, match="the updates have leaves"):
        tx.update({"bias": params["bias"]}, state, params)
