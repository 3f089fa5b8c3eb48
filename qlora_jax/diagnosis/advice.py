"""From findings to problems, each with one line that mends it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_jax.diagnosis.self_check import Check

_REINSTALL = "pip install --force-reinstall --no-deps ."
_WITH_NVCC = "QLORA_CUDA=PIP pip install --force-reinstall --no-deps .   (in the source folder; brings its own nvcc)"
# A GPU for whose CUDA release jax's newest plugin is made.
_PLUGIN = "pip install 'jax[cuda13]'   ('jax[cuda12]' where the driver is older than CUDA 13)"


@dataclass(frozen=True)
class Problem:
    """`broken`: programs fail or are wrong; else they run, with less than this machine could give."""

    broken: bool
    text: str
    fix: str


def problems(findings: dict[str, Any], checks: Sequence[Check]) -> list[Problem]:
    """What is broken first."""
    if findings["jax_failure"] is not None:
        return [Problem(True, f"JAX does not start: {findings['jax_failure']}", _start_jax(findings))]
    found = [
        Problem(True, f"self-check: {check.what} by {check.way}: {_told(check)}", _way_out(check.way))
        for check in checks
        if not check.passed
    ]
    if findings["dispatch_failure"]:
        found.append(Problem(True, findings["dispatch_failure"], "unset that variable, or give it one of those words"))
    if findings["cpu_library"] != "loaded":
        text = f"no compiled kernels for the CPU ({findings['cpu_library']}): products run in pure JAX, slower"
        found.append(Problem(False, text, _REINSTALL))
    found += [*_gpu_problems(findings), *_environment_problems(findings)]
    if not findings["host_memory"]:
        text = "the device cannot address pinned host memory: paged() keeps optimizer state on the device"
        found.append(Problem(False, text, "nothing is lost where the state fits; else a newer jax"))
    return sorted(found, key=lambda problem: not problem.broken)


def _gpu_problems(findings: dict[str, Any]) -> list[Problem]:
    gpus, why_not = findings["driver"]["gpus"], findings["cuda_kernels"]
    if why_not == "used" or (not gpus and findings["backend"] != "gpu"):
        return []
    names = ", ".join(gpu["name"] for gpu in gpus) or findings["devices"][0]["kind"]
    if findings["backend"] != "gpu":
        fix = _PLUGIN if "plugin" in why_not and "although" not in why_not else _start_jax(findings)
        return [Problem(False, f"a GPU is there ({names}), and JAX does not use it: {why_not}", fix)]
    slow = f"the GPU ({names}) runs without the CUDA kernels, in pure JAX: {why_not}"
    if why_not.startswith("wrong architecture"):
        number = findings["devices"][0]["compute_capability"].replace(".", "")
        return [Problem(False, slow, f"QLORA_CUDA_ARCHITECTURES={number}-real {_WITH_NVCC}")]
    fix = _REINSTALL if why_not.startswith("the library is not loaded") else _WITH_NVCC
    return [Problem(False, f"{slow} ({findings['cuda_library']})", fix)]


def _environment_problems(findings: dict[str, Any]) -> list[Problem]:
    variables, found = findings["environment"], []
    if variables.get("QLORA_JAX_KERNELS", "auto") == "xla":
        found.append(Problem(False, "QLORA_JAX_KERNELS=xla turns the compiled kernels off", "unset QLORA_JAX_KERNELS"))
    if findings["backend"] != "gpu":
        return found
    if any(part.rstrip("/").endswith(("cuda/lib64", "cudnn/lib")) for part in _search_path(variables)):
        text = f"LD_LIBRARY_PATH={variables['LD_LIBRARY_PATH']} puts another CUDA before the one that jax brought"
        found.append(Problem(False, text, "unset LD_LIBRARY_PATH"))
    if variables.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform":
        text = "XLA_PYTHON_CLIENT_ALLOCATOR=platform makes every buffer a call of the driver: slow, for debugging only"
        found.append(Problem(False, text, "unset XLA_PYTHON_CLIENT_ALLOCATOR"))
    return found


def _search_path(variables: dict[str, str]) -> list[str]:
    return variables.get("LD_LIBRARY_PATH", "").split(":")


def _start_jax(findings: dict[str, Any]) -> str:
    chosen = findings["environment"].get("JAX_PLATFORMS")
    return "unset JAX_PLATFORMS" if chosen else 'python -c "import jax; print(jax.devices())" shows the whole error'


def _told(check: Check) -> str:
    return check.failure or f"error {check.error:.2e}, at most {check.bound:.2e} is right"


def _way_out(way: str) -> str:
    if way == "xla":
        return "please report this with the output of python -m qlora_jax.doctor --json"
    return "QLORA_JAX_KERNELS=xla goes without the compiled kernels; please report this with the output of --json"
