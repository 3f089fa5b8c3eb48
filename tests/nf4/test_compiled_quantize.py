"""The compiled quantization against pure JAX, bit for bit, on every instruction set; and straight from bytes."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qlora_jax.nf4 import NF4Tensor, quantize, use_kernels
from qlora_jax.nf4.blockwise import compiled_on_cpu
from qlora_jax.nf4.calls import DTYPE_CODES, table
from qlora_jax.nf4.codebook import CODEBOOKS, DYNAMIC_MAP_MIDPOINTS, NF4_CODE
from qlora_jax.nf4.kernels import load_module
from qlora_jax.nf4.tensor import leaf_shapes

DTYPES = ("float32", "bfloat16", "float16")


def random_bits(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
    """Of every magnitude: subnormal, infinite, NaN too."""
    wide = dtype == "float32"
    bits = np.random.default_rng(seed).integers(0, 2 ** (32 if wide else 16), shape)
    return jnp.asarray(bits.astype(np.uint32 if wide else np.uint16).view(ml_dtypes.finfo(dtype).dtype))


def normal(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
    return jnp.asarray((np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(ml_dtypes.finfo(dtype).dtype))


def same_bits(left: NF4Tensor, right: NF4Tensor) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == np.float32:
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
            a, b = (np.where(np.isnan(x), 0, x).view(np.uint32) for x in (a, b))
        np.testing.assert_array_equal(a, b)


def in_pure_jax(*arguments, **settings) -> NF4Tensor:
    with use_kernels("xla"):
        return quantize(*arguments, **settings)


def test_quantization_is_compiled_where_the_kernels_run():
    def calls() -> int:
        return jax.jit(quantize).lower(jnp.zeros((64, 8), jnp.bfloat16)).as_text().count("qlora_jax_nf4_quantize")

    assert compiled_on_cpu()
    assert calls() == 1
    with use_kernels("xla"):
        assert not compiled_on_cpu()
        assert calls() == 0


# Each shape and setting is compiled twice, hence few of them: rows of whole blocks, blocks that straddle rows, a last
# block and a last byte that are not full, several groups of scales, a stack.
CASES = [
    ("nf4", "bfloat16", (128, 300), 64, True),
    ("nf4", "float16", (33, 41), 32, True),
    ("nf4", "float32", (2, 64, 7), 64, False),
    ("fp4", "bfloat16", (3, 50, 33), 64, True),
    ("int4", "float32", (128, 5), 128, True),
    ("e2m1", "float16", (4096, 2), 4096, False),
    ("e3m0", "float32", (1, 1), 32, True),
]


@pytest.mark.parametrize(("quant_type", "dtype", "shape", "block_size", "double_quant"), CASES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), make=st.sampled_from([normal, random_bits]), zeros=st.booleans())
def test_bits_are_those_of_pure_jax(quant_type, dtype, shape, block_size, double_quant, seed, make, zeros):
    kernel = make(shape, dtype, seed)
    if zeros:
        kernel = kernel.at[..., : shape[-1] // 2].set(0)
    arguments = (kernel, quant_type, block_size, double_quant)
    same_bits(quantize(*arguments), in_pure_jax(*arguments))


def test_scales_between_two_codes_take_the_even_one():
    """Block scales of mean 1 that, divided by the largest deviation in their group, 1/2, are midpoints of the map."""
    exact = DYNAMIC_MAP_MIDPOINTS[(DYNAMIC_MAP_MIDPOINTS > 0) & (DYNAMIC_MAP_MIDPOINTS * 2.0**22 % 1 == 0)]
    assert len(exact) > 10
    deviations = np.zeros(256, np.float32)
    deviations[: len(exact) + 1] = 0.5, *(exact / 2)
    kernel = jnp.asarray(np.tile(np.concatenate([1 + deviations, 1 - deviations]), (32, 1)))
    w = quantize(kernel, block_size=32)
    assert w.absmax_offset == 1
    np.testing.assert_array_equal(w.absmax_scale, [0.5, 0.5])
    for sign, group in zip((1, -1), np.asarray(w.absmax).reshape(2, 256), strict=True):
        below = np.searchsorted(DYNAMIC_MAP_MIDPOINTS, sign * exact)
        np.testing.assert_array_equal(group[1 : len(exact) + 1], below + below % 2)
    same_bits(w, in_pure_jax(kernel, block_size=32))


def test_transforms():
    stack = normal((4, 64, 24), "bfloat16", 0)
    expected = quantize(stack)
    same_bits(jax.jit(jax.vmap(quantize))(stack), expected)
    same_bits(jax.jit(lambda rows: quantize(rows.swapaxes(1, 2)))(stack.swapaxes(1, 2)), expected)
    mesh = Mesh(np.array(jax.devices()[:2]), ("layers",))
    same_bits(jax.jit(jax.shard_map(quantize, mesh=mesh, in_specs=P("layers"), out_specs=P("layers")))(stack), expected)
    scales = jax.grad(lambda k: quantize(k, double_quant=False).absmax.sum())(stack[0].astype(jnp.float32))
    assert not scales.any()


def fill(elements: np.ndarray, kind: int, quant_type: str, block_size: int, double_quant: bool, threads: int = 2):
    """What the module makes of bytes: the leaves, flat, and the largest magnitude."""
    count = elements.size // (4 if kind in (0, 3) else 2)
    shapes = leaf_shapes((count, 1), block_size, double_quant)
    leaves = [np.zeros(int(np.prod(shapes[name][0])), shapes[name][1]) for name in ("packed", "absmax")]
    leaves.append(np.zeros(shapes["absmax_scale"][0] if double_quant else 0, np.float32))
    offset, largest = load_module("_cpu").quantize(
        elements, kind, block_size, *table(quant_type), *leaves, threads=threads
    )
    return [*leaves, np.float32(offset)], largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_bytes_at_any_address(dtype, double_quant):
    """As a mapped file has them: not aligned, read in place."""
    weight = np.asarray(normal((70, 128), dtype, 1))
    expected = quantize(jnp.asarray(weight).T, double_quant=double_quant)
    raw = np.zeros(weight.nbytes + 3, np.uint8)
    raw[3:] = weight.view(np.uint8).reshape(-1)
    leaves, largest = fill(raw[3:], DTYPE_CODES[dtype], "nf4", 64, double_quant)
    for got, wanted in zip(leaves, jax.tree.leaves(expected), strict=False):
        np.testing.assert_array_equal(got, np.ravel(wanted))
    assert largest == np.abs(weight.astype(np.float32)).max()


@pytest.mark.parametrize("special", [None, np.nan, np.inf, -np.inf])
def test_float32_rounded_to_bfloat16(special):
    weight = np.array(random_bits((64, 64), "float32", 2))
    weight[~np.isfinite(weight)] = 0
    weight[abs(weight) > 1e30] /= 2.0**40
    if special is not None:
        weight[5, 5] = special
    rounded = weight.astype(ml_dtypes.bfloat16)
    got, largest = fill(weight.view(np.uint8).reshape(-1), 3, "fp4", 64, True)
    expected, wanted = fill(rounded.view(np.uint8).reshape(-1), 1, "fp4", 64, True)
    for left, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(largest, wanted)
    assert np.isfinite(largest) == (special is None)


def digest(module) -> str:
    """Of all that the module makes of some bytes, random and near NF4's thresholds."""
    total = hashlib.sha256()
    rng = np.random.default_rng(3)
    near = np.repeat(np.array(NF4_CODE[:-1] / 2 + NF4_CODE[1:] / 2), 64).astype(np.float32)
    near = np.nextafter(near, rng.integers(-1, 2, near.size).astype(np.float32))
    near[::64] = 1
    for kind, width in enumerate((4, 2, 2, 4)):
        for elements in (rng.integers(0, 256, 4097 * width, np.uint8), near.view(np.uint8)):
            count = elements.size // width
            for quant_type in CODEBOOKS:
                blocks = -(-count // 32)
                leaves = [
                    np.zeros(-(-count // 2), np.uint8),
                    np.zeros(blocks, np.uint8),
                    np.zeros(-(-blocks // 256), "f4"),
                ]
                leaves += [np.zeros(-(-count // 2), np.uint8), np.zeros(blocks, "f4"), np.zeros(0, "f4")]
                for part in (leaves[:3], leaves[3:]):
                    module.quantize(elements, kind, 32, *table(quant_type), *part, threads=1)
                for leaf in leaves:
                    total.update(
                        np.nan_to_num(leaf, nan=-1.0).tobytes() if leaf.dtype == np.float32 else leaf.tobytes()
                    )
    return total.hexdigest()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_makes_the_same_bits(isa):
    code = (
        "import importlib.util as u, sys; "
        "spec = u.spec_from_file_location('test_compiled_quantize', sys.argv[1]); "
        "test = u.module_from_spec(spec); spec.loader.exec_module(test); "
        "module = test.load_module('_cpu'); print(module.instruction_set(), test.digest(module))"
    )
    environment = os.environ | {"QLORA_JAX_ISA": isa}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__))], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    if ran.stdout.split()[0] != isa:
        pytest.skip(f"this machine has no {isa}")
    assert ran.stdout.split()[1] == digest(load_module("_cpu"))


def test_the_number_of_threads_changes_nothing():
    elements = np.asarray(random_bits((700_001,), "bfloat16", 4)).view(np.uint8)
    one, three = (fill(elements, 1, "nf4", 64, True, threads)[0] for threads in (1, 3))
    for left, right in zip(one, three, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": 4}, "kind must be 0 to 3, got 4"),
        ({"block_size": 48}, "block_size must be .* got 48"),
        ({"packed": np.zeros(31, np.uint8)}, "packed has 31 elements, needs 32"),
        ({"absmax": np.zeros(2, np.float32)}, "absmax has 2 elements, needs 1"),
        ({"absmax": np.zeros(1, np.float64)}, "absmax must be a contiguous array of uint8 or float32"),
        ({"elements": np.zeros(127, np.uint8)}, "elements has 127 elements, needs 126"),
        ({"codes": np.zeros(16, np.uint8)}, "code 1 of 16 is 0"),
        ({"codes": np.zeros(8, np.uint8)}, "got 15 and 8"),
    ],
)
def test_wrong_buffers_are_refused(change, message):
    thresholds, codes = table("nf4")
    arguments = {"elements": np.zeros(128, np.uint8), "kind": 1, "block_size": 64, "thresholds": thresholds}
    arguments |= {"codes": codes, "packed": np.zeros(32, np.uint8), "absmax": np.zeros(1, np.float32)}
    arguments |= {"absmax_scale": np.zeros(0, np.float32), "threads": 1}
    with pytest.raises(ValueError, match=message):
        load_module("_cpu").quantize(**(arguments | change))


def test_results_that_do_not_fit_are_refused_by_the_handler():
    thresholds, codes = table("nf4")

    def run(weights: jax.Array, packed: int, first_layer: int = 0, **changes) -> None:
        shapes = [((1, packed), jnp.uint8), ((1, 2), jnp.float32), ((1, 0), jnp.float32), ((0,), jnp.float32)]
        call = jax.ffi.ffi_call("qlora_jax_nf4_quantize", [jax.ShapeDtypeStruct(*shape) for shape in shapes])
        attributes = {"block_size": np.int64(64), "input_major": np.int64(0), "thresholds": thresholds, "codes": codes}
        jax.block_until_ready(call(weights, jnp.full(1, first_layer, jnp.int32), **(attributes | changes)))

    weights = jnp.zeros((1, 2, 64), jnp.bfloat16)
    run(weights, 64)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"nf4_quantize: results packed uint8\[1, 63\].*bfloat16\[1, 2, 64\]"
    ):
        run(weights, 63)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"must be \[L, out, in\], got bfloat16\[2, 64\]"):
        run(weights[0], 64)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="1 layers from 1 on do not lie in weights"):
        run(weights, 64, first_layer=1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="got 16"):
        run(weights, 64, block_size=np.int64(16))
    with pytest.raises(jax.errors.JaxRuntimeError, match="input-major weights need whole blocks of 64"):
        run(weights, 64, input_major=np.int64(1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="code 1 of 16 is 0"):
        run(weights, 64, codes=np.zeros(16, np.uint8))
