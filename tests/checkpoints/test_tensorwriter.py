"""safetensors written piece by piece: what safetensors itself reads of them."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from qlora_jax.checkpoints.tensorfile import read_header
from qlora_jax.checkpoints.tensorwriter import TensorSpec, write_shards
from qlora_jax.errors import UserError

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "uint8": np.uint8}


def arrays_of(groups, seed=0):
    rng = np.random.default_rng(seed)
    return [{s.name: rng.integers(0, 100, s.shape).astype(DTYPES[s.dtype]) for s in group} for group in groups]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=6),
    shard_bytes=st.integers(1, 400),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_every_tensor_is_read_back_and_files_keep_their_size(tmp_path_factory, sizes, shard_bytes, dtype):
    folder = tmp_path_factory.mktemp("shards")
    groups = [[TensorSpec(f"g{i}.t{j}", (n,), dtype) for j, n in enumerate(group)] for i, group in enumerate(sizes)]
    arrays, seen = arrays_of(groups), []
    files = write_shards(
        folder, groups, arrays.__getitem__, shard_bytes=shard_bytes, progress=lambda *p: seen.append(p)
    )
    found = {}
    for file in files:
        held = load_file(file)
        in_groups = {name.partition(".")[0] for name in held}
        assert len(in_groups) == 1 or sum(array.nbytes for array in held.values()) <= shard_bytes
        found |= held
    expected = {name: array for group in arrays for name, array in group.items()}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name].view(np.uint8), array.view(np.uint8))
    total = sum(array.nbytes for array in expected.values())
    assert seen[-1] == (total, total)
    assert len(seen) == len(groups)
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == total
        assert content["weight_map"].keys() == expected.keys()
        assert {folder / file for file in content["weight_map"].values()} == set(files)


def test_the_header_says_where_each_tensor_lies(tmp_path):
    groups = [[TensorSpec("a", (3, 5), "float32"), TensorSpec("b", (8,), "uint8")]]
    (file,) = write_shards(tmp_path, groups, arrays_of(groups).__getitem__, shard_bytes=10**6)
    assert {name: (t.shape, t.start % 8) for name, t in read_header(file, ("U8",)).items()} == {
        "a": ((3, 5), 0),
        "b": ((8,), 4),
    }


@pytest.mark.parametrize(
    "made",
    [{"a": np.zeros((3, 2), np.float32)}, {"a": np.zeros((2, 3))}, {"b": np.zeros((2, 3), np.float32)}],
    ids=["shape", "dtype", "name"],
)
def test_what_was_not_planned_is_not_written(tmp_path, made):
    with pytest.raises(ValueError, match="planned"):
        write_shards(tmp_path, [[TensorSpec("a", (2, 3), "float32")]], lambda _: made, shard_bytes=100)


def test_a_full_disk_is_the_users(tmp_path, monkeypatch):
    groups = [[TensorSpec("a", (2, 3), "float32")]]
    with pytest.raises(UserError, match="too little room") as error:
        write_shards(tmp_path, [[TensorSpec("a", (10**9, 10**6), "float32")]], dict, shard_bytes=1)
    assert "4000000.00 GB are to be written" in str(error.value)
    assert not list(tmp_path.iterdir())

    def full(_):
        raise OSError(28, os.strerror(28))

    with pytest.raises(UserError, match="filled up"):
        write_shards(tmp_path, groups, full, shard_bytes=100)
