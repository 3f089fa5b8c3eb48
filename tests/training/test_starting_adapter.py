"""Training that goes on from an adapter made elsewhere."""

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from qlora_jax import train as door
from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.starting_adapter import with_adapter


def test_what_the_adapter_says_becomes_the_runs(golden_dir):
    folder = str(golden_dir / "interop" / "adapter_all_linear")
    lora = with_adapter(TrainConfig(lora={"adapter": folder})).lora
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 16.0, 0.05)
    assert with_adapter(TrainConfig(lora={"adapter": folder, "dropout": 0.0, "rank": 8})).lora.dropout == 0.0
    with pytest.raises(UserError) as error:
        with_adapter(TrainConfig(lora={"adapter": folder, "rank": 4, "alpha": 3, "targets": ["q_proj"]}))
    for words in ("lora.rank=4, but", "lora.alpha=3, but", "lora.targets=[q_proj], but", "leave lora.rank out"):
        assert words in str(error.value)
    plain = TrainConfig()
    assert with_adapter(plain) is plain


def test_a_run_goes_on_where_the_adapter_stood_and_resumes(golden_dir, tiny_settings, tmp_path, capsys):
    """The factors move from where PEFT left them; a stop in between changes no bit."""
    start = golden_dir / "interop" / "adapter_all_linear"
    settings = {key: value for key, value in tiny_settings.items() if key not in ("lora.rank", "lora.alpha")}
    settings |= {"lora.adapter": str(start), "train.steps": 4, "checkpoint.every": 2}

    def run(name, **changes):
        arguments = settings | changes | {"output_dir": str(tmp_path / name)}
        assert door.main([f"{key}={value}".replace("False", "false") for key, value in arguments.items()]) == 0
        return tmp_path / name

    whole = run("whole")
    assert f"goes on from {start}" in capsys.readouterr().out
    assert yaml.safe_load((whole / "config.yaml").read_text())["lora"]["rank"] == 8
    stopped = run("stopped", **{"train.steps": 2})
    assert door.main([f"output_dir={stopped}", "resume=true", "train.steps=4"]) == 0
    before = load_file(start / "adapter_model.safetensors")
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, stopped)]
    assert before.keys() == adapters[0].keys() == adapters[1].keys()
    for key, value in adapters[0].items():
        np.testing.assert_array_equal(value, adapters[1][key])
        assert 0 < np.abs(value - before[key]).max() < 0.1


def test_dora_is_trained_and_continued(tiny_settings, tmp_path):
    """Magnitudes move; a second run goes on from the first one's adapter where that ended."""

    def run(name, **changes):
        settings = tiny_settings | {"train.steps": 2, "eval.every": 2, "output_dir": tmp_path / name} | changes
        assert door.main([f"{key}={value}".replace("False", "false") for key, value in settings.items()]) == 0
        tensors = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        losses = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return tensors, [line["eval_loss"] for line in losses if "eval_loss" in line]

    first, losses = run("first", **{"lora.dora": "true"})
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"
    assert first[key].shape == (192,)
    start = {name: value for name, value in tiny_settings.items() if not name.startswith("lora.")}
    tiny_settings.clear()
    tiny_settings.update(start)
    second, more = run("second", **{"lora.adapter": tmp_path / "first" / "adapter"})
    assert more[0] == pytest.approx(losses[-1], abs=1e-5)
    assert more[-1] < losses[0]
    assert 0 < np.abs(second[key] - first[key]).max() < 0.1


def test_an_adapter_that_cannot_start_a_run_is_told(golden_dir, tiny_settings, tmp_path, capsys):
    base = {key: value for key, value in tiny_settings.items() if not key.startswith("lora.")}
    arguments = [f"{key}={value}".replace("False", "false") for key, value in base.items()]
    interop = golden_dir / "interop"
    for folder, words in (
        (interop / "adapter_al_linear", "did you mean"),
        (interop / "tiny_llama_bf16", "no adapter_config.json"),
        (interop / "adapter_emb", "adapts an embedding"),
    ):
        assert door.main([*arguments, f"lora.adapter={folder}"]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
