"""What couples leaves, or the rows of a leaf to be walked, is refused at init."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from qlora_jax.errors import UserError
from qlora_jax.optim import paged

COUPLED_LEAVES: dict[str, Callable[[], Any]] = {
    "global norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "global norm under a mask": lambda: optax.chain(
        optax.masked(optax.clip_by_global_norm(1.0), lambda p: jax.tree.map(lambda x: x.ndim == 1, p)), optax.adam(1e-3)
    ),
    "global norm in one partition": lambda: optax.partition(
        {"a": optax.adam(1e-3), "b": optax.chain(optax.normalize_by_update_norm(), optax.sgd(1e-3))},
        lambda p: jax.tree.map(lambda x: "b" if x.ndim == 1 else "a", p),
    ),
    "global norm inside MultiSteps": lambda: optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), every_k_schedule=2
    ),
}


@pytest.fixture
def several() -> dict[str, jax.Array]:
    return {"a": jnp.ones((12, 128)), "b": jnp.ones(5), "c": jnp.ones(6), "d": jnp.ones((3, 3))}


@pytest.mark.parametrize("page_bytes", [1024, 1 << 26])
@pytest.mark.parametrize("name", COUPLED_LEAVES)
def test_one_leaf_reaches_another(name: str, page_bytes: int, several: Any) -> None:
    with pytest.raises(UserError, match="depends on other leaves"):
        paged(COUPLED_LEAVES[name](), page_bytes).init(several)


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(
            lambda: optax.MultiSteps(optax.adam(1e-3), 2, should_skip_update_fn=optax.skip_not_finite), id="skip"
        ),
        pytest.param(lambda: optax.apply_if_finite(optax.adam(1e-3), 3), id="apply_if_finite"),
        pytest.param(lambda: optax.contrib.prodigy(1e-3), id="prodigy"),
    ],
)
def test_a_scalar_of_all_leaves(tx: Callable[[], Any], several: Any) -> None:
    with pytest.raises(UserError, match="depends on"):
        paged(tx()).init(several)


def test_one_noise_key_for_all_leaves(several: Any) -> None:
    with pytest.raises(UserError, match="depends on o"):
        paged(optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adam(1e-3)), 1024).init(several)


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(lambda: optax.lamb(1e-3), id="lamb"),
        pytest.param(lambda: optax.chain(optax.clip_by_block_rms(1.0), optax.adam(1e-3)), id="adafactor's rms"),
        pytest.param(lambda: optax.chain(optax.adam(1e-3), optax.scale_by_param_block_rms()), id="adafactor's scale"),
        pytest.param(lambda: optax.contrib.muon(1e-3), id="muon"),
    ],
)
def test_one_row_reaches_another(tx: Callable[[], Any], several: Any) -> None:
    with pytest.raises(UserError, match=r"in \['a'\], which is larger than a page"):
        paged(tx(), 1024).init(several)
    paged(tx(), 1 << 20).init(several)  # leaves whole in their pages: nothing to refuse


def test_a_state_that_joins_leaves(several: Any) -> None:
    with pytest.raises(UserError, match="cannot be initialised for some of the parameters alone"):
        paged(optax.flatten(optax.adam(1e-3)), 1024).init(several)


def test_a_state_that_depends_on_all_leaves(several: Any) -> None:
    mixed = {**several, "d": several["d"].astype(jnp.bfloat16)}
    rate = optax.inject_hyperparams(optax.adamw)
    with pytest.raises(UserError, match="is not made leaf by leaf"):
        paged(rate(learning_rate=1e-3), 30).init(mixed)
    paged(optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.float32)(learning_rate=1e-3), 30).init(mixed)


def test_nan_checks_do_not_stop_the_trial(several: Any) -> None:
    with jax.debug_nans(True):
        paged(optax.adamw(1e-3), 1024).init(several)


def test_init_under_jit_is_checked_too(several: Any) -> None:
    state = jax.jit(paged(optax.adamw(1e-3), 1024).init)(several)
    assert state[0].mu["a"].sharding.memory_kind == "pinned_host"
    with pytest.raises(UserError, match="depends on other leaves"):
        jax.jit(paged(COUPLED_LEAVES["global norm"]()).init)(several)
