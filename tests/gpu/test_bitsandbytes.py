"""bitsandbytes' own CUDA kernels, without torch: bytes equal to ours, and peers of the timings with equal results.

On a CPU, host_double.cc stands for its library: that proves these tests, and nothing about bitsandbytes.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gpu_cases import leave_out

from qlora_jax import bench
from qlora_jax.benchmarks.bitsandbytes import BitsAndBytes
from qlora_jax.benchmarks.programs import make_activations, make_weights
from qlora_jax.benchmarks.shapes import Size
from qlora_jax.errors import UserError
from qlora_jax.nf4 import NF4Tensor, dequantize, quantize

VARIABLE = "QLORA_BITSANDBYTES_LIBRARY"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@pytest.fixture
def library_path(device: jax.Device, request: pytest.FixtureRequest) -> Path:
    if device.platform == "cpu":
        return request.getfixturevalue("host_double")
    leave_out("bitsandbytes")
    if VARIABLE not in os.environ:
        pytest.fail(
            f"set {VARIABLE} to libbitsandbytes_cuda130.so of bitsandbytes' wheel, or leave these tests out by "
            "QLORA_GPU_TESTS_WITHOUT=bitsandbytes",
            pytrace=False,
        )
    return Path(os.environ[VARIABLE])


@pytest.fixture
def library(library_path: Path) -> BitsAndBytes:
    return BitsAndBytes(library_path)


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> Any:
    with np.load(golden_dir / "nf4_golden.npz") as arrays:
        return dict(arrays)


def weights(dtype: str, golden: Any) -> dict[str, tuple[np.ndarray, int]]:
    """[out, in] and block size: random, with outliers and zeros, ragged; and the golden ones of this dtype."""
    rng = np.random.default_rng(7)
    found = {
        f"random {out}x{inside} block {block}": (rng.standard_normal((out, inside)) * 0.02, block)
        for out, inside, block in (
            (64, 128, 64),
            (96, 576, 64),
            (33, 50, 64),
            (7, 9, 64),
            (16, 4096, 4096),
            (8, 256, 32),
        )
    }
    heavy = rng.standard_normal((32, 256)) * np.exp(3 * rng.standard_normal((32, 256)))
    heavy = heavy.clip(-6e4, 6e4)
    heavy[3], heavy[5, ::2], heavy[6, :64] = 0, 0, 1e-3
    found["outliers, zeros and equal values"] = (heavy, 64)
    result = {name: (values.astype(DTYPES[dtype]), block) for name, (values, block) in found.items()}
    for name, case in json.loads(bytes(golden["meta_json"]))["cases"].items():
        if {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[case["dtype"]] == dtype:
            stored = golden[f"{name}/W"]
            result[name] = (stored.view(DTYPES[dtype]) if dtype == "bfloat16" else stored, case["blocksize"])
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_gives_its_bytes(library: BitsAndBytes, dtype: str, golden: Any) -> None:
    cases = weights(dtype, golden)
    assert len(cases) > 9
    differ = total = 0
    for name, (matrix, block_size) in cases.items():
        theirs, absmax = library.quantize(jnp.asarray(matrix.reshape(-1)), block_size)
        ours = quantize(jnp.asarray(matrix.T), block_size=block_size, double_quant=False)
        scales = np.asarray(ours.absmax).reshape(-1)
        # Below the smallest normal number its reciprocals are flushed; it does not define what comes out.
        defined = (scales == 0) | (scales > 1.2e-38)
        np.testing.assert_array_equal(scales[defined], absmax[defined], err_msg=name)
        own = nibbles(np.asarray(ours.packed), matrix.size)
        # A block of zeros has code 7 here, which is zero, and code 0 there, which its scale makes zero.
        meant = np.repeat(defined & (scales > 0), block_size)[: matrix.size]
        differing = (own != nibbles(theirs, matrix.size)) & meant
        assert dtype == "float32" or not differing.any(), f"{name}: {differing.sum()} of {meant.sum()} codes differ"
        zeros = np.repeat(scales == 0, block_size)[: matrix.size]
        assert np.isin(nibbles(theirs, matrix.size)[zeros], (0, 7)).all()
        assert (own[zeros] == 7).all()
        differ, total = differ + int(differing.sum()), total + int(meant.sum())
    assert differ <= 1e-6 * total


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_gives_its_bits(library: BitsAndBytes, dtype: str, golden: Any) -> None:
    for name, (matrix, block_size) in weights(dtype, golden).items():
        w = quantize(jnp.asarray(matrix.T), block_size=block_size, double_quant=False)
        packed, absmax = w.packed.reshape(-1), w.absmax.reshape(-1)
        theirs = library.dequantize(packed, absmax, block_size, matrix.size, dtype)
        ours = np.asarray(dequantize(w)).T.reshape(-1)
        finite = np.isfinite(ours.astype(np.float32))
        bits = np.uint32 if dtype == "float32" else np.uint16
        np.testing.assert_array_equal(ours.view(bits)[finite], theirs.view(bits)[finite], err_msg=name)


def test_scales_are_quantized_to_its_codes(library: BitsAndBytes) -> None:
    rng = np.random.default_rng(3)
    for shape in ((128, 64), (576, 192), (4096, 96)):
        kernel = jnp.asarray(rng.standard_normal(shape).astype(ml_dtypes.bfloat16))
        w, plain = quantize(kernel), quantize(kernel, double_quant=False)
        codes, scale = library.quantize_scales((plain.absmax - w.absmax_offset).reshape(-1))
        np.testing.assert_array_equal(np.asarray(w.absmax).reshape(-1), codes)
        np.testing.assert_array_equal(w.absmax_scale, scale)


@pytest.mark.parametrize("op", ["forward", "dx"])
@pytest.mark.parametrize("rows", [1, 5, 16, 64])
def test_peers_of_the_timings_compute_the_product(library: BitsAndBytes, op: str, rows: int) -> None:
    size = Size(256, 192, rows)
    weights = make_weights(size.shape, "bfloat16", copies=3)
    xs = make_activations(size, "bfloat16", copies=3)[op]
    matrix = np.asarray(weights.matrices[0], np.float64)
    expected = np.asarray(xs[0], np.float64) @ (matrix if op == "forward" else matrix.T)
    programs = {
        "cublas": library.dense_product(op, xs, weights),
        "dequantize": library.dequantized_product(op, xs, weights),
    }
    if op == "forward":
        programs["fused"] = library.fused_product(xs, weights)
    for name, program in programs.items():
        assert program.calls == 3
        program.run(2)
        got = program.last_result()
        assert np.linalg.norm(got - expected) < 4e-3 * np.linalg.norm(expected), name


def test_peers_read_the_copy_that_is_meant(library: BitsAndBytes) -> None:
    """Copies of one weight and one x cannot show which was read: here each differs."""
    size = Size(128, 64, 2)
    one = make_weights(size.shape, "bfloat16", copies=2)
    second = quantize(jnp.asarray(np.random.default_rng(1).standard_normal((128, 64)), jnp.bfloat16))
    first = jax.tree.map(lambda leaf: leaf[0], one.rows)
    rows = NF4Tensor.stack([first, second])
    mixed = type(one)(one.stack, rows, [one.matrices[0], dequantize(second)])
    xs = make_activations(size, "bfloat16", copies=2)["forward"]
    xs = [xs[0], 2 * xs[1]]
    expected = np.asarray(xs[1], np.float64) @ np.asarray(dequantize(second), np.float64)
    for program in (library.dense_product("forward", xs, mixed), library.fused_product(xs, mixed)):
        program.run(1)
        assert np.linalg.norm(program.last_result() - expected) < 4e-3 * np.linalg.norm(expected)


def test_the_timing_door_takes_the_library(
    device: jax.Device, library: BitsAndBytes, library_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    options = ["--quick", "--shapes", "128x64", "--rows", "4", "128", "--out", str(out)]
    options += ["--bitsandbytes", str(library_path)]
    assert bench.main(["kernels", "--device", "cpu" if device.platform == "cpu" else "gpu", *options]) == 0
    report = json.loads(out.read_text())
    assert [(case["op"], case["rows"]) for case in report["results"]] == [
        ("forward", 4),
        ("dx", 4),
        ("forward", 128),
        ("dx", 128),
    ]
    for case in report["results"]:
        assert case["errors"] == {}
        assert {"dense", "cublas", "bnb_dequantize", case["route"]} <= case["seconds"].keys()
        assert ("bnb_fused" in case["seconds"]) == (case["op"] == "forward" and case["rows"] <= 64)
        assert case["bitsandbytes"] in ("bnb_fused", "bnb_dequantize")
        assert case["ratio"].keys() == case["seconds"].keys() - {case["route"]}
    assert {bar["cases"] for bar in report["bars"]} > {0}


def test_a_broken_library_is_told(host_double: Path, tmp_path: Path) -> None:
    broken = tmp_path / "libbitsandbytes_cuda130.so"
    broken.write_bytes(b"no library")
    for name in ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13"):
        (tmp_path / name).symlink_to(host_double.with_name(name))
    with pytest.raises(UserError, match=r"bitsandbytes' library .* cannot be used"):
        BitsAndBytes(broken)


def nibbles(packed: np.ndarray, size: int) -> np.ndarray:
    packed = packed.reshape(-1)
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[:size]
