"""Optimizer checkpoints move between paged and unpaged runs: one tree, other memory kinds."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from qlora_jax.optim import paged


@pytest.mark.parametrize("saved_paged", [True, False], ids=["paged to unpaged", "unpaged to paged"])
def test_orbax_round_trip(saved_paged: bool, params: Any, page_bytes: int, tmp_path: Path) -> None:
    txs = {True: paged(optax.adamw(1e-2), page_bytes), False: optax.adamw(1e-2)}
    states = {how: jax.jit(tx.update)(params, tx.init(params), params)[1] for how, tx in txs.items()}
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), txs[not saved_paged].init(params)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", states[saved_paged])
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", like)
    assert jax.tree.structure(restored) == jax.tree.structure(states[saved_paged])
    for got, saved, wanted in zip(
        jax.tree.leaves(restored), jax.tree.leaves(states[saved_paged]), jax.tree.leaves(like), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(saved))
        assert got.sharding.memory_kind == wanted.sharding.memory_kind
    tx = txs[not saved_paged]
    updates, state = jax.jit(tx.update)(params, restored, params)
    assert int(optax.tree.get(state, "count")) == 2
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))
