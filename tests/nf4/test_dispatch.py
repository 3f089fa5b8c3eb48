"""Which kernel runs where: the table, what the kernels can take, overrides, and the record of it."""

import dataclasses
import types

import jax.numpy as jnp
import pytest

from qlora_jax.nf4 import choose_route, dispatch_report, kernel_report, quantize, use_compute_capability, use_kernels
from qlora_jax.nf4.dispatch import TABLE, compute_capability, cuda_kernel, cuda_route, thresholds, why_not_fused
from qlora_jax.nf4.kernels import chosen_kernels

W = quantize(jnp.ones((128, 64), jnp.bfloat16), layout="fragments")


def route(rows, w=W, dtype="bfloat16", *, capability="9.0", input_gradient=False):
    return choose_route(rows, w, dtype, input_gradient=input_gradient, compute_capability=capability)


@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize(
    ("capability", "tile"),
    [
        *[("8.0", 1536), ("8.6", 1536), ("8.9", 1536), ("9.0", 256), ("10.0", 256), ("12.0", 1536)],
        *[("8.7", 1536), ("10.3", 256), ("11.0", 256), ("12.1", 1536), ("13.0", 1536)],
    ],
)
def test_the_number_of_rows_and_the_device_decide(capability, tile, input_gradient):
    expected = {1: "skinny", 64: "skinny", 65: "tile", tile: "tile", tile + 1: "dequantize", 16384: "dequantize"}
    for rows, name in expected.items():
        assert route(rows, capability=capability, input_gradient=input_gradient) == name


def test_each_direction_has_its_own_limits(monkeypatch):
    forward = TABLE["8.0"]["forward"]
    entry = {"forward": forward, "input_gradient": dataclasses.replace(forward, skinny=8, tile=16)}
    monkeypatch.setitem(TABLE, "8.0", entry)
    assert [route(rows, capability="8.0", input_gradient=True) for rows in (8, 9, 17)] == [
        "skinny",
        "tile",
        "dequantize",
    ]
    assert route(9, capability="8.0") == "skinny"


def test_a_gpu_older_than_the_kernels_is_refused():
    with pytest.raises(ValueError, match=r"compute capability 7\.5, only from 8\.0"):
        thresholds("7.5")


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "fused"),
    [
        ("bfloat16", "bfloat16", True),
        ("float16", "float16", True),
        ("bfloat16", "float16", True),
        ("bfloat16", "float32", True),
        ("float16", "float32", True),
        ("float16", "bfloat16", False),
        ("float32", "float32", False),
        ("float32", "bfloat16", False),
    ],
)
def test_dtypes_that_the_fused_kernels_take(x_dtype, w_dtype, fused):
    w = dataclasses.replace(W, dtype=w_dtype)
    assert route(1, w, x_dtype) == ("skinny" if fused else "dequantize")
    assert (why_not_fused(w, x_dtype) is None) == fused


def test_weights_that_the_fused_kernels_do_not_take():
    assert route(1, W.to_layout("rows")) == "dequantize"
    assert route(1, quantize(jnp.ones((96, 64), jnp.bfloat16), block_size=32, layout="fragments")) == "dequantize"
    assert route(1, quantize(jnp.ones((50, 64), jnp.bfloat16))) == "dequantize"
    assert route(1, quantize(jnp.ones((4096, 64), jnp.bfloat16), block_size=4096, layout="fragments")) == "skinny"


def test_the_device_that_is_planned_for(monkeypatch):
    monkeypatch.delenv("QLORA_JAX_COMPUTE_CAPABILITY", raising=False)
    assert compute_capability() == ("9.0", "default")
    monkeypatch.setenv("QLORA_JAX_COMPUTE_CAPABILITY", "8.6")
    assert compute_capability() == ("8.6", "QLORA_JAX_COMPUTE_CAPABILITY")
    with use_compute_capability("12.0"):
        assert compute_capability() == ("12.0", "use_compute_capability")
    monkeypatch.setenv("QLORA_JAX_COMPUTE_CAPABILITY", "sm_90")
    with pytest.raises(ValueError, match=r"QLORA_JAX_COMPUTE_CAPABILITY must be .* such as 9\.0, got 'sm_90'"):
        compute_capability()
    with pytest.raises(ValueError, match="got '9'"), use_compute_capability("9"):
        pass


def test_the_oldest_device_decides(monkeypatch):
    import jax

    class Device:
        def __init__(self, capability):
            self.compute_capability = capability

    monkeypatch.delenv("QLORA_JAX_COMPUTE_CAPABILITY", raising=False)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device("10.0"), Device("8.9"), Device("9.0")])
    assert compute_capability() == ("8.9", "device")


def test_overrides_on_cuda(cuda_loaded):
    assert cuda_route(1, W, "bfloat16", input_gradient=False) == "skinny"
    for choice in ("skinny", "tile", "dequantize", "xla"):
        with use_kernels(choice):
            assert cuda_route(7, W, "bfloat16", input_gradient=True) == choice
    for choice in ("skinny", "tile"):
        with (
            use_kernels(choice),
            pytest.raises(RuntimeError, match=f"'{choice}' kernel was asked for, but activations"),
        ):
            cuda_route(7, W, "float32", input_gradient=False)
    with use_kernels("tile"), pytest.raises(RuntimeError, match=r"layout 'rows': w\.to_layout"):
        cuda_route(7, W.to_layout("rows"), "bfloat16", input_gradient=False)
    with use_compute_capability("7.5"):
        assert cuda_kernel() == "xla"
        with use_kernels("ffi"), pytest.raises(RuntimeError, match=r"asked for, but: .* 7\.5"):
            cuda_kernel()


def test_overrides_elsewhere(monkeypatch):
    from qlora_jax.nf4 import kernels as module

    monkeypatch.setitem(module._REPORT, "cuda", "not built")
    for choice in ("skinny", "tile"):
        with use_kernels(choice), pytest.raises(RuntimeError, match=f"'{choice}' .* on cpu, .* CUDA GPUs only"):
            chosen_kernels()
    with use_kernels("dequantize"):
        assert chosen_kernels("cpu") == "xla"
    for choice in ("ffi", "tile", "dequantize"):
        with use_kernels(choice), pytest.raises(RuntimeError, match="asked for on cuda, but: not built"):
            chosen_kernels("cuda")
    assert chosen_kernels("cuda") == chosen_kernels("rocm") == "xla"
    monkeypatch.setenv("QLORA_JAX_KERNELS", "tile")
    with pytest.raises(RuntimeError, match="'tile'"):
        chosen_kernels()


def test_a_library_that_was_not_built_is_told_from_one_that_does_not_load(monkeypatch):
    from qlora_jax.nf4 import kernels as module

    monkeypatch.setattr(module, "_MODULES", {"cuda": "_cuda"})

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=f"qlora_jax._lib.{name}")

    monkeypatch.setattr(module, "load_module", missing)
    assert module._load() == {"cuda": "not built"}

    def broken(name):
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(module, "load_module", broken)
    assert module._load() == {"cuda": "not loaded: libcudart.so.13: cannot open shared object file"}


def test_cuda_kernels_are_registered_only_where_jax_can_compile_for_cuda(monkeypatch):
    from qlora_jax.nf4 import kernels as module

    registered = []
    built = types.SimpleNamespace(registrations=lambda: {"target": "capsule"})
    monkeypatch.setattr(module, "_MODULES", {"cuda": "_cuda"})
    monkeypatch.setattr(module, "load_module", lambda name: built)
    monkeypatch.setattr(
        module.jax.ffi, "register_ffi_target", lambda *args, platform: registered.append((*args, platform))
    )

    monkeypatch.setattr(module, "_CUDA_PLUGINS", ("no_such_plugin",))
    assert "no CUDA plugin" in module._load()["cuda"]
    assert not registered
    monkeypatch.setattr(module, "_CUDA_PLUGINS", ("no_such_plugin", "jax"))
    assert module._load() == {"cuda": "loaded"}
    assert registered == [("target", "capsule", "CUDA")]


def test_the_record_of_it(monkeypatch, cuda_loaded):
    report = dispatch_report()
    limits = {"skinny": 64, "tile": 256}
    cuda = {
        "compute_capability": "9.0",
        "multiprocessors": 132,
        "known_by": "default",
        "thresholds": {"forward": limits, "input_gradient": limits},
    }
    assert report == {"asked": "auto", "asked_by": "default", "cuda": cuda}
    monkeypatch.setenv("QLORA_JAX_KERNELS", "dequantize")
    with use_compute_capability("7.0"):
        report = dispatch_report()
    assert (report["asked"], report["asked_by"]) == ("dequantize", "QLORA_JAX_KERNELS")
    assert report["cuda"] == {
        "compute_capability": "7.0",
        "multiprocessors": 132,
        "known_by": "use_compute_capability",
        "thresholds": {},
    }
    with use_kernels("xla"):
        assert dispatch_report()["asked_by"] == "use_kernels"


def test_the_record_without_cuda_kernels(monkeypatch):
    from qlora_jax.nf4 import kernels as module

    monkeypatch.setitem(module._REPORT, "cuda", "not built")
    assert dispatch_report()["cuda"] is None
    assert kernel_report()["cuda"] == "not built"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [(known, True) for known in ("8.0", "8.6", "8.7", "9.0", "10.0", "12.1")]
    + [(unknown, False) for unknown in ("7.5", "9.1", "10.3", "11.0")],
)
def test_which_gpus_the_machine_code_serves(monkeypatch, capability, runs):
    from qlora_jax.nf4 import kernels as module

    built = types.SimpleNamespace(architectures=lambda: "80, 86, 89, 90a, 100a, 120")
    monkeypatch.setattr(module, "load_module", lambda name: built)
    assert module.runs_on(capability) == runs


def test_a_gpu_that_the_kernels_were_not_built_for_gets_xla(monkeypatch, cuda_loaded):
    from qlora_jax.nf4 import dispatch as module

    monkeypatch.setattr(module, "compute_capability", lambda: ("10.3", "device"))
    monkeypatch.setattr(module, "runs_on", lambda capability: False)
    assert cuda_kernel() == "xla"
    with use_kernels("ffi"), pytest.raises(RuntimeError, match="QLORA_CUDA_ARCHITECTURES=103-real"):
        cuda_kernel()
