import hashlib
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.errors import UserError, UserErrors
from qlora_jax.models.loading import load_model


def raw_tensors(file):
    """The tensors of a safetensors file read by its specification: length, JSON header, bytes."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    kinds = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}
    return {
        name: np.frombuffer(data[start:][slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def shard(folder, count=3):
    """Splits model.safetensors into shards and writes the index, as transformers names them."""
    tensors = raw_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {key: tensors[key].copy() for key in sorted(tensors)[i::count]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def assert_same_bits(checkpoint, expected):
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype == checkpoint.dtype(name)
        assert read.shape == tensor.shape == checkpoint.shape(name)
        assert read.tobytes() == tensor.tobytes()


def test_single_file_is_read_bit_for_bit(tiny_folder):
    checkpoint = open_checkpoint(str(tiny_folder))
    assert_same_bits(checkpoint, raw_tensors(tiny_folder / "model.safetensors"))
    assert len(checkpoint.names()) == 21
    assert checkpoint.fingerprint() == hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()


def test_shards_are_read_bit_for_bit(tiny_folder):
    expected = shard(tiny_folder)
    checkpoint = open_checkpoint(tiny_folder)
    assert_same_bits(checkpoint, expected)
    joined = b"".join(file.read_bytes() for file in sorted(tiny_folder.glob("model-*.safetensors")))
    assert checkpoint.fingerprint() == hashlib.sha256(joined).hexdigest()


def test_float16_and_float32_keep_their_dtype(tiny_folder):
    tensors = raw_tensors(tiny_folder / "model.safetensors")
    tensors = {name: tensor.astype(np.float32 if "norm" in name else np.float16) for name, tensor in tensors.items()}
    save_file(tensors, tiny_folder / "model.safetensors")
    assert_same_bits(open_checkpoint(tiny_folder), tensors)


def test_both_spellings_of_the_configuration_read_alike(tiny_folder, edit_config):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    edit_config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}, dtype="float16")
    new = open_checkpoint(tiny_folder).config
    edit_config(rope_parameters=None, dtype=None, rope_theta=500000, torch_dtype="float16")
    edit_config(rope_scaling={"type": "llama3", **scaling})
    old = open_checkpoint(tiny_folder).config
    assert new == old
    assert new["rope_theta"] == 5e5
    assert new["rope_scaling"] == {"rope_type": "llama3", **scaling}
    assert new["torch_dtype"] == "float16"


def test_what_a_config_leaves_out_is_filled_in(tiny_folder, edit_config):
    edit_config(rope_parameters=None, dtype=None, num_key_value_heads=None, head_dim=None, attention_bias=None)
    edit_config(tie_word_embeddings=None, mlp_bias=None)
    config = open_checkpoint(tiny_folder).config
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None)
    assert (config["num_key_value_heads"], config["head_dim"]) == (4, 32)
    assert [config[key] for key in ("tie_word_embeddings", "attention_bias", "mlp_bias")] == [False] * 3


def test_a_tied_head_and_derived_buffers_are_not_listed(tiny_folder, edit_config):
    tensors = raw_tensors(tiny_folder / "model.safetensors")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {buffer: np.ones(16, np.float32)}, tiny_folder / "model.safetensors")
    edit_config(tie_word_embeddings=True)
    assert sorted(open_checkpoint(tiny_folder).names()) == sorted(tensors.keys() - {"lm_head.weight"})


def test_tokenizer_with_chat_template(tiny_folder):
    with pytest.raises(UserError, match=r"no tokenizer in .*model"):
        open_checkpoint(tiny_folder).tokenizer()
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "hello": 1, "there": 2}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tiny_folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<s>"}
    (tiny_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tiny_folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    read = open_checkpoint(tiny_folder).tokenizer()
    assert read("hello there").input_ids == [1, 2]
    assert read.apply_chat_template([{"role": "user", "content": "there"}], tokenize=False) == "there"


# ---- what a user can get wrong


def message(path):
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_nothing_there(tmp_path):
    assert "no such folder or file: nowhere" in message("nowhere")
    assert f"no such folder or file: {tmp_path}/a/b" in message(tmp_path / "a/b")


def test_hub_name_without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    text = message("some-org/no-such-model")
    assert "some-org/no-such-model" in text
    assert "Hugging Face hub" in text
    assert "model.path=FOLDER" in text


def test_one_file_of_a_folder(tiny_folder):
    assert f"model.path={tiny_folder}" in message(tiny_folder / "model.safetensors")


def test_missing_config_points_to_a_gguf_file_beside_it(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    text = message(tmp_path)
    assert "no config.json" in text
    assert f"model.path={tmp_path / 'm.gguf'}" in text


def test_broken_config(tiny_folder, edit_config):
    assert "hidden_size (None)" in message(edit_config(hidden_size=None))
    assert "num_attention_heads ('four')" in message(edit_config(hidden_size=128, num_attention_heads="four"))
    (tiny_folder / "config.json").write_text("{not json")
    assert "config.json is not valid JSON" in message(tiny_folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": None, "rope_theta": "a lot"},
        {"rope_parameters": ["default"]},
        {"num_attention_heads": 4, "head_dim": None, "rope_parameters": {"rope_theta": [1]}},
    ],
)
def test_a_value_of_the_wrong_kind(edit_config, changes):
    assert "config.json has a value of the wrong kind" in message(edit_config(**changes))


def test_an_error_of_two_lines_says_what_is_wrong(tiny_folder, edit_config):
    shutil.copyfile(tiny_folder / "config.json", tiny_folder / "tokenizer_config.json")
    folder = edit_config(rms_norm_eps="small")
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder).tokenizer()
    assert "rms_norm_eps" in str(caught.value)
    assert "float" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
    ],
)
def test_unsupported_architecture(edit_config, changes):
    text = message(edit_config(**changes))
    assert "unsupported architecture" in text
    assert changes["architectures"][0] in text
    assert "llama (LlamaForCausalLM), mistral (MistralForCausalLM)" in text


def test_prequantized_folder_of_another_method(edit_config):
    text = message(edit_config(quantization_config={"quant_method": "gptq"}))
    assert "gptq" in text
    assert "bitsandbytes in 4 bits" in text


def test_quantized_tensor_without_a_quantization_config(tiny_folder):
    tensors = raw_tensors(tiny_folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": np.zeros(4, np.uint8)}, tiny_folder / "model.safetensors")
    text = message(tiny_folder)
    assert "'model.norm.weight'" in text
    assert "U8" in text


def test_missing_shard(tiny_folder):
    shard(tiny_folder)
    (tiny_folder / "model-00002-of-00003.safetensors").unlink()
    text = message(tiny_folder)
    assert "missing shard" in text
    assert "model-00002-of-00003.safetensors" in text


def test_shards_without_an_index(tiny_folder):
    expected = shard(tiny_folder)
    (tiny_folder / "model.safetensors.index.json").unlink()
    assert_same_bits(open_checkpoint(tiny_folder), expected)
    other = tiny_folder / "model-00001-of-00002.safetensors"
    shutil.copy(tiny_folder / "model-00001-of-00003.safetensors", other)
    assert "shards of several sets" in message(tiny_folder)
    other.unlink()
    (tiny_folder / "model-00002-of-00003.safetensors").unlink()
    text = message(tiny_folder)
    assert "missing shard" in text
    assert "model-00002-of-00003.safetensors" in text


def test_tensor_missing_in_its_shard(tiny_folder):
    shard(tiny_folder)
    file = tiny_folder / "model-00001-of-00003.safetensors"
    tensors = {name: tensor.copy() for name, tensor in raw_tensors(file).items()}
    lost = sorted(tensors)[1]
    del tensors[lost]
    save_file(tensors, file)
    text = message(tiny_folder)
    assert repr(lost) in text
    assert file.name in text


def test_tensor_missing_altogether(tiny_folder):
    checkpoint = open_checkpoint(tiny_folder)
    for ask in (checkpoint.read, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(UserError, match=r"(?s)'model\.nothing' is missing in .*model\.safetensors"):
            ask("model.nothing")


@pytest.mark.parametrize("bytes_left", [0, 5, 100])
def test_truncated_header(tiny_folder, bytes_left):
    file = tiny_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_left])
    text = message(tiny_folder)
    assert str(file) in text
    assert "truncated" in text


def test_truncated_data_names_the_first_tensor_cut_off(tiny_folder):
    file = tiny_folder / "model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    begin, end = header["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
    file.write_bytes(data[: start + (begin + end) // 2])
    text = message(tiny_folder)
    assert f"{file} is truncated" in text
    assert "'model.layers.1.mlp.up_proj.weight'" in text


def test_a_file_that_shrinks_after_it_was_opened(tiny_folder):
    checkpoint, file = open_checkpoint(tiny_folder), tiny_folder / "model.safetensors"
    name = list(raw_tensors(file))[-1]
    read = checkpoint.read(name)
    assert not read.flags.writeable
    del read
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"truncated: tensor '{name}' should end at byte"):
        checkpoint.read(name)


@pytest.mark.parametrize("spaces", [1, 2, 3])
def test_tensors_at_odd_bytes(tiny_folder, spaces):
    """The format's writers align tensors to 8 bytes; its readers may not count on that."""
    file = tiny_folder / "model.safetensors"
    expected, data = raw_tensors(file), file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    padded = (length + spaces).to_bytes(8, "little") + data[8 : 8 + length] + b" " * spaces + data[8 + length :]
    file.write_bytes(padded)
    assert_same_bits(open_checkpoint(tiny_folder), expected)
    odd = load_model(tiny_folder)
    file.write_bytes(data)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(odd), nnx.state(load_model(tiny_folder)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_is_more_than_a_users_mistake(tiny_folder, draw):
    """A file cut anywhere, longer than it says, or with other bytes in its header."""
    file = tiny_folder / "model.safetensors"
    whole = (tiny_folder / "whole").read_bytes() if (tiny_folder / "whole").exists() else file.read_bytes()
    (tiny_folder / "whole").write_bytes(whole)
    start = 8 + int.from_bytes(whole[:8], "little")
    data = bytearray(whole)
    for place in draw.draw(st.lists(st.integers(0, start - 1), max_size=3)):
        data[place] = draw.draw(st.integers(0, 255))
    end = draw.draw(st.one_of(st.integers(0, start + 64), st.integers(0, len(data)), st.just(len(data))))
    file.write_bytes(bytes(data[:end]) + bytes(draw.draw(st.sampled_from([0, 0, 1, 5000]))))
    try:
        checkpoint = open_checkpoint(tiny_folder)
        read = [checkpoint.read(name) for name in checkpoint.names()]
    except (UserError, UserErrors):
        return
    assert sum(tensor.nbytes for tensor in read) <= file.stat().st_size


def test_header_that_is_not_json(tiny_folder):
    file = tiny_folder / "model.safetensors"
    file.write_bytes((4).to_bytes(8, "little") + b"oops" + bytes(100))
    assert f"{file} cannot be read as safetensors" in message(tiny_folder)


def test_git_lfs_pointer(tiny_folder):
    (tiny_folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in message(tiny_folder)


def test_pickles_and_no_weights(tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    assert "no weights in" in message(tiny_folder)
    (tiny_folder / "pytorch_model.bin").write_bytes(b"")
    text = message(tiny_folder)
    assert "pytorch_model.bin" in text
    assert "save_pretrained" in text
