"""Importing a checkpoint holds what is kept and two tensors; see measure_import.py, which also does it at 3 GB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = Path(__file__).with_name("measure_import.py")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.slow
def test_peak_memory_and_an_interrupted_conversion():
    """Of 0.5 GB in six shards, loaded, converted, and converted again after SIGKILL in the middle."""
    done = subprocess.run([sys.executable, MEASURE, "--gigabytes", "0.5"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    for what in ("load", "convert"):
        assert report[what]["bound"] < report["checkpoint"] / 2  # else the bound would show nothing
