"""A small tree of parameters with every kind of leaf, and a comparison of a paged with an unpaged run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.optim import paged, paged_jit

# With 1 KiB rows: `exact` is walked 3 rows at a time, `overlap` (11 rows) 2 at a time, `deep` one entry at a time since
# an entry is larger than a page; the rest is grouped.
PAGE_BYTES = 3 * 1024 + 100


def make_params() -> dict[str, Any]:
    def array(i: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape)

    return {
        "bias": array(0, 7),
        "deep": array(1, 3, 32, 40),
        "exact": array(2, 9, 16, 16),
        "frozen": None,
        "nested": {"overlap": array(3, 11, 256), "scalar": jnp.float32(0.5)},
        "small": [array(4, 5, 6), array(5, 24, 24)],
    }


def gradient(params: Any, step: int) -> Any:
    """A gradient that depends on the parameters, as a real one does."""
    return jax.tree.map(
        lambda p: jnp.sin(p * (step + 1) + 1e-3 * jnp.arange(p.size, dtype=p.dtype).reshape(p.shape)), params
    )


@pytest.fixture
def params() -> dict[str, Any]:
    return make_params()


@pytest.fixture
def page_bytes() -> int:
    return PAGE_BYTES


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


@pytest.fixture
def max_difference() -> Callable[..., float]:
    """The largest difference of any parameter or state entry between an unpaged and a paged, donated run of `tx`."""

    def run(tx: Any, params: Any, page_bytes: int, steps: int = 4, **extra: Any) -> float:
        wrapped = paged(tx, page_bytes)
        tx = tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else optax.with_extra_args_support(tx)

        def step(tx: Any, params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
            updates, state = tx.update(gradient, state, params, **extra)
            return optax.apply_updates(params, updates), state

        want, want_state = params, tx.init(params)
        got, state = _copy(params), wrapped.init(params)
        assert jax.tree.structure(state) == jax.tree.structure(want_state)
        assert_same(state, want_state, 0.0)
        plain = jax.jit(lambda *args: step(tx, *args))
        donating = paged_jit(lambda *args: step(wrapped, *args), got, state, gradient(params, 0), donate_argnums=(0, 1))
        for k in range(steps):
            g = gradient(want, k)
            want, want_state = plain(want, want_state, g)
            got, state = donating(got, state, _copy(g))
        assert jax.tree.structure(state) == jax.tree.structure(want_state)
        assert {x.dtype for x in jax.tree.leaves(state)} == {x.dtype for x in jax.tree.leaves(want_state)}
        for leaf in jax.tree.leaves(state):
            on_host = leaf.ndim > 0 and leaf.nbytes >= 4096
            assert leaf.sharding.memory_kind == ("pinned_host" if on_host else "device")
        return max(difference(got, want), difference(state, want_state))

    return run


def difference(a: Any, b: Any) -> float:
    return max(
        (float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max()) for x, y in _pairs(a, b)),
        default=0.0,
    )


def assert_same(a: Any, b: Any, atol: float) -> None:
    for x, y in _pairs(a, b):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert difference(a, b) <= atol


def _pairs(a: Any, b: Any) -> list[tuple[Any, Any]]:
    return list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
