"""Resume: a run that was stopped, however it was stopped, ends bit for bit like one that was not."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.checkpoints.state import CheckpointStore
from qlora_jax.errors import UserError
from qlora_jax.training.run_folder import RunFolder

# Everything that could differ after a stop: dropout keys, accumulation, packing, a schedule, paged state.
THOROUGH = {
    "lora.dropout": 0.1,
    "train.accumulation": 2,
    "train.packing": True,
    "optim.schedule": "cosine",
    "optim.clip": 0.5,
}


def arrays_of(folder: RunFolder, step: int) -> dict[str, np.ndarray]:
    """Adapter and optimizer state of a checkpoint, by name."""
    record = json.loads((folder.checkpoints / str(step) / "checkpoint.json").read_text())
    likes = {
        tree: {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in leaves.items()}
        for tree, leaves in record["leaves"].items()
    }
    saved = CheckpointStore(folder.checkpoints).restore(
        step, adapter_like=likes["adapter"], optimizer_like=likes["optimizer"]
    )
    return {f"{tree}:{name}": np.asarray(leaf) for tree in likes for name, leaf in saved[tree].items()}


def assert_same_run(one: RunFolder, other: RunFolder, step: int) -> None:
    """Equal bit for bit: step, loss, eval_loss, lr, grad_norm, adapter, optimizer, position in the data."""
    assert one.metrics_path.read_text() == other.metrics_path.read_text()
    arrays, other_arrays = arrays_of(one, step), arrays_of(other, step)
    assert arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, other_arrays[name], err_msg=name)
    positions = [
        json.loads((run.checkpoints / str(step) / "checkpoint.json").read_text())["data"] for run in (one, other)
    ]
    assert positions[0] == positions[1]
    adapters = [load_file(run.adapter / "adapter_model.safetensors") for run in (one, other)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, array in adapters[0].items():
        np.testing.assert_array_equal(array, adapters[1][name], err_msg=name)


@pytest.fixture
def whole(train, tmp_path):
    """A run of 6 steps that was never stopped."""
    return train(**THOROUGH, output_dir=str(tmp_path / "whole"))[1]


def stop_after(step):
    return lambda done: signal.raise_signal(signal.SIGINT) if done == step else None


@pytest.mark.parametrize("stops", [(1,), (2, 5)])
def test_stopped_and_resumed_equals_never_stopped(train, whole, stops):
    for number, step in enumerate(stops):
        result, _, _ = train(stop_after(step), **THOROUGH, resume=number > 0)
        assert (result.interrupted, result.steps) == (True, step)
    result, folder, printed = train(**THOROUGH, resume=True)
    assert f"after step {stops[-1]}" in printed
    assert result.steps == 6
    assert_same_run(folder, whole, 6)


def test_lines_past_the_checkpoint_are_dropped_and_written_again(train, whole):
    """As a crash between two checkpoints leaves it: lines up to step 5 and half a line, a checkpoint of step 3."""
    _, folder, _ = train(**THOROUGH)
    shutil.rmtree(folder.checkpoints / "6")
    shutil.rmtree(folder.adapter)
    lines = folder.metrics_path.read_text().splitlines(keepends=True)
    folder.metrics_path.write_text("".join(lines[:6]) + '{"step": 6, "lo')
    _, folder, _ = train(**THOROUGH, resume=True)
    assert_same_run(folder, whole, 6)


def test_steps_can_be_raised(train, tmp_path):
    constant = THOROUGH | {"optim.schedule": "constant", "eval.every": 3}
    _, longer, _ = train(**constant, output_dir=str(tmp_path / "longer"))
    train(**constant | {"train.steps": 3})
    _, folder, _ = train(**constant, resume=True)
    assert_same_run(folder, longer, 6)


def test_finished_run_says_so_and_changes_nothing(train):
    _, folder, _ = train(**{"train.steps": 2})
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file()}
    result, folder, printed = train(**{"train.steps": 2, "resume": True})
    assert result.already_finished
    assert result.steps == 2
    assert "is finished" in printed
    ours = {folder.metrics_path, *folder.checkpoints.rglob("*"), *folder.adapter.rglob("*")}
    for path in ours & before.keys() - {folder.metrics_path}:
        assert path.stat().st_mtime_ns == before[path]


def test_killed_between_the_last_checkpoint_and_the_adapter(train):
    _, folder, _ = train(**{"train.steps": 2})
    wanted = load_file(folder.adapter / "adapter_model.safetensors")
    shutil.rmtree(folder.adapter)
    train(**{"train.steps": 2, "resume": True})
    for name, array in load_file(folder.adapter / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_extended_run_killed_before_its_new_adapter_is_not_taken_for_finished(train, tmp_path):
    _, folder, _ = train(**{"train.steps": 2})
    old = tmp_path / "old"
    shutil.copytree(folder.adapter, old)
    old_report = folder.report_path.read_text()
    train(**{"train.steps": 3, "resume": True})
    wanted = load_file(folder.adapter / "adapter_model.safetensors")
    # A SIGKILL between the last checkpoint and the adapter leaves what the shorter run wrote.
    shutil.rmtree(folder.adapter)
    shutil.copytree(old, folder.adapter)
    folder.report_path.write_text(old_report)
    result, _, _ = train(**{"train.steps": 3, "resume": True})
    assert not result.already_finished
    for name, array in load_file(folder.adapter / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
    assert folder.finished_at() == 3


def test_killed_before_the_report_writes_it_at_the_next_start(train):
    _, folder, _ = train(**{"train.steps": 2})
    folder.report_path.unlink()
    folder.plot_path.unlink()
    train(**{"train.steps": 2, "resume": True})
    assert json.loads(folder.report_path.read_text())["steps"] == 2
    assert folder.plot_path.exists()


def test_a_refused_resume_keeps_every_line_of_metrics(train, tiny_rows, tmp_path):
    _, folder, _ = train(**{"train.steps": 2})
    folder.append_metrics({"step": 3, "loss": 1.0})  # taken after the last checkpoint
    before = folder.metrics_path.read_text()
    other = tmp_path / "other.jsonl"
    other.write_text(tiny_rows[0].read_text().replace("lynx lynx", "lynx lion"))
    with pytest.raises(UserError, match="changed"):
        train(**{"train.steps": 4, "data.path": str(other), "resume": True})
    assert folder.metrics_path.read_text() == before


def test_without_a_checkpoint_it_starts_anew_and_says_so(train):
    _, folder, _ = train(**{"train.steps": 2})
    wanted = folder.metrics_path.read_text()
    shutil.rmtree(folder.checkpoints)
    result, folder, printed = train(**{"train.steps": 2, "resume": True})
    assert "starting at step 0" in printed
    assert result.steps == 2
    assert folder.metrics_path.read_text() == wanted


def test_other_rows_are_refused(train, tiny_rows, tmp_path):
    train(**{"train.steps": 2})
    other = tmp_path / "other.jsonl"
    other.write_text(tiny_rows[0].read_text().replace("lynx lynx", "lynx lion"))
    with pytest.raises(UserError, match=r"other\.jsonl.*changed"):
        train(**{"train.steps": 4, "data.path": str(other), "resume": True})


def test_other_weights_are_refused(train, tiny_model, tmp_path):
    train(**{"train.steps": 2})
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"the weights of model\.path=.*changed"):
        train(**{"train.steps": 4, "model.path": str(model), "resume": True})


@pytest.mark.slow
def test_sigkill_three_times_then_ctrl_c_through_the_door(train, tiny_settings, tmp_path):
    """SIGKILL at three random moments of one run, then SIGINT, then to the end; against a run that was left alone."""
    steps = 80
    settings = THOROUGH | {"train.steps": steps, "checkpoint.every": 5, "eval.every": 10}
    stopped = RunFolder(tmp_path / "stopped")

    def lines() -> int:
        return stopped.metrics_path.read_text().count("\n") if stopped.metrics_path.exists() else 0

    def stop(resume: bool, more_lines: int, how: signal.Signals) -> tuple[int, str]:
        asked = tiny_settings | settings | {"output_dir": stopped.path, "resume": resume}
        arguments = [
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in asked.items()
        ]
        command = [sys.executable, "-m", "qlora_jax.train", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        enough = lines() + more_lines
        while process.poll() is None and lines() < enough:
            time.sleep(0.001)
        process.send_signal(how)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    for number in range(3):
        more = random.randint(6, 14)
        code, _ = stop(number > 0, more, signal.SIGKILL)
        assert code == -signal.SIGKILL, f"kill {number + 1}, {more} lines after the one before"
    code, output = stop(True, 6, signal.SIGINT)
    assert code == 130
    assert "resume=true" in output
    _, stopped, _ = train(**settings, output_dir=str(stopped.path), resume=True)
    _, whole, _ = train(**settings, output_dir=str(tmp_path / "whole"))
    assert_same_run(stopped, whole, steps)
