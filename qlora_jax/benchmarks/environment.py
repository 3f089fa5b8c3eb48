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
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    library = sys.modules.get("qlora_jax._lib._cpu")
    if library is not None and jax.default_backend() == "cpu":
        report["instruction_set"] = library.instruction_set()
    return report


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
