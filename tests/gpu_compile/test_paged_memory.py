"""The device memory that `paged` needs, from XLA's own GPU compiler: 4 pages at most, whatever the leaves.

The CPU's memory_analysis() shows none of this: there, host memory and device memory are one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from qlora_jax.optim import paged, paged_jit
from qlora_jax.optim.placement import lives_on_host, nbytes

pytestmark = pytest.mark.gpu_compile

MIB = 2**20
PAGE = 4 * MIB
SLACK = 128 * 1024  # scalars and alignment


# Gradients that exist in full before the first update, as global-norm clipping makes them: without it XLA may hold back
# the last products of the backward pass until a page asks for its gradient, or fuse them into an unpaged update.
COMPLETE = optax.stateless(lambda gradient, _: jax.lax.optimization_barrier(gradient))


def _stack(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _placed(tree: Any, on_host: Callable[[Any], bool]) -> Any:
    def place(x: Any) -> jax.ShapeDtypeStruct:
        kind = "pinned_host" if on_host(x) else "device"
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def _compile(gpu_compile: Any, gradient: Callable[..., Any], tx: Any, params: Any, *batch: Any, host: bool) -> Any:
    """A training step, parameters and state donated."""
    state = _placed(jax.eval_shape(tx.init, params), lambda x: host and lives_on_host(x))
    args = (_placed(params, lambda _: False), state, *_placed(batch, lambda _: False))

    def step(params: Any, state: Any, *batch: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradient(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    return gpu_compile(paged_jit(step, *args, donate_argnums=(0, 1)), *args)


def _sines(params: Any) -> Any:
    return jax.lax.optimization_barrier(jax.tree.map(jnp.sin, params))


LEAVES: dict[str, tuple[Any, int]] = {
    "small leaves, one page each": ({f"w{i:02d}": _stack(1024, 1024) for i in range(12)}, PAGE),
    "twice as many": ({f"w{i:02d}": _stack(1024, 1024) for i in range(24)}, PAGE),
    "small leaves in groups": ({f"w{i:02d}": _stack(100, 1000) for i in range(60)}, PAGE),
    "a stack, pages divide it": ({"w": _stack(64, 512, 512)}, PAGE),
    "three stacks": ({name: _stack(64, 512, 512) for name in "abc"}, PAGE),
    "three stacks, slices overlap": ({name: _stack(67, 512, 512) for name in "abc"}, PAGE),
    "slices overlap, odd page": ({"w": _stack(67, 512, 512)}, 13 * MIB // 2),
    "16-bit stacks": ({name: _stack(63, 512, 512, dtype=jnp.bfloat16) for name in "abc"}, PAGE),
    "one entry is larger than a page": ({"w": _stack(9, 2048, 1024)}, PAGE),
    "all kinds": (
        {
            **{name: _stack(67, 512, 512) for name in "abc"},
            **{f"w{i:02d}": _stack(100, 1000) for i in range(20)},
            "deep": _stack(5, 2048, 512),
        },
        PAGE,
    ),
}


@pytest.mark.parametrize("name", LEAVES)
def test_an_update_costs_four_pages(name: str, gpu_compile: Any) -> None:
    params, page_bytes = LEAVES[name]
    base = _compile(gpu_compile, _sines, optax.scale(-1e-3), params, host=False)
    got = _compile(gpu_compile, _sines, paged(optax.adamw(1e-3), page_bytes), params, host=True)
    entry = max((nbytes(p) // p.shape[0] for p in params.values() if nbytes(p) > page_bytes), default=0)
    assert got.device_peak - base.device_peak <= 4 * max(page_bytes, entry) + SLACK
    state = sum(2 * nbytes(p) for p in params.values())
    assert state == got.host_arguments == got.host_aliased  # all of it on the host, updated in place
    assert got.host_temp == 0


def test_lion_needs_less(gpu_compile: Any) -> None:
    params = {name: _stack(64, 512, 512) for name in "ab"}
    base = _compile(gpu_compile, _sines, optax.scale(-1e-3), params, host=False)
    got = _compile(gpu_compile, _sines, paged(optax.lion(1e-3), PAGE), params, host=True)
    assert got.device_peak - base.device_peak <= 3 * PAGE + SLACK


def _loss(params: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w), None

    for name in sorted(params):
        if params[name].ndim == 3:
            x, _ = jax.lax.scan(jax.checkpoint(layer), x, params[name])
        else:
            x, _ = layer(x, params[name])
    return jnp.sum(x * x)


TRAINED = {
    "layer by layer": {f"w{i:02d}": _stack(1024, 1024) for i in range(12)},
    "stacked": {"a": _stack(32, 512, 512), "b": _stack(33, 512, 512)},
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_with_paged_adamw_peaks_like_one_without_state(name: str, gpu_compile: Any) -> None:
    params = TRAINED[name]
    x = _stack(256, next(iter(params.values())).shape[-1])
    gradient = jax.grad(_loss)
    before = (optax.clip_by_global_norm(1.0), COMPLETE)
    peaks = {
        how: _compile(gpu_compile, gradient, optax.chain(*before, tx), params, x, host=how == "paged").device_peak
        for how, tx in {
            "stateless": optax.scale(-1e-3),
            "paged": paged(optax.adamw(1e-3), PAGE),
            "on the device": optax.adamw(1e-3),
        }.items()
    }
    state = sum(2 * nbytes(p) for p in params.values())
    assert peaks["paged"] <= peaks["stateless"] + 4 * PAGE + SLACK
    assert peaks["on the device"] >= peaks["stateless"] + state - SLACK  # what paging saves
