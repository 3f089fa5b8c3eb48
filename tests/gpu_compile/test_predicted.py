"""The committed table of predicted times: what predict.py makes of sass.json, and not faster than physics allows."""

import json

import pytest
from kernel_gates.architectures import LIMITS, blocks_per_multiprocessor
from predict import PREDICTED, RECORD, predicted, table

from qlora_jax._lib import _plan

pytestmark = pytest.mark.gpu_compile


def test_the_committed_table_is_what_the_command_computes() -> None:
    committed = json.loads(PREDICTED.read_text())
    assert committed == predicted(), "run tests/gpu_compile/predict.py and commit predicted.json"
    assert committed["what"].startswith("Predicted, never measured")


def test_no_prediction_undercuts_the_floor() -> None:
    data = predicted()
    for cells in data["rows"]:
        row = dict(zip(data["columns"], cells, strict=True))
        assert min(row["skinny"], row["tile"], row["dequantize"]) > row["floor"], row
        assert row["route"] in ("skinny", "tile", "dequantize")


def test_table_shows_every_shape() -> None:
    lines = table("H100").splitlines()
    assert len(lines) == 2 + 2 * 15
    assert "predicted" in lines[0]


def test_every_kernel_fits_every_multiprocessor() -> None:
    kernels = json.loads(RECORD.read_text())["kernels"]
    assert kernels.keys() == LIMITS.keys()
    for architecture, figures in kernels.items():
        for name in _plan.kernel_names():
            assert figures[name]["blocks"] >= 1, (architecture, name)
    # Two blocks of every product hide each other's waits where shared memory allows it.
    assert all(kernels["90a"][name]["blocks"] >= 2 for name in _plan.kernel_names())


def test_occupancy_counts_what_runs_out_first() -> None:
    assert blocks_per_multiprocessor("90a", 128, 240, 98816) == 2  # registers: 2 x 128 x 240 of 65536
    assert blocks_per_multiprocessor("90a", 128, 128, 98816) == 2  # shared memory: 2 x 97.5 KB of 228 KB
    assert blocks_per_multiprocessor("80", 128, 128, 98816) == 1  # 164 KB
    assert blocks_per_multiprocessor("90a", 256, 32, 0) == 8  # threads
    assert blocks_per_multiprocessor("86", 32, 16, 0) == 16  # blocks
    assert blocks_per_multiprocessor("86", 128, 64, 100 * 1024) == 0
