"""The run without arguments, on the real model: what it promises, and its adapter in PEFT."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.data.formats import Message
from qlora_jax.data.rendering import Renderer
from qlora_jax.models.config import BLOCK_LINEARS
from qlora_jax.models.loading import load_model
from qlora_jax.nf4 import dequantize
from qlora_jax.training.demo import fetch_demo_model

pytestmark = pytest.mark.real


def door(name: str, *arguments: str, cwd) -> str:
    command = [sys.executable, "-m", f"qlora_jax.{name}", *arguments]
    done = subprocess.run(command, cwd=cwd, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    printed = door("train", cwd=folder)
    return folder / "runs" / "smollm2-demo", printed


def test_the_demo_lowers_the_held_out_loss_by_thirty_percent(run):
    folder, printed = run
    losses = json.loads((folder / "report.json").read_text())["eval_loss"]
    first, last = losses["0"], losses[str(max(map(int, losses)))]
    assert last <= 0.7 * first
    assert printed.count("  before  ") == printed.count("  after  ") == 3
    assert (folder / "loss.png").stat().st_size > 10_000


def test_the_finetuned_model_answers_on_stdout(run):
    folder, _ = run
    question = "In one sentence, what does the Python function `os.path.join` do?"
    answer = door("generate", "--run", str(folder), "--prompt", question, cwd=folder.parent)
    assert len(answer.split()) >= 3
    assert answer.count("\n") == 1


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will remove
def test_peft_gives_our_logits_with_the_trained_adapter(run):
    """Design table: exported adapter in real PEFT against ours, at most 1e-3 in float32."""
    import torch
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, _ = run
    checkpoint = open_checkpoint(fetch_demo_model())
    model = load_model(checkpoint, dtype=jnp.float32)
    theirs = LlamaForCausalLM(LlamaConfig(**checkpoint.config)).to(torch.float32).eval()
    state = {name: torch.tensor(checkpoint.read(name).astype(np.float32)) for name in checkpoint.names()}
    for linear in BLOCK_LINEARS:
        group, name = linear.split(".")
        stack = getattr(getattr(model.layers, group), name).kernel.get_value()
        for layer, kernel in enumerate(np.asarray(dequantize(stack, jnp.float32))):
            state[f"model.layers.{layer}.{linear}.weight"] = torch.tensor(np.ascontiguousarray(kernel.T))
    theirs.load_state_dict(state, strict=False)
    theirs.tie_weights()
    prompt = Renderer(checkpoint.tokenizer()).prompt([Message("user", "What does `shutil.move` do?")])
    ids = np.array([prompt])
    plain = np.asarray(model(jnp.asarray(ids)))
    ours = np.asarray(load_adapter(model, folder / "adapter")(jnp.asarray(ids)))
    assert np.abs(ours - plain).max() > 1.0  # the adapter matters
    with torch.no_grad():
        peft = PeftModel.from_pretrained(theirs, str(folder / "adapter")).eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(peft, ours, atol=1e-3, rtol=0)
