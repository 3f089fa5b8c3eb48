"""That the sanitized build is one: faults on purpose end the process with the report that they deserve."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.nf4.kernels import load_module

pytestmark = pytest.mark.sanitize

REPORTS = {
    "read past the end": "AddressSanitizer: SEGV",
    "read before the start": "AddressSanitizer: use-after-poison",
    "write past the end": "AddressSanitizer: SEGV",
    "write an argument": "AddressSanitizer: SEGV",
    "read past the end of scratch": "AddressSanitizer: heap-buffer-overflow",
    "load that the compiler does not see": "AddressSanitizer: SEGV",
    "signed overflow": "runtime error: signed integer overflow",
    "misaligned load": "runtime error: load of misaligned address",
}

CHILD = """
import sys
import jax
import numpy as np
from qlora_jax._lib import _faults

jax.ffi.register_ffi_target("fault", _faults.handler(), platform="cpu")
x = np.arange(int(sys.argv[2]), dtype=np.uint8)
fault = np.int64(_faults.names().index(sys.argv[1]))
np.testing.assert_array_equal(jax.ffi.ffi_call("fault", jax.ShapeDtypeStruct(x.shape, x.dtype))(x, fault=fault), x)
print("survived")
"""


def run(fault: str, size: int, folder: Path) -> tuple[int, str, str]:
    """Exit status, output and reports of a process that calls the handler once."""
    environment = {**os.environ, "ASAN_OPTIONS": f"{os.environ['ASAN_OPTIONS']}:log_path={folder / 'report'}"}
    command = [sys.executable, "-c", CHILD, fault, str(size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    # The undefined-behaviour sanitizer writes to stderr whatever its options say.
    reports = done.stderr + "".join(path.read_text() for path in folder.glob("report*"))
    return done.returncode, done.stdout, reports


@pytest.mark.parametrize("size", [8, 4096, 4104])
def test_a_handler_without_faults_runs(size, tmp_path):
    assert run("none", size, tmp_path) == (0, "survived\n", "")


@pytest.mark.parametrize("fault", REPORTS)
def test_a_fault_ends_the_process(fault, tmp_path):
    status, output, reports = run(fault, 72, tmp_path)
    assert (status, output) == (-signal.SIGABRT, ""), reports
    assert REPORTS[fault] in reports
    assert "faults.cc" in reports


def test_every_fault_is_tried():
    assert load_module("_faults").names() == ["none", *REPORTS]


@pytest.mark.parametrize("name", ["_cpu", "_plan"])
def test_the_modules_that_are_tested_are_instrumented(name):
    file = load_module(name).__file__
    assert Path(file).is_relative_to(sys.prefix)
    machine_code = Path(file).read_bytes()
    for symbol in (b"__asan_report_load", b"__ubsan_handle_type_mismatch", b"CallGuarded"):
        assert symbol in machine_code
