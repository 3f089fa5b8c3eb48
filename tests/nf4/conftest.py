"""Programs for CUDA, lowered on a machine that has neither the GPU nor the kernels."""

from collections.abc import Callable, Iterator

import jax
import pytest

from qlora_jax.nf4 import kernels


@pytest.fixture
def cuda_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the CUDA kernels were loaded. JAX's caches do not know of it, hence the clearing."""
    monkeypatch.setitem(kernels._REPORT, "cuda", "loaded")
    monkeypatch.delenv("QLORA_JAX_COMPUTE_CAPABILITY", raising=False)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def for_cuda(cuda_loaded: None) -> Callable[..., str]:
    """`for_cuda(function, *args)`: StableHLO of the program for CUDA."""

    def lowered(function: Callable[..., object], *args: object) -> str:
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    return lowered
