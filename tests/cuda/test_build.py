"""What the build makes of a machine with and without a CUDA compiler: CMake configures, nothing is compiled."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pybind11
import pytest

from qlora_jax._lib import _plan

SOURCES = Path(__file__).parents[2] / "xla_ffi"
ALL_ARCHITECTURES = "80, 86, 89, 90a, 100a, 120"


def wheels_toolkit() -> Path:
    """The CUDA compiler's folder of pip's wheels, which the test extra installs."""
    folders = importlib.util.find_spec("nvidia").submodule_search_locations
    (toolkit,) = [Path(folder, "cu13") for folder in folders if Path(folder, "cu13", "bin", "nvcc").exists()]
    return toolkit


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """An interpreter without any wheel."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def environment(**variables) -> dict[str, str]:
    """This process's, without a CUDA compiler."""
    hidden = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX", "CUDAFLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    kept["PATH"] = os.pathsep.join(
        folder for folder in kept["PATH"].split(os.pathsep) if not Path(folder, "nvcc").exists()
    )
    return kept | variables


def configure(build, *options, python=sys.executable, **variables) -> subprocess.CompletedProcess:
    # The environment's own cmake may not be on PATH.
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert cmake is not None, "CMake is needed: install the extra test"
    command = [
        cmake,
        *("-S", SOURCES, "-B", build),
        f"-DCMAKE_CXX_COMPILER={os.environ.get('CXX') or shutil.which('c++')}",
        f"-DCMAKE_MAKE_PROGRAM={shutil.which('make')}",
        *("-G", "Unix Makefiles"),
        f"-DPython_EXECUTABLE={python}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DXLA_FFI_INCLUDE={jax.ffi.include_dir()}",
        *options,
    ]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)


def status_line(configured: subprocess.CompletedProcess) -> str:
    (line,) = [line for line in configured.stdout.splitlines() if line.startswith("-- CUDA kernels: ")]
    return line.removeprefix("-- CUDA kernels: ")


def targets(build) -> set[str]:
    listed = subprocess.run(["make", "-C", build, "help"], capture_output=True, text=True, check=True).stdout
    return {"_cpu", "_plan", "_cuda"} & {line.removeprefix("... ") for line in listed.splitlines()}


def test_off_builds_without_a_look_for_a_compiler(tmp_path):
    configured = configure(tmp_path, "-DQLORA_CUDA=OFF", CUDA_HOME=str(wheels_toolkit()))
    assert configured.returncode == 0, configured.stderr
    assert status_line(configured) == "not built: QLORA_CUDA=OFF"
    assert targets(tmp_path) == {"_cpu", "_plan"}


def test_without_a_compiler_one_line_says_so(tmp_path, bare_python):
    configured = configure(tmp_path, python=bare_python)
    assert configured.returncode == 0, configured.stderr
    assert status_line(configured) == (
        "not built: no nvcc in CMAKE_CUDA_COMPILER, CUDACXX, CUDA_HOME, CUDA_PATH, PATH, site-packages/nvidia/cu13"
    )
    assert targets(tmp_path) == {"_cpu", "_plan"}


def test_a_compiler_that_does_not_work_is_no_compiler(tmp_path, bare_python):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\necho 'cuda_fp16.h:1: fatal error: nv/target: No such file \"or\" directory' >&2\nexit 1\n"
    )
    nvcc.chmod(0o755)
    configured = configure(tmp_path / "build", python=bare_python, PATH=f"{tmp_path}:{environment()['PATH']}")
    assert configured.returncode == 0, configured.stderr
    assert status_line(configured).startswith(f"not built: {nvcc} does not compile a small program: ")
    assert "nv/target: No such file" in status_line(configured)
    assert targets(tmp_path / "build") == {"_cpu", "_plan"}


def test_what_was_asked_for_and_cannot_be_had_is_an_error(tmp_path, bare_python):
    configured = configure(tmp_path / "pip", "-DQLORA_CUDA=PIP", python=bare_python, CUDA_HOME=str(wheels_toolkit()))
    assert configured.returncode != 0
    assert "QLORA_CUDA=PIP needs a CUDA compiler" in configured.stderr
    assert "site-packages/nvidia/cu13" in configured.stderr
    configured = configure(tmp_path / "word", "-DQLORA_CUDA=YES")
    assert configured.returncode != 0
    assert "QLORA_CUDA must be AUTO, OFF or PIP, got 'YES'" in configured.stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", ["CUDA_HOME", "CUDACXX", "PATH", "wheels"])
def test_a_compiler_is_found_in(tmp_path, bare_python, place):
    toolkit = wheels_toolkit()
    variables = {
        "CUDA_HOME": {"CUDA_HOME": str(toolkit)},
        "CUDACXX": {"CUDACXX": str(toolkit / "bin" / "nvcc")},
        "PATH": {"PATH": f"{toolkit / 'bin'}:{environment()['PATH']}"},
        "wheels": {},
    }[place]
    python = sys.executable if place == "wheels" else bare_python
    mode = ("-DQLORA_CUDA=PIP",) if place == "wheels" else ("-DQLORA_CUDA_ARCHITECTURES=90a-real",)
    configured = configure(tmp_path, *mode, python=python, **variables)
    assert configured.returncode == 0, configured.stderr
    architectures = ALL_ARCHITECTURES if place == "wheels" else "90a"
    version = status_line(configured).split()[3]
    assert status_line(configured) == f"built by nvcc {version} for {architectures} ({toolkit / 'bin' / 'nvcc'})"
    assert all(part.isdigit() for part in version.split("."))
    assert targets(tmp_path) == {"_cpu", "_plan", "_cuda"}


def test_the_installed_library_is_what_its_build_said():
    """Importing the CUDA library needs no GPU and no driver."""
    if _plan.cuda_build().startswith("built by nvcc"):
        cuda = importlib.import_module("qlora_jax._lib._cuda")
        assert set(cuda.registrations()) == set(_plan.recording_handlers())
        assert _plan.cuda_build().endswith(f" for {cuda.architectures()}")
    else:
        assert _plan.cuda_build().startswith("not built: ")
        assert importlib.util.find_spec("qlora_jax._lib._cuda") is None
