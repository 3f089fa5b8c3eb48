"""What every test runs under: four CPU devices, warnings as errors (pyproject), no silent rank promotion."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Child processes import the installed package, not the clone that they are started in.
os.environ["PYTHONSAFEPATH"] = "1"
_FOUR_DEVICES = "--xla_force_host_platform_device_count=4"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FOUR_DEVICES}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Reference arrays and checkpoints made by torch, bitsandbytes and PEFT (tests/golden/README.md)."""
    return GOLDEN
