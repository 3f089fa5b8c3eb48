"""Bytes and values against bitsandbytes' (tests/golden/README.md): rows "packed bytes", "dequantize", "8-bit codes"."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qlora_jax.nf4 import dequantize, quantize
from qlora_jax.nf4.codebook import CODEBOOKS, DYNAMIC_MAP, NF4_CODE, NF4_THRESHOLDS
from qlora_jax.nf4.decode import decode_absmax

ARRAYS = np.load(Path(__file__).parents[1] / "golden" / "nf4_golden.npz")
CASES: dict[str, Any] = json.loads(bytes(ARRAYS["meta_json"]))["cases"]
NF4_CASES = sorted(name for name, case in CASES.items() if "nf4" in case["quant_types"])
FP4_CASES = sorted(name for name, case in CASES.items() if "fp4" in case["quant_types"])
DOUBLE_QUANT_CASES = sorted(name for name in NF4_CASES if CASES[name].get("dq"))


def golden(key: str) -> np.ndarray:
    """An array of the golden file; bfloat16 is stored there as uint16 bits."""
    array = ARRAYS[key]
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def kernel_of(name: str) -> jax.Array:
    return jnp.asarray(golden(f"{name}/W").reshape(CASES[name]["shape"])).T


def bits(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def test_tables_equal_bitsandbytes():
    np.testing.assert_array_equal(NF4_CODE, ARRAYS["nf4_code"])
    np.testing.assert_array_equal(NF4_THRESHOLDS, ARRAYS["nf4_thresholds"])
    # Of code 8 the table of quantize_4bit says 0, and the CUDA kernel makes -0.
    np.testing.assert_array_equal(CODEBOOKS["fp4"].values, ARRAYS["fp4_code"])
    np.testing.assert_array_equal(CODEBOOKS["fp4"].thresholds, ARRAYS["fp4_thresholds_cuda"])
    np.testing.assert_array_equal(CODEBOOKS["fp4"].by_magnitude, ARRAYS["fp4_codes_by_magnitude"])
    np.testing.assert_array_equal(DYNAMIC_MAP, ARRAYS["dynamic_map_signed"])
    digest = hashlib.sha256(DYNAMIC_MAP.astype("<f4").tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


@pytest.mark.parametrize("name", NF4_CASES)
def test_packed_bytes_and_scales_are_bitsandbytes(name):
    w = quantize(kernel_of(name), block_size=CASES[name]["blocksize"], double_quant=False)
    np.testing.assert_array_equal(np.ravel(w.packed), golden(f"{name}/nf4/packed"))
    np.testing.assert_array_equal(np.ravel(w.absmax), golden(f"{name}/nf4/absmax"))
    out_features, in_features = CASES[name]["shape"]
    assert w.shape == (in_features, out_features)
    assert w.dtype == str(golden(f"{name}/W").dtype)


@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", NF4_CASES)
def test_dequantize_is_bit_equal(name, compile_):
    w = quantize(kernel_of(name), block_size=CASES[name]["blocksize"], double_quant=False)
    expected = golden(f"{name}/nf4/deq").reshape(CASES[name]["shape"])
    np.testing.assert_array_equal(bits(compile_(dequantize)(w).T), bits(expected))


@pytest.mark.parametrize("name", FP4_CASES)
def test_fp4_bytes_are_those_of_bitsandbytes_on_cuda(name):
    """Its CPU path has other thresholds and no negative zero: about 1 % of its bytes differ."""
    w = quantize(kernel_of(name), "fp4", block_size=CASES[name]["blocksize"], double_quant=False)
    np.testing.assert_array_equal(np.ravel(w.packed), golden(f"{name}/fp4/packed_cuda"))
    np.testing.assert_array_equal(np.ravel(w.absmax), golden(f"{name}/fp4/absmax"))


@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", FP4_CASES)
def test_fp4_dequantize_is_bit_equal(name, compile_):
    w = quantize(kernel_of(name), "fp4", block_size=CASES[name]["blocksize"], double_quant=False)
    stored = dataclasses.replace(w, packed=jnp.asarray(golden(f"{name}/fp4/packed")).reshape(w.packed.shape))
    expected = golden(f"{name}/fp4/deq").reshape(CASES[name]["shape"])
    np.testing.assert_array_equal(bits(compile_(dequantize)(stored).T), bits(expected))


@pytest.mark.parametrize("name", DOUBLE_QUANT_CASES)
def test_double_quantization_codes(name):
    w = quantize(kernel_of(name), block_size=CASES[name]["blocksize"])
    key = f"{name}/nf4_dq"
    np.testing.assert_allclose(w.absmax_offset, golden(f"{key}/offset"), rtol=1e-6)
    np.testing.assert_allclose(w.absmax_scale, golden(f"{key}/nested_absmax"), rtol=1e-6)
    # The offset's last bit depends on the order of a sum, which moves no code in these cases.
    np.testing.assert_array_equal(np.ravel(w.absmax), golden(f"{key}/absmax_q"))


@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", DOUBLE_QUANT_CASES)
def test_double_quantized_values_are_bit_equal(name, compile_):
    key = f"{name}/nf4_dq"
    w = quantize(kernel_of(name), block_size=CASES[name]["blocksize"])
    stored = dataclasses.replace(
        w,
        absmax=jnp.asarray(golden(f"{key}/absmax_q")).reshape(w.absmax.shape),
        absmax_scale=jnp.asarray(golden(f"{key}/nested_absmax")),
        absmax_offset=jnp.asarray(golden(f"{key}/offset")),
    )
    groups = jnp.arange(w.absmax.size) // 256
    scales = compile_(decode_absmax)(stored.absmax.reshape(-1), stored.absmax_scale, stored.absmax_offset, groups)
    np.testing.assert_array_equal(bits(scales), bits(golden(f"{key}/absmax_deq")))
    expected = golden(f"{key}/deq").reshape(CASES[name]["shape"])
    np.testing.assert_array_equal(bits(compile_(dequantize)(stored).T), bits(expected))
