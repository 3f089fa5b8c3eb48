"""Other families than LLaMA through the doors: train, generate, convert, export."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_jax import convert, export, generate, train
from qlora_jax.checkpoints.families import normalised
from qlora_jax.checkpoints.hf import read_config
from qlora_jax.checkpoints.source import open_checkpoint
from qlora_jax.models.gpt_neox import GPTNeoXConfig
from qlora_jax.models.loading import check_model

CONFIG = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


@pytest.fixture
def folder(tiny_llama, tmp_path: Path) -> Path:
    """A random GPT-NeoX, the family least like LLaMA, with the tiny LLaMA's tokenizer."""
    made, rng = tmp_path / "gpt_neox", np.random.default_rng(0)
    made.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama[0] / name, made / name)
    (made / "config.json").write_text(json.dumps(CONFIG))
    save_file(
        {
            name: (("norm.weight" in name) + 0.1 * rng.standard_normal(size)).astype(ml_dtypes.bfloat16)
            for name, size in GPTNeoXConfig.from_dict(normalised(CONFIG)).tensor_shapes().items()
        },
        made / "model.safetensors",
    )
    return made


def test_trained_answered_and_exported(folder: Path, tiny_llama, tmp_path: Path, capfd) -> None:
    run, keys = tmp_path / "run", ["train.steps=2", "train.batch_size=2", "train.seq_len=64", "lora.rank=4"]
    asked = [f"model.path={folder}", f"data.path={tiny_llama[1]}", f"output_dir={run}", *keys, "optim.warmup_steps=0"]
    assert train.main(asked) == 0
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in losses if "loss" in line)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
    assert generate.main(["--run", str(run), "--prompt", "1+1", "--max-new-tokens", "4"]) == 0
    capfd.readouterr()
    assert export.main([str(run), str(tmp_path / "out"), "--to", "merged", "--verify"]) == 0
    difference = float(capfd.readouterr().out.partition("difference to the run: ")[2].partition(",")[0])
    assert 0 < difference < 0.1  # in bfloat16
    assert read_config(tmp_path / "out")["model_type"] == "gpt_neox"
    assert convert.main([str(folder), str(tmp_path / "nf4")]) == 0
    check_model(open_checkpoint(tmp_path / "nf4"))
