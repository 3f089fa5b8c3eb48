"""What others take of the machine is told from what this process and its peers take."""

import subprocess
import sys
import time

import pytest

from qlora_jax.benchmarks.load import OtherLoad

BUSY = "import time\nprint(flush=True)\nend = time.perf_counter() + 30\nwhile time.perf_counter() < end: pass"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what processes take")
def test_a_busy_process_counts_unless_it_is_measured():
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as busy:
        try:
            busy.stdout.readline()
            every, measured = OtherLoad(), OtherLoad([busy.pid])
            time.sleep(0.4)
            shares = every.share(), measured.share()
        finally:
            busy.kill()
    assert 0 <= shares[1] < shares[0] <= 1
