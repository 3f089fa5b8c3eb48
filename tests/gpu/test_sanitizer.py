"""compute-sanitizer watches every kernel on small operands: memory errors, races in shared memory, barriers.

On a CPU a script stands for it, which runs what it is given and says what it was told: that proves these tests.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from gpu_cases import leave_out

SCRIPT = Path(__file__).with_name("small_launches.py")
CLEAN = "ERROR SUMMARY: 0 errors"
STAND_IN = """#!/bin/sh
# Finds nothing, unless FINDS says how much.
while [ "$1" != -- ]; do echo "told $1"; shift; done
shift
"$@" || exit $?
echo "========= ERROR SUMMARY: ${FINDS:-0} errors"
[ "${FINDS:-0}" = 0 ] || exit 9
"""


def compute_sanitizer() -> str:
    """Of PATH, a CUDA toolkit, or the wheel nvidia-cuda-sanitizer-api; else the test's failure."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) for home in (*homes, "/usr/local/cuda") if home]
    folders += [Path(entry) / "nvidia" / release for entry in sys.path for release in ("cu13", "cuda_sanitizer_api")]
    places = [str(folder / below) for folder in folders for below in ("bin", "compute-sanitizer")]
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if found is None:
        pytest.fail(
            "compute-sanitizer is not found in PATH, CUDA_HOME or the pip wheels: install a CUDA toolkit or "
            "nvidia-cuda-sanitizer-api, or leave this out by QLORA_GPU_TESTS_WITHOUT=sanitizer",
            pytrace=False,
        )
    return found


def run(command: str, tool: str, platform: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # Every buffer an allocation of its own: a read beyond one is not a read of the next.
    variables = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **variables}
    variables["JAX_PLATFORMS"] = "cpu" if platform == "cpu" else "cuda,cpu"
    options = ["--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":
        options += ["--leak-check", "no"]
    done = [command, *options, "--", sys.executable, str(SCRIPT), "cpu" if platform == "cpu" else "cuda"]
    return subprocess.run(done, capture_output=True, text=True, env=os.environ | variables, timeout=200, check=False)


@pytest.fixture
def sanitizer(device: jax.Device, tmp_path: Path) -> str:
    if device.platform != "cpu":
        leave_out("sanitizer")
        return compute_sanitizer()
    command = tmp_path / "compute-sanitizer"
    command.write_text(STAND_IN)
    command.chmod(0o755)
    return str(command)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_nothing_is_found(device: jax.Device, sanitizer: str, tool: str) -> None:
    done = run(sanitizer, tool, device.platform)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "launches, all right" in done.stdout
    # racecheck sums up hazards in other words.
    assert CLEAN in done.stdout or "0 hazards displayed" in done.stdout, done.stdout[-2000:]


def test_what_is_found_fails(tmp_path: Path) -> None:
    command = tmp_path / "compute-sanitizer"
    command.write_text(STAND_IN.replace('"$@" ||', "true ||"))
    command.chmod(0o755)
    done = run(str(command), "memcheck", "cpu", FINDS="2")
    assert done.returncode == 9
    assert CLEAN not in done.stdout
    assert "told memcheck" in done.stdout


def test_a_missing_sanitizer_is_a_failure_that_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(pytest.fail.Exception, match="compute-sanitizer is not found"):
        compute_sanitizer()
