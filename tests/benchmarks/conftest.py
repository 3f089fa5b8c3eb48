"""A peer without torch, spoken to through the real protocol."""

import stat
import sys
from pathlib import Path

import pytest


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """A program that is started as a Python, and serves fake_calls.py whatever file of calls it is given."""
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    calls = Path(__file__).with_name("fake_calls.py")
    program.write_text(f'#!/bin/sh\n[ "$1" = -I ] && exec "{sys.executable}" -I "$2" "{calls}"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program
