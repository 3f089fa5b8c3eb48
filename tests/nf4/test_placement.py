"""The layout that a weight gets where it lands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nf4 import device_layout, place, quantize, use_layout
from qlora_jax.nf4.placement import platform_of


def test_fragments_where_the_kernels_are(cuda_loaded, monkeypatch):
    from qlora_jax.nf4 import kernels

    assert device_layout((128, 100), 64, "cuda") == "fragments"
    assert device_layout((128, 100), 64, "cpu") == "rows"
    assert device_layout((100, 128), 64, "cuda") == "rows"  # blocks straddle rows
    assert device_layout((96, 128), 32, "cuda") == "rows"  # the fused kernels take blocks of 64 or more
    monkeypatch.setitem(kernels._REPORT, "cuda", "not built")
    assert device_layout((128, 100), 64, "cuda") == "rows"


def test_overrides(monkeypatch, cuda_loaded):
    monkeypatch.setenv("QLORA_JAX_LAYOUT", "rows")
    assert device_layout((128, 100), 64, "cuda") == "rows"
    with use_layout("fragments"):
        assert device_layout((128, 100), 64, "cpu") == "fragments"
        assert device_layout((100, 128), 64, "cpu") == "rows"
        assert device_layout((96, 128), 32, "cpu") == "fragments"
    with use_layout("auto"):
        assert device_layout((128, 100), 64, "cuda") == "fragments"
    monkeypatch.setenv("QLORA_JAX_LAYOUT", "fragmnts")
    with pytest.raises(ValueError, match=r"QLORA_JAX_LAYOUT: .*did you mean 'fragments'.*'auto'"):
        device_layout((128, 100), 64, "cuda")
    with pytest.raises(ValueError, match="use_layout"), use_layout("columns"):
        pass


def test_place_moves_bytes_only_where_it_has_to():
    w = quantize(jnp.ones((2, 128, 64), jnp.bfloat16))
    assert place(w) is w
    with use_layout("fragments"):
        placed = place(w)
        assert placed.layout == "fragments"
        assert place(placed) is placed
        ragged = quantize(jnp.ones((50, 33)))
        assert place(ragged) is ragged
    np.testing.assert_array_equal(place(placed).packed, w.packed)


def test_where_arrays_are():
    assert platform_of() == platform_of(np.ones(2)) == platform_of(jnp.ones(2)) == "cpu"
    with jax.default_device(jax.devices()[1]):
        assert platform_of() == "cpu"
    jax.eval_shape(lambda x: [x][platform_of(x) != "cpu"], jnp.ones(2))
