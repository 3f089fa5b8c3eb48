"""Attention as one kernel in tiles of bfloat16: against the library in float32, and against attention in blocks."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models import attention
from qlora_jax.models.attention import attend, visible
from qlora_jax.models.blockwise import blockwise_attention
from qlora_jax.models.fused_attention import fused_attention
from qlora_jax.nf4 import use_kernels
from qlora_jax.nf4.kernels import ATTENTION_TARGET, cpu_computes_in_tiles

here = pytest.mark.skipif(
    not cpu_computes_in_tiles(jnp.bfloat16),
    reason="this machine has no AMX; test_every_instruction_set runs these tests on a model of it",
)
# batch, seq, heads, kv_heads, head_dim: blocks are of 32 tokens by 32 features, four of them gathered.
SHAPES = [
    (2, 70, 4, 2, 64),
    (1, 33, 3, 1, 40),
    (1, 160, 3, 3, 96),
    (2, 300, 2, 1, 16),
    (1, 17, 1, 1, 7),
    (3, 1, 2, 1, 8),
]


def draw(shape):
    batch, seq, heads, kv_heads, head_dim = shape
    rng = np.random.default_rng(shape)
    counts = (heads, kv_heads, kv_heads, heads)
    return [jnp.asarray(rng.standard_normal((batch, seq, n, head_dim)), jnp.bfloat16) for n in counts]


def window(batch, seq):
    """Two examples in a row, cut at other places in each, and nothing further back than 40 tokens."""
    segments = jnp.asarray(np.arange(seq)[None, :] < seq // 3 + np.arange(batch)[:, None], jnp.int32)
    at = np.arange(seq)
    return visible(segments, segments) & (at[:, None] - at < 40)[None]


def with_gradients(attend, query, key, value, mask, dy):
    y, pull_back = jax.vjp(lambda *operands: attend(*operands, mask), query, key, value)
    return y, *pull_back(dy)


def exactly(query, key, value, mask, dy):
    """y and the three gradients in float64."""
    group = query.shape[2] // key.shape[2]
    query, key, value, dy = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (query, key, value, dy))
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    seen = np.tril(np.ones((query.shape[2],) * 2, bool))
    seen = seen if mask is None else seen & np.asarray(mask)[:, None]
    scale = query.shape[-1] ** -0.5
    scores = np.where(seen, query @ key.swapaxes(2, 3) * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = dy @ value.swapaxes(2, 3)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) * scale
    d_key, d_value = d_scores.swapaxes(2, 3) @ query, weights.swapaxes(2, 3) @ dy
    d_key, d_value = (x.reshape(len(x), -1, group, *x.shape[2:]).sum(axis=2) for x in (d_key, d_value))
    return [x.swapaxes(1, 2) for x in (weights @ value, d_scores @ key, d_key, d_value)]


def distance(x, exact):
    return np.linalg.norm(np.asarray(x, np.float64) - exact)


@here
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, masked):
    *operands, dy = draw(shape)
    mask = window(*shape[:2]) if masked else None
    ours = jax.jit(lambda *a: with_gradients(fused_attention, *a, mask, dy))(*operands)
    for own, exact in zip(ours, exactly(*operands, mask, dy), strict=True):
        assert own.dtype == jnp.bfloat16
        assert own.shape == exact.shape
        # Weights, their gradients and results are rounded to 8 bits, each to 2^-9 at most.
        assert distance(own, exact) <= 2**-8 * np.linalg.norm(exact)


@here
def test_it_is_as_exact_as_attention_in_blocks():
    *operands, dy = draw((1, 200, 3, 1, 64))
    exact = exactly(*operands, None, dy)
    ours = with_gradients(fused_attention, *operands, None, dy)
    blocks = jax.jit(lambda: with_gradients(blockwise_attention, *operands, None, dy))()
    for own, other, expected in zip(ours, blocks, exact, strict=True):
        assert distance(own, expected) <= 1.02 * distance(other, expected)


@here
def test_large_scores_neither_overflow_nor_vanish():
    query, key, value, dy = draw((1, 64, 1, 1, 32))
    for factor in (1e2, 1e-3, 0.0):
        scaled = (query * factor, key * 1e2, value)
        ours = with_gradients(fused_attention, *scaled, None, dy)
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in ours)
        exact = exactly(*scaled, None, dy)[0]
        assert distance(ours[0], exact) <= 2**-8 * np.linalg.norm(exact)


@here
@pytest.mark.parametrize("operand", range(3))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(operand, bad):
    *operands, dy = draw((1, 64, 2, 1, 16))
    operands[operand] = operands[operand].at[0, 3, 0, 0].set(bad)
    ours, blocks = (with_gradients(f, *operands, None, dy) for f in (fused_attention, blockwise_attention))
    finite = [[np.isfinite(np.asarray(x, np.float32)) for x in results] for results in (ours, blocks)]
    np.testing.assert_array_equal(*(results[0] for results in finite))
    # Of the gradients, blocks spoil some that the operand has no part in.
    assert [x.all() for x in finite[0]] == [x.all() for x in finite[1]]


@here
def test_neither_the_batch_nor_later_tokens_leave_a_trace():
    *operands, dy = draw((1, 200, 2, 1, 64))
    alone = with_gradients(fused_attention, *operands, None, dy)  # few heads: queries are cut into parts
    many = [jnp.concatenate([x] * 9) for x in (*operands, dy)]
    for own, each in zip(alone, with_gradients(fused_attention, *many[:3], None, many[3]), strict=True):
        np.testing.assert_array_equal(each, jnp.concatenate([own] * 9))
    changed = fused_attention(*(x.at[:, 150:].set(9.0) for x in operands), None)
    np.testing.assert_array_equal(changed[:, :150], alone[0][:, :150])
    assert not jnp.array_equal(changed[:, 150:], alone[0][:, 150:])


@here
def test_one_mask_for_all_rows():
    *operands, _ = draw((3, 40, 2, 1, 32))
    mask = window(1, 40)
    every = fused_attention(*operands, jnp.concatenate([mask] * 3))
    np.testing.assert_array_equal(fused_attention(*operands, mask), every)


@here
def test_keys_and_values_that_all_devices_share():
    """One key/value head, and query heads cut over devices: the shared gradients are sums over them."""
    *operands, dy = draw((1, 40, 2, 1, 32))
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    cut, whole = jax.P(None, None, "heads"), jax.P()
    for function in (fused_attention, blockwise_attention):
        run = functools.partial(lambda f, q, k, v, dy: with_gradients(f, q, k, v, None, dy), function)
        cut_up = jax.shard_map(run, mesh=mesh, in_specs=(cut, whole, whole, cut), out_specs=(cut, cut, whole, whole))
        for own, alone in zip(jax.jit(cut_up)(*operands, dy), run(*operands, dy), strict=True):
            alone = np.asarray(alone, np.float64)
            assert distance(own, alone) <= 2**-7 * np.linalg.norm(alone)


@here
def test_under_vmap_each_entry_is_computed_alone():
    *operands, _ = draw((4, 40, 2, 1, 32))
    split = [x[:, None] for x in operands]
    y = jax.vmap(lambda *a: fused_attention(*a, None))(*split)
    np.testing.assert_array_equal(y[:, 0], fused_attention(*operands, None))


@here
def test_attend_takes_it_for_bfloat16_alone_and_not_when_told_to_use_xla(monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "fused_attention", lambda *args: calls.append(1) or fused_attention(*args))
    *operands, _ = draw((1, 40, 2, 1, 32))
    attend(*operands, None, same_tokens=True)
    assert len(calls) == 1
    attend(*(x.astype(jnp.float32) for x in operands), None, same_tokens=True)
    with use_kernels("xla"):
        attend(*operands, None, same_tokens=True)
    assert len(calls) == 1


@here
def test_operands_that_do_not_fit_are_refused():
    query, key, value, _ = draw((1, 40, 2, 1, 32))

    def call(query, key, value, mask):
        results = jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct((1, 2, 40), jnp.float32)
        return jax.ffi.ffi_call(ATTENTION_TARGET, results)(query, key, value, mask, scale=np.float32(1))

    everything = jnp.zeros(0, bool)
    for wrong, message in (
        ((query, key[:, :39], value, everything), "do not fit each other"),
        ((query, key.astype(jnp.float32), value, everything), "do not fit each other"),
        ((query, *(jnp.concatenate([x] * 3, axis=2) for x in (key, value)), everything), "3 key/value heads"),
        ((query, key, value, jnp.ones((1, 40, 39), bool)), "mask"),
    ):
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(call(*wrong))


@pytest.mark.slow
def test_every_instruction_set_gives_the_same():
    """Here too on machines without AMX, where it is the only one that runs this code."""
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not every_instruction_set", __file__]
    environment = os.environ | {"QLORA_JAX_ISA": "amx_model"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    digests = {
        isa: subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=environment | {"QLORA_JAX_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for isa in ("amx_model", "amx")
    }
    amx, model = digests["amx"].split(), digests["amx_model"].split()
    assert amx[0] != "amx" or amx[1] == model[1]


DIGEST = """
import hashlib
import numpy as np
from qlora_jax._lib import _cpu
import test_fused_attention as t

digest = hashlib.sha256()
if _cpu.computes_in_tiles():
    *operands, dy = t.draw((1, 70, 2, 1, 40))
    for x in t.with_gradients(t.fused_attention, *operands, None, dy):
        digest.update(np.asarray(x).tobytes())
print(_cpu.instruction_set(), digest.hexdigest())
"""
