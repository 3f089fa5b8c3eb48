"""Donating host-memory state: plain jit can abort the process, `paged_jit` is right in every order."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.optim import paged_jit

DONATION = Path(__file__).with_name("donation.py")


def _run(how: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, str(DONATION), how], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def test_plain_jit_aborts() -> None:
    # Where this fails, jax has mended its pairing of donated buffers, and the warnings about it can go.
    result = _run("plain")
    assert result.returncode < 0, result.stdout + result.stderr
    assert "right" not in result.stdout


def test_paged_jit_is_right_in_every_order() -> None:
    result = _run("paged")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["right"] * 6 * 2 * 4


def test_results_take_the_sharding_of_the_matching_argument() -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def placed(kind: str, *spec: str | None) -> jax.Array:
        sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec), memory_kind=kind)
        return jax.device_put(jnp.ones((8, 8)), sharding)

    params = {"a": placed("device", "x"), "b": placed("device", None, "x")}
    state = {"a": placed("pinned_host", "x"), "b": placed("pinned_host", None, "x")}

    def step(state: dict, params: dict, rate: float) -> tuple:
        return {"loss": rate * jnp.sum(params["a"])}, {"next": state}, params

    args = (state, params, 0.5)
    metrics, nested, got = paged_jit(step, *args, donate_argnums=(0, 1))(*args)
    assert float(metrics["loss"]) == 32.0
    assert metrics["loss"].sharding.is_fully_replicated
    for name, spec in (("a", ("x",)), ("b", (None, "x"))):
        for array, kind in ((nested["next"][name], "pinned_host"), (got[name], "device")):
            assert array.sharding.is_equivalent_to(
                jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec), memory_kind=kind), 2
            )
            assert array.sharding.memory_kind == kind


def test_examples_may_be_shapes_numpy_arrays_numbers_and_keys() -> None:
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    shape = jax.ShapeDtypeStruct((40, 64), jnp.float32, sharding=host)

    def step(state: jax.Array, batch: jax.Array, key: jax.Array, count: int) -> tuple:
        noise = jax.random.normal(key, state.shape)
        return jax.random.fold_in(key, 1), count + 1, batch.sum(), jax.device_put(noise, jax.memory.Space.Host)

    args = (np.ones(3, np.float32), jax.random.key(0), 1)
    jitted = paged_jit(step, shape, *args, donate_argnums=0)
    key, count, total, state = jitted(jax.device_put(jnp.zeros((40, 64)), host), *args)
    assert (int(count), float(total), state.sharding.memory_kind) == (2, 3.0, "pinned_host")
    assert key.sharding.memory_kind == "device"


def test_another_memory_kind_than_the_examples_is_an_error() -> None:
    host = jax.device_put(jnp.ones((40, 64)), jax.memory.Space.Host)
    jitted = paged_jit(lambda x: x, host, donate_argnums=0)
    with pytest.raises(ValueError, match="emory kind"):
        jitted(jnp.ones((40, 64)))
