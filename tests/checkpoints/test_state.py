import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.checkpoints.state import CheckpointStore
from qlora_jax.errors import UserError


def trees(step=0):
    adapter = {
        "layers": {"q_proj": {"lora_a": jnp.arange(24.0).reshape(2, 4, 3) + step, "lora_b": jnp.ones((2, 3, 4))}}
    }
    tx = optax.chain(optax.clip(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)))
    state = tx.init(adapter)
    for _ in range(2):
        _, state = tx.update(jax.tree.map(lambda x: 0.1 * x, adapter), state, adapter)
    return adapter, state


def save(store, step, adapter, optimizer, **more):
    store.save(step, adapter=adapter, optimizer=optimizer, data={"position": step}, fingerprint={"base": "ab"}, **more)


def assert_same(restored, expected):
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_round_trip_is_bit_equal_and_keeps_the_trees_classes(tmp_path):
    adapter, optimizer = trees()
    store = CheckpointStore(tmp_path / "a/b")
    assert store.latest() is None
    save(store, 7, adapter, optimizer)
    zeros = jax.tree.map(jnp.zeros_like, (adapter, optimizer))
    result = CheckpointStore(tmp_path / "a/b").restore(7, adapter_like=zeros[0], optimizer_like=zeros[1])
    assert_same(result["adapter"], adapter)
    assert_same(result["optimizer"], optimizer)
    assert isinstance(result["optimizer"][1][0], optax.ScaleByAdamState)
    assert int(optax.tree.get(result["optimizer"][1][0], "count")) == 2
    assert result["data"] == {"position": 7}
    assert result["fingerprint"] == {"base": "ab"}


def test_an_optimizer_without_state(tmp_path):
    adapter, _ = trees()
    optimizer = optax.sgd(0.1).init(adapter)
    store = CheckpointStore(tmp_path)
    save(store, 1, adapter, optimizer)
    assert_same(store.restore(1, adapter_like=adapter, optimizer_like=optimizer)["optimizer"], optimizer)


@pytest.mark.parametrize("saved_kind", ["device", "pinned_host"])
@pytest.mark.parametrize("asked_kind", ["device", "pinned_host"])
def test_memory_kind_follows_what_is_asked_for(tmp_path, saved_kind, asked_kind):
    device = jax.devices()[1]
    place = {kind: jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for kind in (saved_kind, asked_kind)}
    adapter, optimizer = trees()
    store = CheckpointStore(tmp_path)
    save(store, 1, adapter, jax.device_put(optimizer, place[saved_kind]))
    like = jax.device_put(jax.tree.map(jnp.zeros_like, optimizer), place[asked_kind])
    result = store.restore(1, adapter_like=adapter, optimizer_like=like)["optimizer"]
    assert_same(result, optimizer)
    assert {leaf.sharding for leaf in jax.tree.leaves(result)} == {place[asked_kind]}
    # What tracing sees, too: a paged step refuses to mix memory spaces.
    space = jax.memory.Space.Host if asked_kind == "pinned_host" else jax.memory.Space.Device
    assert {jax.typeof(leaf).memory_space for leaf in jax.tree.leaves(result)} == {space}


def test_shardings_follow_what_is_asked_for(tmp_path):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.sharding.NamedSharding(mesh, jax.P(None, "x"))
    adapter, optimizer = trees()
    store = CheckpointStore(tmp_path)
    save(store, 1, adapter, optimizer)
    like = {
        "layers": {
            "q_proj": {
                "lora_a": jax.ShapeDtypeStruct((2, 4, 3), jnp.float32, sharding=sharded),
                "lora_b": adapter["layers"]["q_proj"]["lora_b"],
            }
        }
    }
    result = store.restore(1, adapter_like=like, optimizer_like=optimizer)["adapter"]
    assert result["layers"]["q_proj"]["lora_a"].sharding == sharded
    assert_same(result, adapter)


def test_retention_keeps_the_newest(tmp_path):
    adapter, optimizer = trees()
    store = CheckpointStore(tmp_path, keep=2)
    for step in (5, 10, 100, 20):
        save(store, step, adapter, optimizer)
    assert store.steps() == [20, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100", "20"]


def test_a_step_saved_again_is_replaced(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 5, *trees())
    adapter, optimizer = trees(step=1)
    save(store, 5, adapter, optimizer)
    assert_same(store.restore(5, adapter_like=adapter, optimizer_like=optimizer)["adapter"], adapter)


def test_latest_ignores_what_is_not_a_complete_step(tmp_path):
    adapter, optimizer = trees()
    store = CheckpointStore(tmp_path)
    save(store, 3, adapter, optimizer)
    shutil.copytree(tmp_path / "3", tmp_path / ".saving-9")
    shutil.copytree(tmp_path / "3" / "arrays", tmp_path / "8" / "arrays")
    shutil.copytree(tmp_path / "3", tmp_path / "old")
    (tmp_path / "12").write_text("")
    assert store.latest() == 3
    assert store.steps() == [3]
    save(store, 4, adapter, optimizer)
    assert not (tmp_path / ".saving-9").exists()


def test_another_adapter_is_refused_by_name(tmp_path):
    adapter, optimizer = trees()
    store = CheckpointStore(tmp_path)
    save(store, 1, adapter, optimizer)
    other = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], x.shape[-1] + 1)), adapter)
    with pytest.raises(UserError, match=r"adapter .*layers\.q_proj\.lora_a: \[\[2, 4, 3\], 'float32'\] in the"):
        store.restore(1, adapter_like=other, optimizer_like=optimizer)
    with pytest.raises(UserError, match=r"optimizer .*not in the checkpoint.*only in the checkpoint"):
        store.restore(1, adapter_like=adapter, optimizer_like=optax.sgd(0.1, momentum=0.9).init(adapter))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter)
    with pytest.raises(UserError, match="bfloat16"):
        store.restore(1, adapter_like=half, optimizer_like=optimizer)


def test_missing_step_and_damaged_step(tmp_path):
    adapter, optimizer = trees()
    store = CheckpointStore(tmp_path)
    with pytest.raises(UserError, match="no complete checkpoint of step 4"):
        store.restore(4, adapter_like=adapter, optimizer_like=optimizer)
    for step in (4, 6):
        save(store, step, adapter, optimizer)
    files = (path for path in (tmp_path / "6" / "arrays").rglob("*") if path.is_file())
    file = max(files, key=lambda path: path.stat().st_size)
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    assert store.latest() == 4
    with pytest.raises(UserError, match=rf"(?s)step 6 .*{file.name} has {len(data) - 1} bytes, {len(data)} were"):
        store.restore(6, adapter_like=adapter, optimizer_like=optimizer)
    file.unlink()
    assert store.steps() == [4]
    (tmp_path / "4" / "checkpoint.json").write_text('{"step": 4')
    assert store.latest() is None


def test_data_that_json_cannot_write_leaves_nothing_behind(tmp_path):
    adapter, optimizer = trees()
    with pytest.raises(TypeError):
        CheckpointStore(tmp_path / "a").save(
            1, adapter=adapter, optimizer=optimizer, data={"x": object()}, fingerprint={}
        )
    assert not (tmp_path / "a").exists()


def test_a_folder_that_is_a_file_and_a_useless_keep(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(UserError, match="is a file"):
            save(CheckpointStore(path), 1, *trees())
    with pytest.raises(UserError, match="keep=0"):
        CheckpointStore(tmp_path, keep=0)


SAVE_FOREVER = """
import sys, jax.numpy as jnp
from qlora_jax.checkpoints.state import CheckpointStore
store = CheckpointStore(sys.argv[1], keep=1)
first = (store.latest() or 0) + 1
for step in range(first, 100000):
    adapter = {"a": jnp.full((64, 64), step, jnp.float32), "b": jnp.full((16,), step, jnp.float32)}
    store.save(step, adapter=adapter, optimizer={"m": jnp.full((64, 64), step, jnp.float32)},
               data={"step": step}, fingerprint={})
    print(step, flush=True)
"""


def test_sigkill_while_saving_never_leaves_a_broken_latest(tmp_path):
    """keep=1: writing, renaming and deleting are all under way most of the time."""
    rng = random.Random(0)
    like = {"a": jnp.zeros((64, 64)), "b": jnp.zeros(16)}
    last = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        acknowledged = int(process.stdout.readline())
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        acknowledged = max([acknowledged, *map(int, rest)])
        store = CheckpointStore(tmp_path, keep=1)
        latest = store.latest()
        assert latest >= acknowledged > last
        result = store.restore(latest, adapter_like=like, optimizer_like={"m": jnp.zeros((64, 64))})
        assert result["data"] == {"step": latest}
        for leaf in jax.tree.leaves((result["adapter"], result["optimizer"])):
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, latest, np.float32))
        last = latest
