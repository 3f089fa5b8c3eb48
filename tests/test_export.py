"""The exporting door: what it writes, what it prints, and what mistakes are told."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax import export as door
from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.checkpoints.peft import load_adapter, save_adapter
from qlora_jax.models.loading import load_model

IDS = jnp.arange(2, 34, dtype=jnp.int32)[None]


@pytest.fixture
def run(tiny_llama, tmp_path: Path) -> Path:
    """A finished run on the tiny LLaMA, its adapter trained to matter, with a chat template of its own."""
    model_folder, _ = tiny_llama
    folder, rng = tmp_path / "runs" / "first", np.random.default_rng(0)
    model = load_model(model_folder, rank=4, alpha=8.0)
    for _, leaf in nnx.iter_graph(model):
        if isinstance(leaf, nnx.LoRAParam):
            leaf.set_value(jnp.asarray(0.1 * rng.normal(size=leaf.get_value().shape), jnp.float32))
    checkpoint = open_checkpoint(model_folder)
    tokenizer = checkpoint.tokenizer()
    tokenizer.chat_template = "{{ 'trained' }}"
    save_adapter(
        model,
        folder / "adapter",
        base_model=str(model_folder),
        base_sha256=checkpoint.fingerprint(),
        tokenizer=tokenizer,
    )
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"output_dir": str(folder), "model": {"path": str(model_folder)}})
    )
    return folder


def ask(capfd, *arguments: object) -> tuple[int, str, str]:
    code = door.main(list(map(str, arguments)))
    return code, *capfd.readouterr()


def logits(model) -> np.ndarray:
    return np.asarray(model(IDS))


def difference_told(out: str) -> float:
    return float(out.partition("largest logit difference to the run: ")[2].partition(",")[0])


def test_the_adapter_alone(run, tmp_path, capfd):
    code, out, _ = ask(capfd, run, tmp_path / "out", "--to", "peft", "--base-name", "org/name")
    assert code == 0
    assert "an adapter of 14 linears" in out
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", run / "adapter"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], value) for key, value in theirs.items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"
    assert 'from_pretrained("org/name"' in (tmp_path / "out" / "README.md").read_text()
    assert "trained" in (tmp_path / "out" / "chat_template.jinja").read_text()


@pytest.mark.parametrize(("base", "quant_type"), [("dequantized", "nf4"), ("original", None)])
def test_one_model_with_its_template(run, tmp_path, capfd, base, quant_type):
    verify = ["--verify"] if base == "dequantized" else []
    code, out, _ = ask(capfd, run, tmp_path / "out", "--to=merged", f"base={base}", "--shard-size", "200KB", *verify)
    assert code == 0
    assert ("dequantized weights it was trained against" in out) == (base == "dequantized")
    model_folder = tmp_path / "model"
    wanted = logits(load_adapter(load_model(model_folder, quant_type=quant_type, dtype=jnp.float32), run / "adapter"))
    found = logits(load_model(tmp_path / "out", quant_type=None, dtype=jnp.float32))
    assert 0 < np.abs(found - wanted).max() < 0.02  # rounded to bfloat16
    assert not verify or 0 < difference_told(out) < 0.02
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert open_checkpoint(tmp_path / "out").tokenizer().chat_template == "{{ 'trained' }}"
    generation = "generation_config.json"
    assert (tmp_path / "out" / generation).read_bytes() == (model_folder / generation).read_bytes()


def test_the_base_in_4_bits_and_its_adapter(run, tmp_path, capfd):
    code, out, _ = ask(capfd, run, tmp_path / "out", "--to", "bitsandbytes")
    assert code == 0
    assert "the base as trained against" in out
    wanted = logits(load_adapter(load_model(tmp_path / "model", dtype=jnp.float32), run / "adapter"))
    model = load_adapter(load_model(tmp_path / "out", dtype=jnp.float32), tmp_path / "out" / "adapter")
    np.testing.assert_array_equal(logits(model), wanted)
    # The adapter knows its new base: it can be exported again from there.
    code, out, err = ask(
        capfd, tmp_path / "out" / "adapter", tmp_path / "again", "--to", "merged", "--dtype", "float32"
    )
    assert code == 0
    assert "another sha256" not in err


def test_an_adapter_fits_a_base_quantized_from_its_own_and_the_other_way(run, tmp_path, capfd):
    from qlora_jax import convert

    model, quantized = tmp_path / "model", tmp_path / "model-nf4"
    assert convert.main([str(model), str(quantized)]) == 0
    assert convert.main([str(model), str(tmp_path / "model-128"), "--block-size", "128"]) == 0
    assert convert.main([str(model), str(tmp_path / "loftq"), "--loftq-rank", "4"]) == 0

    def notes(adapter, base):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        code, _, err = ask(capfd, adapter, out, "--to", "peft", "--model", base)
        assert code == 0
        return out, "another sha256" in err

    assert not notes(run, quantized)[1]
    assert notes(run, tmp_path / "model-128")[1]  # other bytes
    assert notes(run, tmp_path / "loftq")[1]
    # Trained on the folder in 4 bits: the header says of what they were made, also in a copy.
    checkpoint, trained = open_checkpoint(quantized), load_model(quantized, rank=2, alpha=4.0)
    assert checkpoint.quantized_from == f"{open_checkpoint(model).fingerprint()} nf4 64 double"
    said = {"base_sha256": checkpoint.fingerprint(), "base_quantized_from": checkpoint.quantized_from}
    save_adapter(trained, tmp_path / "adapter", base_model=str(quantized), **said)
    copy, noted = notes(tmp_path / "adapter", model)
    assert not noted
    assert not notes(copy, model)[1]
    assert notes(tmp_path / "adapter", tmp_path / "model-128")[1]
    # The bytes are those that the model has when it is quantized while it is read.
    np.testing.assert_array_equal(logits(load_model(model)), logits(load_model(quantized)))
    # What is exported with its base knows both.
    code, _, _ = ask(capfd, run, tmp_path / "both", "--to", "bitsandbytes")
    assert code == 0
    assert not notes(tmp_path / "both" / "adapter", model)[1]


def test_requantizing_is_asked_for_and_its_cost_told(run, tmp_path, capfd):
    code, out, _ = ask(capfd, run, tmp_path / "out", "--to", "bitsandbytes", "--requantize")
    assert code == 0
    cost = float(out.partition("the rounding is ")[2].split()[0])
    weights, update = (
        open_checkpoint(tmp_path / "out"),
        load_file(run / "adapter" / "adapter_model.safetensors"),
    )
    changed = sum(
        np.sum((2.0 * update[key.replace("lora_A", "lora_B")] @ value) ** 2)
        for key, value in update.items()
        if "lora_A" in key
    )
    base = load_adapter(load_model(tmp_path / "model"), run / "adapter")
    rounded = 0.0
    from qlora_jax.nf4 import dequantize

    for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            dense = getattr(getattr(base.layers, part), f"{name}_proj")
            kernel = np.asarray(dequantize(dense.kernel.get_value(), jnp.float32))
            for i in range(2):
                wanted = kernel[i] + 2.0 * dense.lora_a.get_value()[i] @ dense.lora_b.get_value()[i]
                written = weights.read(f"model.layers.{i}.{part}.{name}_proj.weight").astype(np.float32).T
                rounded += np.sum((written - wanted) ** 2)
    assert cost == pytest.approx(np.sqrt(rounded / changed), rel=0.05)
    assert not (tmp_path / "out" / "adapter").exists()


def other_model(tmp_path: Path) -> Path:
    """The same shapes, other weights."""
    other = Path(shutil.copytree(tmp_path / "model", tmp_path / "other"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(bytes(data))
    return other


def test_another_base_is_refused_or_said(run, tmp_path, capfd):
    other = other_model(tmp_path)
    code, _, err = ask(capfd, run, tmp_path / "out", "--to", "merged", "--model", other)
    assert code == 2
    assert "is not the model that" in err
    assert "--base original" in err
    code, _, err = ask(capfd, run, tmp_path / "out", "--to", "merged", "--model", other, "--base", "original")
    assert code == 0
    assert "is not the file that was trained on" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", "OUT"], ["required: --to", "RUN OUT --to peft|merged|bitsandbytes"]),
        (["RUN", "OUT", "--to", "gguf"], ["invalid choice: 'gguf'"]),
        (["RUN", "OUT", "--too", "peft"], ["unknown option --too", "did you mean --to?"]),
        (["RUN", "OUT", "--to=peft", "--base=original", "--dtype=float16"], ["--base original", "--dtype float16"]),
        (["RUN", "OUT", "--to=merged", "--requantize"], ["--requantize with --to merged", "--to bitsandbytes"]),
        (["RUN", "OUT", "--to=merged", "--base-name=a/b"], ["--base-name with --to merged"]),
        (["RUM", "OUT", "--to=peft"], ["no run at", "runs/first"]),
        (["RUN", "USED", "--to=peft"], ["is not empty"]),
        (["RUN", "OUT", "--to=merged", "--base=original", "--model=BNB4"], ["is in 4 bits", "--base dequantized"]),
        (["RUN", "OUT", "--to=peft", "--model=/nowhere"], ["no such folder or file: /nowhere"]),
    ],
)
def test_mistakes(run, golden_dir, tmp_path, capfd, arguments, words):
    (tmp_path / "USED" / "x").mkdir(parents=True)
    places = {"RUN": run, "RUM": run.with_name("fist"), "OUT": tmp_path / "OUT", "USED": tmp_path / "USED"}
    places["--model=BNB4"] = f"--model={golden_dir / 'interop' / 'tiny_llama_bnb4'}"
    code, out, err = ask(capfd, *(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert not (tmp_path / "OUT").exists()


def test_what_a_run_cannot_be_exported_to(run, tmp_path, capfd):
    """16-bit runs have no 4 bits; e2m1 is not bitsandbytes'; a run that has not ended has no adapter."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for quant_type, words in (("none", "trained on 16-bit weights"), ("e2m1", "trained in e2m1")):
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"quant": {"type": quant_type}}))
        code, _, err = ask(capfd, run, tmp_path / "out", "--to", "bitsandbytes")
        assert code == 2
        assert words in err
        assert not (tmp_path / "out").exists()
    shutil.rmtree(run / "adapter")
    code, _, err = ask(capfd, run, tmp_path / "out", "--to", "peft")
    assert code == 2
    assert "has no adapter yet" in err
    assert "resume=true" in err
