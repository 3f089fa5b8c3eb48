"""The commands that a run prints can be pasted."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.training.commands import command_line, interpreter


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A virtual environment as `make train` makes it, below the current folder; its Python is running."""
    folder = tmp_path / "clone" / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "python3"):
        (folder / name).symlink_to(os.path.realpath(sys.executable))
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


def test_an_environment_that_is_not_active_is_named_by_its_path(environment, monkeypatch, tmp_path):
    assert interpreter() == ".venv/bin/python"
    (tmp_path / "bin").mkdir()  # another environment's, a link to the same file
    (tmp_path / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert interpreter() == ".venv/bin/python"
    for elsewhere in (tmp_path / "bin", environment):
        monkeypatch.chdir(elsewhere)
        assert interpreter() == str(environment / "python")


def test_an_active_environment_needs_no_path(environment, monkeypatch):
    monkeypatch.setenv("PATH", str(environment))
    assert interpreter() == "python"
    (environment / "python").unlink()
    monkeypatch.setattr(sys, "executable", str(environment / "python3"))
    assert interpreter() == "python3"


def test_a_shell_reads_back_what_was_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    question = 'What\'s "new" in $HOME?\n日本 `ls`'
    line = command_line("generate", "--run", "my runs/a", "--prompt", question)
    code = "import sys; print(ascii(sys.argv[1:]))"
    echoed = line.replace("-m qlora_jax.generate", f"-c {shlex.quote(code)}")
    printed = subprocess.run(["/bin/sh", "-c", echoed], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == ascii(["--run", "my runs/a", "--prompt", question])
    assert Path(shlex.split(line)[0]) == Path(sys.executable)
