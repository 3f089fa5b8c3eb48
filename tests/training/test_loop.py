"""A whole run on a tiny model: what it writes, what it measures, and how it ends."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints.source import open_checkpoint
from qlora_jax.checkpoints.state import CheckpointStore
from qlora_jax.data.formats import read_conversations
from qlora_jax.data.rendering import Renderer
from qlora_jax.errors import UserError
from qlora_jax.models.loading import load_model
from qlora_jax.training.loop import NonFiniteLossError
from qlora_jax.training.tensorboard import TensorBoard


@pytest.fixture(scope="module")
def compilations():
    """Names of the functions compiled since it was cleared."""
    names = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **details: (
            names.append(details.get("fun_name")) if event.endswith("backend_compile_duration") else None
        )
    )
    return names


def test_a_run_learns_and_writes_everything(train, compilations):
    result, folder, printed = train(**{"train.steps": 30, "eval.every": 10, "checkpoint.every": 8, "eval.samples": 2})
    lines = folder.read_metrics()
    assert [line["step"] for line in lines] == list(range(31))
    assert lines[0].keys() == {"step", "eval_loss"}
    for line in lines[1:]:
        assert line.keys() - {"eval_loss"} == {"step", "loss", "lr", "grad_norm"}
        assert ("eval_loss" in line) == (line["step"] % 10 == 0)
    assert lines[-1]["eval_loss"] < 0.85 * lines[0]["eval_loss"]
    assert (result.first_eval_loss, result.last_eval_loss) == (lines[0]["eval_loss"], lines[-1]["eval_loss"])
    assert (result.steps, result.interrupted, result.already_finished) == (30, False, False)
    assert result.trained_tokens > 0
    assert result.tokens_per_second > 0
    assert result.peak_memory_bytes > 1e6
    assert CheckpointStore(folder.checkpoints).steps() == [24, 30], "checkpoint.keep=2"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(os.listdir(folder.adapter))
    assert [sample.reference for sample in result.samples] == ["ape ape ape", "gnu gnu gnu"]
    assert all(sample.before != sample.after for sample in result.samples)
    assert "step 30/30" in printed
    assert compilations.count("train_step") <= 1
    assert compilations.count("eval_step") <= 1


def test_a_base_that_bitsandbytes_quantized(train, tiny_model, golden_dir, tmp_path):
    """Trained from the bytes that are stored; the record names them, and what contradicts them is refused."""
    base = tmp_path / "bnb-4bit"
    shutil.copytree(tiny_model, base)
    for name in ("config.json", "model.safetensors"):
        (base / name).unlink()
        shutil.copyfile(golden_dir / "interop" / "tiny_llama_bnb4" / name, base / name)
    settings = {"model.path": str(base), "eval.samples": 0, "eval.every": 10}
    _, folder, _ = train(**settings, **{"train.steps": 20})
    losses = [line["eval_loss"] for line in folder.read_metrics() if "eval_loss" in line]
    assert losses[-1] < 0.95 * losses[0]
    assert open_checkpoint(base).fingerprint() in (folder.adapter / "README.md").read_text()
    with pytest.raises(UserError, match=r"quant\.block_size=128"):
        train(**settings, **{"output_dir": str(tmp_path / "other"), "quant.block_size": 128})


def test_eval_loss_is_the_mean_over_every_held_out_token(train, tiny_model, tiny_rows):
    """Five rows in batches of two: the last batch is partial. Reference: the full logits of all rows at once."""
    _, folder, _ = train(**{"train.steps": 1})
    model = load_model(tiny_model, dtype=jnp.float32)
    renderer = Renderer(open_checkpoint(tiny_model).tokenizer())
    examples = [renderer.render(conversation) for conversation in read_conversations(tiny_rows[1])]
    longest = max(len(example.input_ids) for example in examples)
    ids = np.stack([np.pad(example.input_ids, (0, longest - len(example.input_ids))) for example in examples])
    log_p = np.asarray(jax.nn.log_softmax(model(ids)), np.float64)  # causal: padding at the end is not seen
    total, tokens = 0.0, 0
    for row, example in enumerate(examples):
        targets = np.flatnonzero(example.loss_mask)
        total -= log_p[row, targets - 1, example.input_ids[targets]].sum()
        tokens += len(targets)
    np.testing.assert_allclose(folder.read_metrics()[0]["eval_loss"], total / tokens, rtol=1e-5)


def test_without_held_out_rows_nothing_is_evaluated(train):
    result, folder, _ = train(**{"train.steps": 2, "data.eval_path": None, "data.eval_split": 0})
    assert [line.keys() for line in folder.read_metrics()] == [{"step", "loss", "lr", "grad_norm"}] * 2
    assert (result.first_eval_loss, result.last_eval_loss) == (None, None)


class TestNonFiniteLoss:
    def test_stops_with_step_and_rows_and_keeps_the_checkpoint(self, train, tiny_rows):
        with pytest.raises(NonFiniteLossError) as caught:
            train(
                **{"optim.learning_rate": 1e38, "optim.warmup_steps": 0, "checkpoint.every": 1, "train.packing": False}
            )
        message = str(caught.value)
        assert "step 2" in message
        assert str(tiny_rows[0]) in message
        assert "checkpoint of step 1 is intact" in message

    def test_leaves_what_was_written_readable(self, train, tiny_settings, tmp_path):
        with pytest.raises(NonFiniteLossError):
            train(**{"optim.learning_rate": 1e38, "optim.warmup_steps": 0, "checkpoint.every": 1})
        run = tmp_path / "run"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1]
        assert all(math.isfinite(value) for line in lines for value in line.values())
        assert CheckpointStore(run / "checkpoints").latest() == 1
        assert not (run / "adapter").exists()


class TestInterrupt:
    """Ctrl-C, sent to this process by the progress display after a step."""

    @staticmethod
    def interrupt(step):
        os.kill(os.getpid(), signal.SIGINT)

    def test_first_one_saves_and_returns(self, train):
        before = signal.getsignal(signal.SIGINT)
        result, folder, _ = train(lambda step: self.interrupt(step) if step == 2 else None)
        assert (result.interrupted, result.steps) == (True, 2)
        assert CheckpointStore(folder.checkpoints).steps() == [2]
        assert [line["step"] for line in folder.read_metrics()] == [0, 1, 2]
        assert not folder.adapter.exists()
        assert signal.getsignal(signal.SIGINT) is before

    def test_before_the_first_step_saves_step_0(self, train):
        result, folder, _ = train(self.interrupt)
        assert (result.interrupted, result.steps) == (True, 0)
        assert CheckpointStore(folder.checkpoints).steps() == [0]
        resumed, _, _ = train(**{"resume": True})
        assert resumed.steps == 6
        assert [line["step"] for line in folder.read_metrics()] == list(range(7))

    def test_second_one_stops_at_once_and_leaves_the_last_checkpoint(self, train):
        def twice(step):
            if step == 5:
                self.interrupt(step)
                self.interrupt(step)

        result, folder, _ = train(twice)
        assert (result.interrupted, result.steps) == (True, 3)
        assert CheckpointStore(folder.checkpoints).steps() == [3]

    def test_second_one_without_a_checkpoint_is_passed_on(self, train):
        def twice(step):
            self.interrupt(step)
            self.interrupt(step)

        with pytest.raises(KeyboardInterrupt):
            train(twice)


def test_tensorboard_holds_each_number_at_its_step(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    board = TensorBoard(tmp_path, True, first_step=0)
    board.write(0, {"eval_loss": 4.5, "tokens_per_second": None})
    board.write(1, {"loss": 2.0})
    board.close()
    (file,) = tmp_path.iterdir()
    content, points = file.read_bytes(), []
    while content:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    assert points == [("eval_loss", 0, 4.5), ("loss", 1, 2.0)]


def test_tensorboard_asked_for_but_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"qlora-jax\[log\]"):
        TensorBoard(tmp_path, True, first_step=0)
    TensorBoard(tmp_path, "auto", first_step=0).write(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_result_goes_into_json(train):
    result, _, _ = train(**{"train.steps": 1})
    json.dumps(dataclasses.asdict(result))


def test_example_finetunes_with_the_library_alone(tiny_model, tmp_path):
    example = Path(__file__).parents[2] / "examples" / "finetune_smollm2.py"
    assert len(example.read_text().splitlines()) < 60
    command = [sys.executable, "-W", "error", str(example), "2", str(tiny_model)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"step  1  loss \d\.\d{4}\nstep  2  loss \d\.\d{4}\n", done.stdout)
    assert (tmp_path / "smollm2-adapter" / "adapter_model.safetensors").is_file()
