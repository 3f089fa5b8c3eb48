"""Broken checkpoints and adapters at the doors: exit code 2, what is wrong by name, no traceback, nothing written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax import convert, export, generate

UP = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(golden_dir, tmp_path) -> Path:
    """The tiny LLaMA in two shards."""
    folder = Path(shutil.copytree(golden_dir / "interop" / "tiny_llama_bf16", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, held in shards.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture
def adapter(golden_dir, tmp_path) -> Path:
    return Path(shutil.copytree(golden_dir / "interop" / "adapter_all_linear", tmp_path / "adapter"))


def change(folder: Path, edit) -> None:
    """Edits the tensors of the file that holds `UP` (or of an adapter's)."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if UP in tensors or file.name.startswith("adapter"):
            edit(tensors)
            save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def name_absent_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = "two.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


CHECKPOINTS = {
    "truncated": (lambda f: truncate(f / "two.safetensors"), "two.safetensors is truncated"),
    "empty": (lambda f: (f / "two.safetensors").write_bytes(b""), "two.safetensors is truncated or no safetensors"),
    "integers": (lambda f: change(f, lambda t: t.update({UP: t[UP].astype(np.int32)})), "is stored as I32"),
    "NaN": (
        lambda f: change(f, lambda t: t[UP].__setitem__((3, 4), np.nan)),
        f"{UP!r} of MODEL has values that are NaN",
    ),
    "no shard": (lambda f: (f / "two.safetensors").unlink(), "missing shard"),
    "absent tensor": (name_absent_tensor, "'model.layers.7.mlp.up_proj.weight' is missing"),
    "no tensor": (lambda f: change(f, lambda t: t.pop(UP)), "is missing"),
    "index": (lambda f: (f / INDEX).write_text("[]"), "holds no JSON object"),
    "shape": (
        lambda f: edit_json(f / "config.json", intermediate_size=160),
        "have shape (192, 128), expected (160, 128)",
    ),
    "layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=3), "9 tensors are missing"),
    "heads": (lambda f: edit_json(f / "config.json", num_attention_heads="four"), "num_attention_heads ('four')"),
    "config": (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
    "family": (lambda f: edit_json(f / "config.json", model_type="mamba"), "unsupported architecture"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_broken_checkpoints(model, tmp_path, capfd, name):
    break_it, words = CHECKPOINTS[name]
    break_it(model)
    assert convert.main([str(model), str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert words.replace("MODEL", str(model)) in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
ADAPTERS = {
    "truncated": (lambda f: truncate(f / "adapter_model.safetensors"), "is truncated"),
    "NaN": (lambda f: change(f, lambda t: t[A].__setitem__((0, 0), np.inf)), f"NaN or infinity in {A}"),
    "integers": (lambda f: change(f, lambda t: t.update({A: t[A].astype(np.int64)})), "is stored as I64"),
    "another model": (lambda f: change(f, lambda t: t.update({A: t[A][:, :64].copy()})), "does not fit the model"),
    "no factor": (lambda f: change(f, lambda t: t.pop(A)), f"lacks {A}"),
    "rank": (lambda f: edit_json(f / "adapter_config.json", r="8"), "r='8'"),
    "targets": (lambda f: edit_json(f / "adapter_config.json", target_modules=5), "target_modules=5"),
    "patterns": (lambda f: edit_json(f / "adapter_config.json", rank_pattern=["q"]), "rank_pattern=['q']"),
    "alpha": (lambda f: edit_json(f / "adapter_config.json", lora_alpha=float("nan")), "lora_alpha=nan"),
    "dropout": (lambda f: edit_json(f / "adapter_config.json", lora_dropout="much"), "lora_dropout='much'"),
    "kind": (lambda f: edit_json(f / "adapter_config.json", peft_type="VERA"), "peft_type is 'VERA'"),
    "config": (lambda f: (f / "adapter_config.json").write_text("nothing"), "is not valid JSON"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_broken_adapters(golden_dir, adapter, tmp_path, capfd, name):
    break_it, words = ADAPTERS[name]
    break_it(adapter)
    base = str(golden_dir / "interop" / "tiny_llama_bf16")
    assert export.main([str(adapter), str(tmp_path / "out"), "--to", "merged", "--model", base]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_for_other_layers_is_told_when_asked(golden_dir, adapter, tiny_llama, capfd):
    model, _ = tiny_llama
    edit_json(model / "config.json", num_hidden_layers=1)
    tensors = {n: v for n, v in load_file(model / "model.safetensors").items() if "layers.1." not in n}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert generate.main(["--model", str(model), "--adapter", str(adapter), "--prompt", "1"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "belong to no layer of the model" in err
    assert "made for another model" in err
