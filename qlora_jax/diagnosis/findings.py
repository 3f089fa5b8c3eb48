"""What is installed, which devices and kernels there are, and what decides between them."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

from qlora_jax import __version__
from qlora_jax.diagnosis.driver import Driver, ask_driver

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
# An extra, and a module that comes with nothing else.
_EXTRAS = {
    "cuda12": "jax_cuda12_plugin",
    "cuda13": "jax_cuda13_plugin",
    "log": "tensorboardX",
    "test": "hypothesis",
    "lint": "importlinter",
    "interop": "peft",
}
# Those that change what runs, by name or beginning.
_VARIABLES = ("QLORA_", "JAX_", "XLA_", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "TF_CPP_")


def collect() -> dict[str, Any]:
    """Everything that is known before the self-check. Nothing here raises: what fails is told by its reason.

    Returns:
      `qlora_jax`, `python`, `system`, `versions`, `extras`, `environment`, `driver`, and from JAX: `jax_failure` (None
      where it works), `backend`, `devices`, `host_memory`, `cpu_library`, `instruction_set`, `cuda_library`,
      `cuda_architectures`, `cuda_kernels` ("used", or why not), `dispatch`.
    """
    driver = ask_driver()
    findings: dict[str, Any] = {
        "qlora_jax": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "extras": {name: importlib.util.find_spec(module) is not None for name, module in _EXTRAS.items()},
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)},
        "driver": dataclasses.asdict(driver),
        "jax_failure": None,
    }
    try:
        import jax

        devices = [_device(device) for device in jax.devices()]
        findings |= {"backend": jax.default_backend(), "devices": devices}
    except Exception as error:
        findings["jax_failure"] = f"{type(error).__name__}: {error or 'it says no more'}".splitlines()[0]
        return findings
    from qlora_jax.optim import host_kind_available

    return findings | {"host_memory": host_kind_available()} | _kernels(findings["backend"], devices, driver)


def _kernels(backend: str, devices: list[dict[str, Any]], driver: Driver) -> dict[str, Any]:
    from qlora_jax.nf4 import kernel_report
    from qlora_jax.nf4.dispatch import TABLE, dispatch_report

    status = kernel_report()
    cpu, cuda = _library("_cpu"), _library("_cuda")
    architectures = cuda.architectures().split(", ") if cuda is not None else []
    try:
        # A variable that holds no known word raises.
        dispatch: dict[str, Any] = dispatch_report()
        dispatch["table"] = {
            name: {way: dataclasses.asdict(t) for way, t in row.items()} for name, row in TABLE.items()
        }
        failure = None
    except ValueError as error:
        dispatch, failure = {}, str(error)
    return {
        "cpu_library": status["cpu"],
        "instruction_set": cpu.instruction_set() if cpu is not None and status["cpu"] == "loaded" else None,
        "cuda_library": status["cuda"] if status["cuda"] != "not built" else _why_not_built(),
        "cuda_architectures": architectures,
        "cuda_kernels": _why_not_used(backend, devices, driver, status["cuda"], architectures) or "used",
        "dispatch": dispatch,
        "dispatch_failure": failure,
    }


def _why_not_used(
    backend: str, devices: list[dict[str, Any]], driver: Driver, status: str, architectures: list[str]
) -> str | None:
    if not driver.gpus and backend != "gpu":
        return f"no GPU: {driver.why_not}"
    if backend != "gpu":
        plugin = any(importlib.util.find_spec(f"jax_cuda{release}_plugin") for release in (12, 13))
        if not plugin:
            return "JAX has no CUDA plugin"
        chosen = os.environ.get("JAX_PLATFORMS")
        return f"JAX runs on {backend}" + (
            f", since JAX_PLATFORMS={chosen}" if chosen else " although its plugin is there"
        )
    if status != "loaded":
        return f"the library is {status}"
    from qlora_jax.nf4.kernels import runs_on

    for capability in (device["compute_capability"] for device in devices):
        if not runs_on(capability):
            return f"wrong architecture: compiled for {', '.join(architectures)}, the GPU has {capability}"
    return None


def _device(device: Any) -> dict[str, Any]:
    stats = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "memory_bytes": stats.get("bytes_limit"),
        "compute_capability": getattr(device, "compute_capability", None),
    }


def _library(name: str) -> Any:
    """A compiled library, or None."""
    from qlora_jax.nf4 import kernels

    try:
        return kernels.load_module(name)
    except Exception:
        return None


def _why_not_built() -> str:
    plan = _library("_plan")
    build = plan.cuda_build() if plan is not None else "not built"
    return build if build.startswith("not built") else f"not installed, although it was {build}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
