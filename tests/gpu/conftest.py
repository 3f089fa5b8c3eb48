"""Tests of what runs on a GPU. Each runs on a CPU too, in the ordinary suite: so they are known to work themselves.

    JAX_PLATFORMS=cuda,cpu QLORA_BITSANDBYTES_LIBRARY=.../libbitsandbytes_cuda130.so pytest -m gpu tests/gpu

Nothing is skipped: what a test needs and does not find is its failure. What QLORA_GPU_TESTS_WITHOUT names (some of
bitsandbytes,sanitizer,demo) is left out, and the report says so.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).parent))  # the helpers beside this file
pytest.register_assert_rewrite("gpu_cases")

from gpu_cases import WAYS, Way  # noqa: E402

_LIBRARIES = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libbitsandbytes_cuda130.so")


def need_gpu() -> jax.Device:
    """The GPU, or the test's failure."""
    try:
        return jax.local_devices(backend="cuda")[0]
    except RuntimeError as error:
        why = f"JAX finds no CUDA GPU ({error}): JAX_PLATFORMS=cuda,cpu pytest -m gpu"
    pytest.fail(why, pytrace=False)


@pytest.fixture
def gpu() -> jax.Device:
    return need_gpu()


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[jax.Device]:
    """The device that arrays are made on."""
    chosen = need_gpu() if request.param == "gpu" else jax.local_devices(backend="cpu")[0]
    with jax.default_device(chosen):
        yield chosen


@pytest.fixture(params=[pytest.param(way, id=str(way), marks=way.marks) for way in WAYS])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """A way to multiply, on its device."""
    chosen = need_gpu() if request.param.device == "gpu" else jax.local_devices(backend="cpu")[0]
    with jax.default_device(chosen):
        yield request.param


@pytest.fixture(scope="session")
def host_double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bitsandbytes' library and CUDA's beside it, as one that works on host memory; needs a C++ compiler."""
    folder = tmp_path_factory.mktemp("host_double")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.fail("a C++ compiler is needed: set CXX", pytrace=False)
    source = Path(__file__).with_name("host_double.cc")
    first = folder / _LIBRARIES[0]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off"]
    subprocess.run([compiler, *flags, str(source), "-o", str(first)], check=True)
    for name in _LIBRARIES[1:]:
        shutil.copy(first, folder / name)
    return folder / _LIBRARIES[-1]


@pytest.fixture
def device_of_way(way: Way) -> jax.Device:
    return jax.local_devices(backend="cuda" if way.device == "gpu" else "cpu")[0]
