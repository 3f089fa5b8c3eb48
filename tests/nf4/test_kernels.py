"""The compiled CPU kernels against float64 and against a NumPy reading of the format."""

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.nf4 import NF4Tensor, kernel_report, nf4_matmul, use_kernels
from qlora_jax.nf4.adapter import matmul_and_add
from qlora_jax.nf4.codebook import DYNAMIC_MAP, NF4_CODE

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Relative Frobenius error for products of 4096 elements or more; smaller ones get half as much again.
BOUNDS = {"float32": 2e-6, "bfloat16": 1.8e-3, "float16": 2.3e-4}


def random_weight(rng, in_features, out_features, *, block_size=64, double_quant=True, dtype="bfloat16", layers=None):
    """Random bytes in every field: no kernel may lean on what `quantize` happens to write."""
    flat = in_features % block_size != 0
    stack = () if layers is None else (layers,)
    size = in_features * out_features
    n_blocks = -(-size // block_size)
    packed = rng.integers(0, 256, (*stack, -(-size // 2)), np.uint8)
    leaves = {"packed": packed if flat else packed.reshape(*stack, out_features, in_features // 2)}
    blocks = (n_blocks,) if flat else (out_features, in_features // block_size)
    if double_quant:
        leaves["absmax"] = rng.integers(0, 256, (*stack, *blocks), np.uint8)
        leaves["absmax_scale"] = rng.uniform(0.01, 0.03, (*stack, -(-n_blocks // 256))).astype(np.float32)
        leaves["absmax_offset"] = rng.uniform(0.04, 0.05, stack).astype(np.float32)
    else:
        leaves["absmax"] = rng.uniform(0.02, 0.08, (*stack, *blocks)).astype(np.float32)
    leaves = {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    return NF4Tensor(**leaves, shape=(in_features, out_features), block_size=block_size, dtype=dtype)


def dense(w: NF4Tensor, dtype: str) -> np.ndarray:
    """[in, out]: the format read by definition, one element at a time in bitsandbytes' order."""
    packed, absmax = np.asarray(w.packed).reshape(-1), np.asarray(w.absmax).reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: w.shape[0] * w.shape[1]]
    if w.absmax_scale is not None:
        groups = np.asarray(w.absmax_scale)[np.arange(absmax.size) // 256]
        absmax = DYNAMIC_MAP[absmax] * groups + np.asarray(w.absmax_offset)
    values = NF4_CODE[codes] * np.repeat(absmax, w.block_size)[: codes.size]
    return values.astype(DTYPES[w.dtype]).astype(DTYPES[dtype]).reshape(w.shape[1], w.shape[0]).T


def activations(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape).astype(DTYPES[dtype]))


@jax.jit
def both(x, dy, w):
    """(y, dx) by the compiled kernels."""
    with use_kernels("ffi"):
        y, pullback = jax.vjp(lambda x: nf4_matmul(x, w), x)
        return y, pullback(dy)[0]


@jax.jit
def both_for_each(xs, dys, w):
    return [both(x, dy, w) for x, dy in zip(xs, dys, strict=True)]


@jax.jit
def both_with_adapter(x, dy, w, u, v, v_dx):
    """(x @ w + u @ v.T, dy @ w.T + u @ v_dx.T), each by one kernel."""
    with use_kernels("ffi"):
        return matmul_and_add(x, w, u, v), matmul_and_add(dy, w, u, v_dx, input_gradient=True)


def relative_error(got, x, matrix):
    expected = np.asarray(x, np.float64) @ matrix.astype(np.float64)
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected), expected.size


def assert_within_bounds(w, dtype, rows, rng):
    in_features, out_features = w.shape
    xs = [activations(rng, (m, in_features), dtype) for m in rows]
    dys = [activations(rng, (m, out_features), dtype) for m in rows]
    matrix = dense(w, dtype)
    for m, x, dy, (y, dx) in zip(rows, xs, dys, both_for_each(xs, dys, w), strict=True):
        for name, got, operand, factor in (("y", y, x, matrix), ("dx", dx, dy, matrix.T)):
            error, size = relative_error(got, operand, factor)
            assert got.dtype == operand.dtype
            assert error <= BOUNDS[dtype] * (1 if size >= 4096 else 1.5), f"{name}, M={m}: {error}"


def test_kernels_are_loaded():
    assert kernel_report()["cpu"] == "loaded"


def test_tables_equal_the_python_codebook():
    from qlora_jax._lib import _cpu

    np.testing.assert_array_equal(np.array(_cpu.nf4_code(), np.float32), NF4_CODE)
    np.testing.assert_array_equal(np.array(_cpu.dynamic_map(), np.float32), DYNAMIC_MAP)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("in_features", "out_features", "block_size"),
    [(576, 192, 64), (576, 576, 64), (576, 1536, 64), (1536, 576, 64), (576, 200, 128), (150, 77, 64)],
)
def test_error_bounds_of_the_design(in_features, out_features, block_size, double_quant, dtype):
    """Design §4: nf4_matmul and dx against float64 over the dequantized weight (last two shapes: flat layout)."""
    rng = np.random.default_rng(in_features + out_features)
    w = random_weight(rng, in_features, out_features, block_size=block_size, double_quant=double_quant)
    assert_within_bounds(w, dtype, (1, 3, 16, 33, 128), rng)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_how_work_is_cut_leaves_no_trace(dtype):
    """More rows and features than one task takes, with ragged ends: each row has the bits that it has on its own."""
    rng = np.random.default_rng(2)
    w = random_weight(rng, 1088, 330)  # 17 blocks a row: groups of scales end inside rows
    x, dy = activations(rng, (1060, 1088), dtype), activations(rng, (1060, 330), dtype)
    whole = both(x, dy, w)
    for begin, end in ((0, 1), (509, 517), (1020, 1060)):
        for got, alone in zip(whole, both(x[begin:end], dy[begin:end], w), strict=True):
            np.testing.assert_array_equal(np.asarray(got[begin:end]), np.asarray(alone))
    matrix = dense(w, dtype)
    for got, operand, factor in zip(whole, (x, dy), (matrix, matrix.T), strict=True):
        assert relative_error(got, operand, factor)[0] <= BOUNDS[dtype]


def test_error_bound_of_a_long_float32_sum():
    rng = np.random.default_rng(0)
    assert_within_bounds(random_weight(rng, 8192, 256, dtype="float32"), "float32", (16,), rng)
    assert_within_bounds(random_weight(rng, 256, 8192, dtype="float32"), "float32", (16,), rng)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("weight_dtype", BOUNDS)
@pytest.mark.parametrize(("in_features", "block_size"), [(128, 32), (96, 64), (75, 64), (1088, 64)])
def test_weights_are_decoded_bit_for_bit(in_features, block_size, weight_dtype, dtype):
    """Rows of the identity pick single weights: every rounding of the scale and of the weight shows."""
    w = random_weight(np.random.default_rng(1), in_features, 91, block_size=block_size, dtype=weight_dtype)
    rows = max(128, in_features)
    y, dx = both(jnp.eye(rows, in_features, dtype=dtype), jnp.eye(rows, 91, dtype=dtype), w)
    expected = dense(w, dtype).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(y, np.float32)[:in_features], expected)
    np.testing.assert_array_equal(np.asarray(dx, np.float32)[:91], expected.T)


def edge_values(dtype):
    """float32 values halfway between neighbours of a dtype, one step beside them, and at the ends of its range."""
    bits = np.arange(0, 0x7F80 if dtype == "bfloat16" else 0x7C00, 97, np.uint16)
    bits = bits[bits.view(DTYPES[dtype]).astype(np.float32) >= 2.0**-25]  # float32's own subnormals may count as 0
    lower, upper = (b.view(DTYPES[dtype]).astype(np.float32) for b in (bits, bits + 1))
    ties = lower + (upper - lower) / 2
    ends = np.array([65519, 65520, 1e30, np.finfo(np.float32).max, np.inf, np.nan], np.float32)
    return np.concatenate([lower, ties, np.nextafter(ties, 0), np.nextafter(ties, np.float32(np.inf)), ends])


def assert_edges_are_rounded_as_numpy_does(dtype):
    """Code 15 is 1, so these weights are their scales; every sum has one term, so infinities stay what they are."""
    values = edge_values(dtype)
    with np.errstate(over="ignore"):
        expected = values.astype(DTYPES[dtype]).astype(np.float32)

    def weight(shape, block_size):
        n = shape[0] * shape[1]
        packed = jnp.full(n // 2, 255, jnp.uint8)
        flat = shape[0] % block_size != 0
        return NF4Tensor(
            packed=packed if flat else packed.reshape(shape[1], -1),
            absmax=jnp.asarray(values) if flat else jnp.asarray(values)[None, :],
            shape=shape,
            block_size=block_size,
            dtype=dtype,
        )

    one = jnp.ones((1, 1))
    y, _ = both(one, jnp.ones((1, 2 * values.size)), weight((1, 2 * values.size), 2))
    np.testing.assert_array_equal(np.asarray(y)[0], np.repeat(expected, 2))
    _, dx = both(jnp.ones((1, 32 * values.size)), one, weight((32 * values.size, 1), 32))
    np.testing.assert_array_equal(np.asarray(dx)[0], np.repeat(expected, 32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_edges_are_rounded_as_numpy_does(dtype):
    assert_edges_are_rounded_as_numpy_does(dtype)


@settings(max_examples=25, deadline=None)
@given(
    in_features=st.integers(1, 300),
    out_features=st.integers(1, 150),
    rows=st.integers(1, 20),
    block_size=st.sampled_from([32, 64, 256]),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(in_features, out_features, rows, block_size, double_quant, seed):
    """Element by element, with the forward error bound of float32 sums, so that no edge hides in a norm."""
    rng = np.random.default_rng(seed)
    w = random_weight(rng, in_features, out_features, block_size=block_size, double_quant=double_quant)
    x = activations(rng, (rows, in_features), "float32")
    dy = activations(rng, (rows, out_features), "float32")
    matrix = dense(w, "float32").astype(np.float64)
    for got, operand, factor in zip(both(x, dy, w), (x, dy), (matrix, matrix.T), strict=True):
        operand = np.asarray(operand, np.float64)
        bound = 2.0**-23 * factor.shape[0] * (np.abs(operand) @ np.abs(factor)) + 1e-30
        assert (np.abs(np.asarray(got, np.float64) - operand @ factor) <= bound).all()


@pytest.mark.parametrize("in_features", [128, 50])
def test_a_layer_view_gives_the_bits_of_that_layer(in_features):
    rng = np.random.default_rng(2)
    stack = random_weight(rng, in_features, 70, layers=3)
    x = activations(rng, (5, in_features), "bfloat16")
    dy = activations(rng, (5, 70), "bfloat16")
    for layer, seen in [(0, 0), (1, 1), (2, 2), (7, 2), (-1, 0), (-4, 0)]:  # a traced index is clamped to the stack
        view = jax.jit(lambda i: both(x, dy, stack.layer(i)))(layer)
        alone = both(x, dy, jax.tree.map(lambda leaf, layer=seen: leaf[layer], stack))
        for got, expected in zip(view, alone, strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_shard_gives_the_slice_of_the_whole(double_quant):
    """Scales are grouped over the whole tensor: here a group begins in the middle of a row, and of both shards."""
    rng = np.random.default_rng(3)
    in_features, out_features = 1536, 96
    whole = random_weight(rng, in_features, out_features, double_quant=double_quant)
    x = activations(rng, (4, in_features), "float32")
    dy = activations(rng, (4, out_features), "float32")
    y, dx = both(x, dy, whole)

    def part(rows, blocks):
        local = dataclasses.replace(
            whole,
            packed=whole.packed[rows, blocks.start * 32 : blocks.stop * 32],
            absmax=whole.absmax[rows, blocks],
        )
        return local.shard(rows.start, blocks.start)

    for rows in (slice(0, 33), slice(33, 96)):
        np.testing.assert_array_equal(both(x, dy[:, rows], part(rows, slice(0, 24)))[0], y[:, rows])
    for blocks in (slice(0, 7), slice(7, 24)):
        columns = slice(blocks.start * 64, blocks.stop * 64)
        np.testing.assert_array_equal(both(x[:, columns], dy, part(slice(0, 96), blocks))[1], dx[:, columns])


def test_rows_do_not_touch_each_other():
    rng = np.random.default_rng(4)
    w = random_weight(rng, 128, 70)
    x, dy = activations(rng, (9, 128), "bfloat16"), activations(rng, (9, 70), "bfloat16")
    clean = both(x, dy, w)
    spoiled = both(x.at[4, 100].set(jnp.nan), dy.at[4, 69].set(jnp.nan), w)
    others = np.arange(9) != 4
    for got, expected in zip(spoiled, clean, strict=True):
        assert np.isnan(np.asarray(got, np.float32)[4]).all()
        np.testing.assert_array_equal(got[others], expected[others])


def test_calls_from_many_threads_agree():
    rng = np.random.default_rng(5)
    w = random_weight(rng, 576, 192)
    x, dy = activations(rng, (64, 576), "float32"), activations(rng, (64, 192), "float32")
    y, dx = jax.device_get(both(x, dy, w))
    with ThreadPoolExecutor(8) as pool:
        for again in pool.map(lambda _: jax.device_get(both(x, dy, w)), range(64)):
            np.testing.assert_array_equal(again[0], y)
            np.testing.assert_array_equal(again[1], dx)


# A fresh process prints what its instruction set and its threads make of fixed operands.
CHILD = """
import json, os, sys
threads = int(sys.argv[1])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={threads}"
if threads == 1:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import hashlib
import jax.numpy as jnp, numpy as np
from qlora_jax._lib import _cpu
import test_kernels as t

for dtype in ("bfloat16", "float16"):
    t.assert_edges_are_rounded_as_numpy_does(dtype)
digest, worst = hashlib.sha256(), 0.0
for in_features, out_features in ((576, 330), (150, 77)):
    for dtype, bound in t.BOUNDS.items():
        rng = np.random.default_rng(6)
        w = t.random_weight(rng, in_features, out_features)
        x, dy = t.activations(rng, (101, in_features), dtype), t.activations(rng, (101, out_features), dtype)
        matrix = t.dense(w, dtype)
        # An adapter is a few more elements of the sums; 40 of them are more than one step of any kernel.
        u, v, v_dx = (t.activations(rng, (n, 40), dtype) for n in (101, out_features, in_features))
        products = [*t.both(x, dy, w), *t.both_with_adapter(x, dy, w, u, v, v_dx)]
        operands = [(x, matrix), (dy, matrix.T)]
        operands += [(np.hstack([x, u]), np.vstack([matrix, v.T])), (np.hstack([dy, u]), np.vstack([matrix.T, v_dx.T]))]
        for got, (operand, factor) in zip(products, operands, strict=True):
            worst = max(worst, t.relative_error(got, operand, factor)[0] / bound)
            digest.update(np.asarray(got).tobytes())
print(json.dumps({"isa": _cpu.instruction_set(), "worst": worst, "digest": digest.hexdigest()}))
"""


def start_child(threads: int, isa: str | None = None) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    environment.pop("QLORA_JAX_ISA", None)
    if isa is not None:
        environment["QLORA_JAX_ISA"] = isa
    command = [sys.executable, "-c", CHILD, str(threads)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_every_instruction_set_and_every_number_of_threads():
    caps = ("portable", "avx2", "avx512", "avx512_bf16", "amx_model", "amx")
    children = {isa: start_child(2, isa) for isa in caps} | {threads: start_child(threads) for threads in (1, 8)}
    results = {}
    for key, child in children.items():
        stdout, stderr = child.communicate(timeout=300)
        assert child.returncode == 0, stderr
        results[key] = json.loads(stdout)
    for key, result in results.items():
        assert result["worst"] <= 1.0, (key, result)
    assert results["portable"]["isa"] == "portable"
    # A cap never raises the choice: what runs under it is the best of the sets up to it.
    for isa in caps:
        assert caps.index(results[isa]["isa"]) <= caps.index(isa)
    if results["amx"]["isa"] == "amx":  # the processor does what the model of its tiles says, to the bit
        assert results["amx"]["digest"] == results["amx_model"]["digest"]
    best = results[8]
    assert results[1]["digest"] == best["digest"] == results[best["isa"]]["digest"]


def test_an_unknown_instruction_set_is_reported():
    code = "from qlora_jax.nf4 import kernel_report; print(kernel_report()['cpu'])"
    environment = {**os.environ, "QLORA_JAX_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "QLORA_JAX_ISA must be one of portable" in done.stdout
    assert "sse9" in done.stdout


def call(x, packed, absmax, scale, offset, where=(0, 0, 0), *, out, row_blocks=1, block_size=64, weight_dtype=1):
    result = jax.ShapeDtypeStruct((x.shape[0], out), x.dtype)
    attributes = {"row_blocks": row_blocks, "block_size": block_size, "weight_dtype": weight_dtype}
    adapter = jnp.zeros((x.shape[0], 0), x.dtype), jnp.zeros((out, 0), x.dtype)
    operands = (x, packed, absmax, scale, offset, jnp.asarray(where, jnp.int32), *adapter)
    return jax.ffi.ffi_call("qlora_jax_nf4_matmul", result)(
        *operands, **{name: np.int64(value) for name, value in attributes.items()}
    )


def operands(**changes):
    fitting = {
        "x": jnp.ones((2, 64)),
        "packed": jnp.zeros((1, 96), jnp.uint8),
        "absmax": jnp.zeros((1, 3), jnp.uint8),
        "scale": jnp.zeros((1, 1)),
        "offset": jnp.zeros((1,)),
        "out": 3,
    }
    return fitting | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"x": jnp.ones((2, 128)), "row_blocks": 2},
            (r"packed uint8\[1, 96\]", r"x float32\[2, 128\]", r"y float32\[2, 3\]"),
        ),
        ({"x": jnp.ones((2, 128))}, ("128 weights do not lie in 1 blocks of 64", r"x float32\[2, 128\]")),
        ({"out": 5}, (r"packed uint8\[1, 96\]", r"x float32\[2, 64\]", r"y float32\[2, 5\]")),
        ({"x": jnp.ones((2, 64), jnp.int8)}, ("float32, bfloat16 or float16", r"\[2, 64\]")),
        ({"absmax": jnp.zeros((1, 4))}, (r"absmax float32\[1, 4\]", r"packed uint8\[1, 96\]")),
        ({"absmax": jnp.zeros((1, 3), jnp.int32)}, (r"absmax int32\[1, 3\]",)),
        ({"packed": jnp.zeros((2, 96), jnp.uint8)}, (r"absmax uint8\[1, 3\]", r"packed uint8\[2, 96\]")),
        ({"scale": jnp.zeros((2, 1))}, (r"absmax_scale float32\[2, 1\]", r"absmax uint8\[1, 3\]")),
        ({"where": (0, 300, 0)}, (r"absmax_scale float32\[1, 1\]", "block 302")),
        ({"where": (0, 0, 1)}, ("first block 1", "1 blocks a row")),
        ({"where": (0, -1, 0)}, ("first row -1",)),
        ({"offset": jnp.zeros((2,))}, (r"absmax_offset float32\[2\]",)),
        ({"block_size": 48}, ("power of two, got 48",)),
        ({"weight_dtype": 3}, ("weight_dtype", "got 3")),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shapes(changes, words):
    np.testing.assert_array_equal(call(**operands()), np.zeros((2, 3)))
    # XLA reports a handler's INVALID_ARGUMENT as either, by version and by whether the call ran in the caller's thread.
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError)) as caught:
        jax.block_until_ready(call(**operands(**changes)))
    for word in words:
        assert caught.match(word)


def test_an_empty_sum_is_zero():
    empty = operands(x=jnp.ones((2, 0)), packed=jnp.zeros((1, 0), jnp.uint8), absmax=jnp.zeros((1, 0)), row_blocks=0)
    np.testing.assert_array_equal(call(**empty), np.zeros((2, 3)))
