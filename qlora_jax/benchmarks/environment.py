"""When, with what and on what numbers were taken."""

import dataclasses
import datetime
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import jaxlib

from qlora_jax import __version__
from qlora_jax.benchmarks.hardware import published
from qlora_jax.nf4 import dispatch_report

# What decides which kernels can run.
_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512vbmi", "avx512_bf16", "amx_tile", "amx_bf16")


def describe() -> dict[str, Any]:
    """When, with what and on what the numbers were taken."""
    device = jax.devices()[0]
    sheet = published(device.device_kind)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "qlora_jax": __version__,
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "platform": jax.default_backend(),
        "platform_version": device.client.platform_version,
        "device": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "multiprocessors": getattr(device, "core_count", None),
        "published": dataclasses.asdict(sheet) if sheet else None,
        "dispatch": dispatch_report(),
        "cpu": _cpu_model(),
        "cpu_features": cpu_features(),
        "cores": os.cpu_count(),
        "threads": threads(),
        "load_average": os.getloadavg()[0],
    }
    library = sys.modules.get("qlora_jax._lib._cpu")
    if library is not None and jax.default_backend() == "cpu":
        report["instruction_set"] = library.instruction_set()
    return report


def threads() -> int:
    """Cores that this process may run on: what XLA makes threads for."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_features() -> list[str]:
    """Of _FEATURES those that the operating system reports; empty where it does not say."""
    flags = _cpu_info("flags").split()
    return [feature for feature in _FEATURES if feature in flags]


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(key: str) -> str:
    """A line of the first processor in Linux's list."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
