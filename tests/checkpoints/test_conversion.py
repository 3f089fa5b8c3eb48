"""Quantizing once: the folder holds what load_model makes of the checkpoint, and appears whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.checkpoints.atomic import check_unused, whole_folder
from qlora_jax.checkpoints.conversion import convert
from qlora_jax.errors import UserError
from qlora_jax.models.loading import load_model
from qlora_jax.nf4 import use_kernels


def same_leaves(left, right) -> None:
    assert jax.tree.structure(nnx.state(left)) == jax.tree.structure(nnx.state(right))
    for ours, theirs in zip(jax.tree.leaves(nnx.state(left)), jax.tree.leaves(nnx.state(right)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kernels", ["auto", "xla"])
@pytest.mark.parametrize(("quant_type", "block_size", "double_quant"), [("nf4", 64, True), ("fp4", 32, False)])
def test_the_folder_is_what_loading_quantizes(tiny_folder, tmp_path, kernels, quant_type, block_size, double_quant):
    form = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    with use_kernels(kernels):
        made = convert(open_checkpoint(tiny_folder), tmp_path / "out", **form)
        same_leaves(load_model(tmp_path / "out"), load_model(tiny_folder, **form))
    assert made.linear_bits == pytest.approx(4 + (8 / 64 + 32 / 64 / 256 if double_quant else 32 / 32), abs=5e-3)
    assert made.missing == ("tokenizer",)
    assert made.files == (tmp_path / "out" / "model.safetensors",)


def test_our_bytes_are_those_that_bitsandbytes_wrote(golden_dir, tmp_path):
    """But for 2 of 3840 second-level codes, which bitsandbytes' CPU path rounds otherwise (tests/golden/README.md)."""
    interop = golden_dir / "interop"
    convert(open_checkpoint(interop / "tiny_llama_bf16"), tmp_path / "out")
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", interop / "tiny_llama_bnb4"))
    assert ours.keys() == theirs.keys()
    different = 0
    for name, expected in theirs.items():
        if ".quant_state." in name:
            left, right = (json.loads(state.tobytes()) for state in (ours[name], expected))
            assert left.pop("nested_offset") == pytest.approx(right.pop("nested_offset"), rel=1e-6)
            assert left == right
        elif name.endswith(".absmax"):
            different += int((ours[name] != expected).sum())
        else:
            np.testing.assert_array_equal(ours[name].view(np.uint8), expected.view(np.uint8), err_msg=name)
    assert different == 2


def test_gguf_float32_and_shards(tiny_gguf, tiny_folder, tmp_path):
    tiny_gguf(tied=False).write(tmp_path / "tiny.gguf")
    tensors = {name: value.astype(np.float32) for name, value in load_file(tiny_folder / "model.safetensors").items()}
    save_file(tensors, tiny_folder / "model.safetensors")
    for i, source in enumerate([tmp_path / "tiny.gguf", tiny_folder]):
        made = convert(open_checkpoint(source), tmp_path / f"out{i}", shard_bytes=50_000)
        assert len(made.files) > 2
        assert all(file.is_file() for file in made.files)
        same_leaves(load_model(tmp_path / f"out{i}"), load_model(source))


def test_what_belongs_to_a_model_goes_with_it(tiny_llama, tmp_path):
    """Byte for byte; and config.json keeps the keys that it had."""
    folder, _ = tiny_llama
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    (folder / "LICENSE").write_text("yours")
    (folder / "original.bin").write_text("not ours")
    made = convert(open_checkpoint(folder), tmp_path / "out")
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"config.json", "model.safetensors"}
    assert made.missing == ()
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "out"))
    assert after.pop("quantization_config")["load_in_4bit"] is True
    assert after == {key: value for key, value in before.items() if value is not None}


def test_gguf_brings_its_tokenizer(tiny_gguf, tmp_path):
    def tokenizer(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        symbols = [chr(i) for i in range(33, 127)]
        writer.add_token_list(["</s>", *symbols, "ab", *(f"<{i}>" for i in range(300 - 2 - len(symbols)))])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ 2 }}")

    tiny_gguf(tokenizer=tokenizer).write(tmp_path / "tiny.gguf")
    convert(open_checkpoint(tmp_path / "tiny.gguf"), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tokenizer().chat_template == "{{ 2 }}"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 0


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_not_finite_are_refused(tiny_folder, tmp_path, tensor, value):
    tensors = load_file(tiny_folder / "model.safetensors")
    tensors[tensor][3, 5] = value
    save_file(tensors, tiny_folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{tensor}.* NaN or infinite"):
        convert(open_checkpoint(tiny_folder), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


KILLED = """
import sys, time
from pathlib import Path
from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.checkpoints.conversion import convert

def wait(done, total):
    print("writing", flush=True)
    time.sleep(60)

convert(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), progress=wait)
"""


def test_a_killed_conversion_leaves_nothing_that_looks_done_and_the_next_one_clears_it(tiny_folder, tmp_path):
    out = tmp_path / "out"
    started = time.time()
    process = subprocess.Popen([sys.executable, "-c", KILLED, tiny_folder, out], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "writing\n"
        assert not out.exists()
        (left,) = [path for path in tmp_path.iterdir() if path.name.startswith(".out-writing-")]
        convert(open_checkpoint(tiny_folder), tmp_path / "out2")  # of another name
        with whole_folder(out) as filled:  # the other one still writes: its folder stays
            (filled / "mine").write_text("")
        assert left.is_dir()
        shutil.rmtree(out)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert left.is_dir()
    assert not out.exists()
    convert(open_checkpoint(tiny_folder), out)
    assert not left.exists()
    assert (out / "model.safetensors").stat().st_mtime > started
    same_leaves(load_model(out), load_model(tiny_folder))


def test_a_folder_that_was_put_aside_when_the_process_was_killed_comes_back(tmp_path):
    aside = tmp_path / ".out-writing-abcd1234" / "old"
    aside.mkdir(parents=True)
    (aside / "kept").write_text("1")

    def stop():
        with whole_folder(tmp_path / "out"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert (tmp_path / "out" / "kept").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_of_others_are_left_alone(tmp_path):
    for name, inside in ((".out-settings", "new"), (".out-writing-x", "thing")):
        (tmp_path / name / inside).mkdir(parents=True)
    with whole_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out-settings", ".out-writing-x"}


def test_used_folders_and_files_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "used" / "x").mkdir(parents=True)
    check_unused(tmp_path / "empty", option="OUT")
    check_unused(tmp_path / "new" / "deep", option="OUT")
    for name, words in (("file", "is a file"), ("file/below", "lies under"), ("used", "is not empty")):
        with pytest.raises(UserError, match=words):
            check_unused(tmp_path / Path(name), option="OUT")
    with pytest.raises(UserError, match=r"such as .*used-2"):
        check_unused(tmp_path / "used", option="OUT")
    if os.getuid() != 0:
        (tmp_path / "empty").chmod(0o500)
        with pytest.raises(UserError, match="cannot be written"):
            check_unused(tmp_path / "empty" / "new", option="OUT")
