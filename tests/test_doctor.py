"""The examining door: what it finds here, and what it says of machines that are otherwise."""

import ctypes
import json
import os
import subprocess
import sys

import pytest

from qlora_jax import doctor
from qlora_jax.diagnosis import driver, findings, self_check
from qlora_jax.diagnosis.advice import problems
from qlora_jax.diagnosis.driver import Driver, Gpu
from qlora_jax.diagnosis.self_check import Check

H100 = {"name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "memory_bytes": 80 << 30}


def machine(*, gpu=True, backend="gpu", library="loaded", kernels="used", capability="9.0", **changed):
    """Findings of a machine, a healthy one with an H100 unless said otherwise."""
    device = {"platform": backend, "kind": "cpu", "memory_bytes": None, "compute_capability": None}
    if backend == "gpu":
        device |= {"kind": H100["name"], "memory_bytes": 1 << 36, "compute_capability": capability}
    return {
        "jax_failure": None,
        "dispatch_failure": None,
        "backend": backend,
        "devices": [device],
        "driver": {"cuda": "13.0", "gpus": [H100] if gpu else [], "why_not": None if gpu else "no driver"},
        "host_memory": True,
        "cpu_library": "loaded",
        "cuda_library": library,
        "cuda_kernels": kernels,
        "environment": {},
        **changed,
    }


def told(found, checks=()):
    return [(problem.broken, f"{problem.text} -> {problem.fix}") for problem in problems(found, checks)]


def test_this_machine_as_json(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["usable"] is True
    assert report["cpu_library"] == "loaded"
    assert report["instruction_set"] in ("portable", "avx2", "avx512", "avx512_bf16", "amx")
    assert report["cuda_library"] == "loaded" or report["cuda_library"].startswith("not ")
    assert report["versions"]["jax"]
    assert report["backend"] == "cpu"
    assert report["environment"]["JAX_PLATFORMS"] == "cpu"
    assert report["extras"]["test"] is True
    assert set(report["dispatch"]["table"]) == {"8.0", "8.6", "8.9", "9.0", "10.0", "12.0"}
    assert {(check["what"], check["way"]) for check in report["self_check"]} == {("forward", "ffi"), ("dx", "ffi")}
    for check in report["self_check"]:
        assert check["passed"]
        assert 0 < check["error"] <= check["bound"] == 1.8e-3
    assert not [problem for problem in report["problems"] if problem["broken"]]


def test_this_machine_in_words(capsys):
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    for text in ("CPU kernels    loaded", "CUDA kernels   ", "forward by ffi: good", "kernels asked  auto", "extras"):
        assert text in printed
    assert printed.endswith("usable\n")


def test_as_a_command_with_a_variable_that_holds_no_known_word():
    variables = os.environ | {"QLORA_JAX_KERNELS": "fii", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "qlora_jax.doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["usable"] is False
    assert "QLORA_JAX_KERNELS must be one of" in report["problems"][0]["text"]
    assert report["self_check"] == []


def test_a_wrong_kernel_is_broken(monkeypatch, capsys):
    honest = self_check.nf4_matmul
    monkeypatch.setattr(self_check, "nf4_matmul", lambda x, w: honest(x, w) * 1.25)
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "forward by ffi: BAD, error 2.5e-01" in printed
    assert "broken: self-check: dx by ffi" in printed
    assert "QLORA_JAX_KERNELS=xla" in printed
    assert printed.endswith("NOT usable as it is\n")


def test_a_kernel_that_fails_is_broken(monkeypatch, capsys):
    def fail(x, w):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(self_check, "nf4_matmul", fail)
    assert doctor.main([]) == 1
    assert "RuntimeError: no kernel image is available" in capsys.readouterr().out


def test_without_compiled_kernels_pure_jax_is_checked(monkeypatch, capsys):
    from qlora_jax.nf4 import kernels

    monkeypatch.setitem(kernels._REPORT, "cpu", "not loaded: undefined symbol")
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "forward by xla: good" in printed
    assert "warning: no compiled kernels for the CPU (not loaded: undefined symbol)" in printed
    assert "pip install" in printed


def test_on_a_gpu_every_route_is_checked(monkeypatch):
    monkeypatch.setattr(self_check.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(self_check, "kernel_report", lambda: {"cpu": "loaded", "cuda": "loaded"})
    monkeypatch.setattr(self_check, "cuda_kernel", lambda: "ffi")
    assert self_check.ways() == ("skinny", "tile", "dequantize")
    monkeypatch.setattr(self_check, "cuda_kernel", lambda: "xla")
    assert self_check.ways() == ("xla",)
    monkeypatch.undo()
    # On a CPU "dequantize" is pure JAX, so this way is executed here.
    monkeypatch.setattr(self_check, "ways", lambda: ("dequantize",))
    checks = self_check.run_checks()
    assert [check.what for check in checks] == ["forward", "dx", "dequantize"]
    assert all(check.passed for check in checks)
    assert checks[2].error == checks[2].bound == 0


def test_jax_that_does_not_start_is_told(monkeypatch, capsys):
    import jax

    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'\nand more")

    monkeypatch.setattr(jax, "devices", fail)
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "broken: JAX does not start: RuntimeError: Unable to initialize backend 'cuda'\n" in printed
    assert "fix: unset JAX_PLATFORMS" in printed


def test_mistyped_options(capsys):
    assert doctor.main(["--jsn"]) == 2
    assert "did you mean --json?" in capsys.readouterr().err
    assert doctor.main(["everything"]) == 2
    assert "--help" in capsys.readouterr().err
    with pytest.raises(SystemExit) as version:
        doctor.main(["--version"])
    assert version.value.code == 0


def test_healthy_machines_have_no_problems():
    assert told(machine()) == []
    assert told(machine(gpu=False, backend="cpu", kernels="no GPU: no driver", library="not built: no nvcc")) == []


def test_a_gpu_without_cuda_kernels_is_a_warning_with_the_fix():
    why = "not built: no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH"
    ((broken, text),) = told(machine(library=why, kernels="the library is not built"))
    assert not broken
    for part in (H100["name"], why, "QLORA_CUDA=PIP pip install"):
        assert part in text


def test_a_gpu_that_jax_does_not_use():
    for why, fix in (
        ("JAX has no CUDA plugin", "pip install 'jax[cuda13]'"),
        ("JAX runs on cpu, since JAX_PLATFORMS=cpu", "unset JAX_PLATFORMS"),
        ("JAX runs on cpu although its plugin is there", "shows the whole error"),
    ):
        environment = {"JAX_PLATFORMS": "cpu"} if "since" in why else {}
        ((broken, text),) = told(machine(backend="cpu", kernels=why, environment=environment))
        assert not broken
        assert H100["name"] in text
        assert why in text
        assert fix in text


def test_kernels_without_code_for_the_gpu_leave_it_to_pure_jax():
    ((broken, text),) = told(machine(capability="7.5", kernels="wrong architecture: compiled for 90a, the GPU has 7.5"))
    assert not broken
    assert "in pure JAX: wrong architecture" in text
    assert "QLORA_CUDA_ARCHITECTURES=75-real" in text


def test_variables_that_cost_something():
    environment = {"LD_LIBRARY_PATH": "/usr/local/cuda/lib64:/x", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    texts = told(machine(environment=environment | {"QLORA_JAX_KERNELS": "xla"}, host_memory=False))
    assert [broken for broken, _ in texts] == [False] * 4
    for (_, text), name in zip(
        texts,
        ("QLORA_JAX_KERNELS", "LD_LIBRARY_PATH", "XLA_PYTHON_CLIENT_ALLOCATOR", "pinned host memory"),
        strict=True,
    ):
        assert name in text


def test_what_is_broken_comes_first():
    texts = told(machine(host_memory=False), [Check("dx", "tile", 1.0, 3.2e-3)])
    assert [broken for broken, _ in texts] == [True, False]
    assert "dx by tile" in texts[0][1]


def test_why_the_cuda_kernels_are_not_used(monkeypatch):
    from qlora_jax.nf4 import kernels

    class Cuda:
        @staticmethod
        def architectures():
            return "80, 90a"

    monkeypatch.setattr(kernels, "load_module", lambda name: Cuda)
    there, none = Driver("13.0", (Gpu(**H100),), None), Driver(None, (), "no driver")
    hopper = [{"compute_capability": "9.0"}]
    why = findings._why_not_used
    assert why("gpu", hopper, there, "loaded", ["80", "90a"]) is None
    assert why("cpu", [], none, "loaded", ["90a"]) == "no GPU: no driver"
    assert why("gpu", hopper, there, "not built", []) == "the library is not built"
    turing = [{"compute_capability": "7.5"}]
    expected = "wrong architecture: compiled for 80, 90a, the GPU has 7.5"
    assert why("gpu", turing, there, "loaded", ["80", "90a"]) == expected
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(findings.importlib.util, "find_spec", lambda name: "cuda13" in name or None)
    assert why("cpu", [], there, "loaded", ["90a"]) == "JAX runs on cpu, since JAX_PLATFORMS=cpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "although its plugin is there" in why("cpu", [], there, "loaded", ["90a"])
    monkeypatch.setattr(findings.importlib.util, "find_spec", lambda name: None)
    assert why("cpu", [], there, "loaded", ["90a"]) == "JAX has no CUDA plugin"


class FakeDriver:
    """libcuda as Python: one H100, or none, or an error."""

    def __init__(self, count=1, init=0):
        self.count, self.init = count, init

    def cuDriverGetVersion(self, version):
        version._obj.value = 13000

    def cuInit(self, flags):
        return self.init

    def cuGetErrorName(self, code, text):
        text._obj.value = b"CUDA_ERROR_NO_DEVICE"

    def cuDeviceGetCount(self, count):
        count._obj.value = self.count

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal

    def cuDeviceGetName(self, name, size, device):
        name.value = H100["name"].encode()

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 9, 76: 0}[attribute]

    def cuDeviceTotalMem_v2(self, memory, device):
        memory._obj.value = H100["memory_bytes"]


def test_the_driver_is_asked_without_jax(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver())
    assert driver.ask_driver() == Driver("13.0", (Gpu(**H100),), None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(count=0))
    assert "CUDA_VISIBLE_DEVICES" in driver.ask_driver().why_not
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(init=100))
    assert "CUDA_ERROR_NO_DEVICE" in driver.ask_driver().why_not

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert "libcuda.so.1 is not found" in driver.ask_driver().why_not


def test_why_the_library_is_not_there(monkeypatch):
    class Plan:
        def __init__(self, build):
            self.build = build

        def cuda_build(self):
            return self.build

    for build, expected in (
        ("not built: no nvcc in PATH", "not built: no nvcc in PATH"),
        ("built by nvcc V13.0.88 for 90a", "not installed, although it was built by nvcc V13.0.88 for 90a"),
    ):
        monkeypatch.setattr(findings, "_library", lambda name, build=build: Plan(build))
        assert findings._why_not_built() == expected
    monkeypatch.setattr(findings, "_library", lambda name: None)
    assert findings._why_not_built() == "not built"
