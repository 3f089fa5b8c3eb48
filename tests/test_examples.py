"""The examples run, and README's commands and code are ones that exist."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.training.settings import build_config, parse_arguments, unknown_keys

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0] for line in README.splitlines() if line.startswith("python -m qlora_jax.")]


def run_example(name: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-W", "error", ROOT / "examples" / name, *arguments]
    done = subprocess.run(command, cwd=cwd, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["nf4_dense_in_your_model.py", "linen_port.py", "plain_jax.py"])
def test_examples_lower_their_loss(name, tmp_path):
    losses = [float(loss) for loss in re.findall(r"loss\s+([\d.e+-]+)", run_example(name, cwd=tmp_path))]
    assert len(losses) >= 3
    assert losses[-1] < 0.1 * losses[0]


def test_examples_are_short_enough_to_read():
    for example in (ROOT / "examples").glob("*.py"):
        assert len(example.read_text().splitlines()) < 120


@pytest.mark.slow
def test_the_notebook_runs(tiny_llama, tmp_path, monkeypatch, capfd):
    """Its cells, one after the other, on a tiny model; the first holds the settings."""
    notebook = json.loads((ROOT / "examples" / "qlora_step_by_step.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    settings: dict = {}
    exec(cells[0], settings)
    given = {"model_path": str(tiny_llama[0]), "data_path": str(tiny_llama[1]), "steps": 5, "question": "1+1"}
    assert given.keys() <= settings.keys()
    settings |= given | {"out": str(tmp_path / "run"), "batch_size": 2, "seq_len": 64}
    for cell in cells[1:]:
        exec(cell, settings)
    printed = capfd.readouterr().out
    assert "step  5  loss" in printed
    assert "merged into the dequantized weights" in printed
    assert settings["losses"][-1] < settings["losses"][0]
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", [command for command in COMMANDS if ".train" in command])
def test_readme_commands_have_valid_keys(command):
    invocation = parse_arguments(shlex.split(command)[3:])
    assert not invocation.mistakes
    assert not unknown_keys(invocation.settings)
    local = {key: setting for key, setting in invocation.settings.items() if not key.endswith("path")}
    assert build_config(local)


def test_readme_names_doors_that_exist():
    assert len(COMMANDS) >= 4
    for command in COMMANDS:
        assert callable(importlib.import_module(shlex.split(command)[2]).main)


def test_readme_code_imports_names_that_exist():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "qlora_jax":
                for alias in node.names:
                    assert hasattr(importlib.import_module("qlora_jax"), alias.name)


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        path = target[0] or target[1]
        assert path.startswith("https://") or (ROOT / path).exists(), path
