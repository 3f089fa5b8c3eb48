"""Finding nvcc, and keeping what it made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ptx_interpreter import Module, toolchain

KERNEL = """#include "numbers.cuh"
extern "C" __global__ void __launch_bounds__(64) fill(int* out) { out[threadIdx.x] = kNumber EXTRA; }
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "_cache_folder", lambda: tmp_path)
    (tmp_path / "numbers.cuh").write_text('#pragma once\n#include "numbers.cuh"\nconstexpr int kNumber = 1;\n')
    path = tmp_path / "fill.cu"
    path.write_text(KERNEL)
    return path


def built(folder: Path, suffix: str) -> set[Path]:
    return set(folder.glob(f"*.{suffix}"))


def test_ptx_is_made_again_only_when_something_changed(source):
    folder = source.parent
    text = toolchain.compile_ptx(source, "sm_80", ["EXTRA=+0"])
    assert "fill" in Module(text).kernels
    assert Module(text).kernels["fill"].maxntid[0] == 64
    first = built(folder, "ptx")
    assert len(first) == 1
    stamp = next(iter(first)).stat().st_mtime_ns
    assert toolchain.compile_ptx([source], "sm_80", ["EXTRA=+0"]) == text
    assert built(folder, "ptx") == first
    assert next(iter(first)).stat().st_mtime_ns == stamp
    (folder / "numbers.cuh").write_text("constexpr int kNumber = 2;\n")
    assert toolchain.compile_ptx(source, "sm_80", ["EXTRA=+0"]) != text
    assert len(built(folder, "ptx")) == 2
    assert toolchain.compile_ptx(source, "sm_90a", ["EXTRA=+0"]).count(".target sm_90a") == 1
    assert len(built(folder, "ptx")) == 3


def test_headers_of_the_project_count_and_the_toolkits_do_not(source):
    found = toolchain.project_files(source)
    assert found == sorted([source, source.parent / "numbers.cuh"])
    kernels = Path(__file__).parent / "kernels"
    assert [path.name for path in toolchain.project_files(kernels / "gemm_sm90.cu")] == ["gemm_sm90.cu", "hopper.cuh"]


def test_what_nvcc_refuses_is_said(source):
    with pytest.raises(toolchain.ToolchainError, match=r'identifier "EXTRA" is undefined|expected a ";"'):
        toolchain.compile_ptx(source, "sm_80")
    assert not built(source.parent, "ptx")


def test_without_nvcc_the_packages_are_named(monkeypatch):
    monkeypatch.setattr(toolchain, "_folders", lambda: [])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(toolchain.ToolchainError) as error:
        toolchain.find_tool("nvcc")
    for package in (
        "nvidia-cuda-nvcc==13.0.*",
        "nvidia-cuda-crt",
        "nvidia-nvvm",
        "nvidia-cuda-runtime",
        "nvidia-cuda-cccl",
    ):
        assert package in str(error.value)
    with pytest.raises(toolchain.ToolchainError, match="nvidia-cuda-cuobjdump"):
        toolchain.find_tool("cuobjdump")


def test_the_wheels_come_before_cuda_home_and_path(monkeypatch, tmp_path):
    wheel, home, path = tmp_path / "wheel", tmp_path / "home", tmp_path / "path"
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: {"purelib": str(wheel), "platlib": str(wheel)})
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("PATH", str(path))
    for folder in (path, home / "bin", wheel / "nvidia" / "cu13" / "bin"):
        folder.mkdir(parents=True)
        (folder / "nvcc").touch(mode=0o755)
        assert toolchain.find_tool("nvcc") == folder / "nvcc"


def test_processes_that_want_the_same_ptx_share_one_build(source):
    program = f"""
import pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from ptx_interpreter import toolchain
toolchain._cache_folder = lambda: pathlib.Path({str(source.parent)!r})
run, builds = toolchain._run, []
toolchain._run = lambda command: (builds.append(1) if "--version" not in command else None) or run(command)
text = toolchain.compile_ptx({str(source)!r}, "sm_80", ["EXTRA=+0"])
print(len(builds), len(text))
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(3)
    ]
    answers = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(builds for builds, _ in answers) == ["0", "0", "1"]
    assert len({length for _, length in answers}) == 1


def test_machine_code_and_its_resources(source):
    path = toolchain.cubin(source, "sm_80", ["EXTRA=+threadIdx.x"])
    assert path.read_bytes()[:4] == b"\x7fELF"
    usage = toolchain.resource_usage(path)["fill"]
    assert 0 < usage.registers < 32
    assert usage.spill_stores == usage.spill_loads == usage.stack == usage.shared == 0
    assert "Compiling entry function 'fill' for 'sm_80'" in toolchain.ptxas_log(path)
    text = toolchain.sass(path)
    assert "Function : fill" in text
    assert "STG.E" in text


def test_the_cache_lies_outside_the_sources():
    folder = toolchain._cache_folder()
    assert folder.parent.name == ".pytest_cache" or str(folder).startswith(toolchain.tempfile.gettempdir())
