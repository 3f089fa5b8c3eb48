import hashlib

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.checkpoints.gguf import llama3_factors
from qlora_jax.errors import UserError

MIXES = {
    "Q4_0": {"*": Q.Q4_0},
    "Q8_0": {"*": Q.Q8_0},
    "Q4_1 with a Q8_0 embedding": {"*": Q.Q4_1, "token_embd": Q.Q8_0},
    "F16": {"*": Q.F16},
    "BF16": {"*": Q.BF16},
    "every layer kind another type": {
        "token_embd": Q.F16,
        "attn_q": Q.Q4_0,
        "attn_k": Q.Q8_0,
        "attn_v": Q.F32,
        "attn_output": Q.BF16,
        "ffn_gate": Q.Q4_1,
    },
}


@pytest.mark.parametrize("types", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tensors_are_read_bit_for_bit(tiny_gguf, tmp_path, types, tied):
    file = tmp_path / "tiny.gguf"
    expected = tiny_gguf(types, tied=tied).write(file)
    checkpoint = open_checkpoint(file)
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, values in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == values.dtype == checkpoint.dtype(name)
        assert read.shape == values.shape == checkpoint.shape(name)
        assert read.tobytes() == values.tobytes(), name
    assert checkpoint.config["tie_word_embeddings"] == tied
    assert checkpoint.fingerprint() == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_tensor_read_in_pieces_is_the_same(tiny_gguf, tmp_path, monkeypatch):
    expected = tiny_gguf({"*": Q.Q4_1}).write(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    monkeypatch.setattr("qlora_jax.checkpoints.gguf._CHUNK", 7 * 64)
    for name, values in expected.items():
        assert checkpoint.read(name).tobytes() == values.tobytes(), name


def test_biases_of_attention_are_permuted_too(tiny_gguf, tmp_path):
    expected = tiny_gguf({"*": Q.Q8_0}, bias=True).write(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.config["attention_bias"]
    assert sorted(checkpoint.names()) == sorted(expected)
    for name in expected:
        assert checkpoint.read(name).tobytes() == expected[name].tobytes(), name


def test_config(tiny_gguf, tmp_path):
    tiny_gguf(metadata={"tokenizer.ggml.eos_token_id": 7}).write(tmp_path / "tiny.gguf")
    assert open_checkpoint(tmp_path / "tiny.gguf").config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "vocab_size": 300,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 7,
    }


def test_llama3_rope_factors_become_rope_scaling(tiny_gguf, tmp_path):
    # The converter's loop for Llama 3.2 (factor 32), one frequency at a time; 8 frequencies, theta 50000.
    wavelengths = [2 * np.pi * 50000.0 ** (2 * j / 16) for j in range(8)]
    factors = []
    for wavelength in wavelengths:
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 32 + smooth))
    assert 1.0 < factors[5] < 32.0  # one of them lies on the ramp
    stored = {"rope_freqs.weight": np.array(factors, np.float32)}
    tiny_gguf(extra=stored).write(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    scaling = checkpoint.config["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    np.testing.assert_allclose(llama3_factors(scaling, 50000.0, 16), factors, rtol=1e-6)
    assert not any("rope" in name for name in checkpoint.names())


@pytest.mark.parametrize(
    "metadata",
    [{"llama.rope.scale_linear": 2.0}, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}],
    ids=["old", "new"],
)
def test_linear_rope_scaling(tiny_gguf, tmp_path, metadata):
    tiny_gguf(metadata=metadata).write(tmp_path / "tiny.gguf")
    assert open_checkpoint(tmp_path / "tiny.gguf").config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_yarn(tiny_gguf, tmp_path):
    values = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
    tiny_gguf(metadata={f"llama.rope.scaling.{key}": value for key, value in values.items()}).write(tmp_path / "a.gguf")
    wanted = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert open_checkpoint(tmp_path / "a.gguf").config["rope_scaling"] == wanted


def test_rope_factors_of_one_scale_nothing(tiny_gguf, tmp_path):
    tiny_gguf(extra={"rope_freqs.weight": np.ones(8, np.float32)}).write(tmp_path / "tiny.gguf")
    assert open_checkpoint(tmp_path / "tiny.gguf").config["rope_scaling"] is None


# ---- what a user can get wrong


def message(path):
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_not_a_gguf_file(tmp_path):
    file = tmp_path / "model.gguf"
    for content in (b"", b"GG", b"PK\x03\x04 something else"):
        file.write_bytes(content)
        assert f"{file} is not a GGUF file" in message(file)


def test_truncated_header(tiny_gguf, tmp_path):
    whole, file = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    tiny_gguf({"*": Q.Q8_0}).write(whole)
    data = whole.read_bytes()
    header = data.index(b"blk.1.ffn_down.weight")
    for length in [4, 7, 23, *range(30, header, 61)]:
        file.write_bytes(data[:length])
        text = message(file)
        assert f"{file} is truncated or damaged" in text
        assert f"{length} bytes" in text


def test_truncated_data_names_the_first_tensor_cut_off(tiny_gguf, tmp_path):
    file = tmp_path / "tiny.gguf"
    tiny_gguf({"*": Q.Q8_0}).write(file)
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    text = message(file)
    assert f"{file} is truncated" in text
    assert "'blk.1.ffn_down.weight'" in text
    file.write_bytes(data[: len(data) // 2])
    assert "'blk.1.ffn_down.weight'" not in message(file)


def test_damaged_header(tiny_gguf, tmp_path):
    file = tmp_path / "tiny.gguf"
    tiny_gguf().write(file)
    data = bytearray(file.read_bytes())
    data[4] = 99  # the format's version
    file.write_bytes(data)
    assert "version 99" in message(file)


def test_other_architecture(tiny_gguf, tmp_path):
    tiny_gguf(architecture="mamba").write(tmp_path / "tiny.gguf")
    text = message(tmp_path / "tiny.gguf")
    assert "unsupported architecture" in text
    assert "mamba" in text
    assert "llama, qwen2, qwen3" in text


def test_unknown_tensor(tiny_gguf, tmp_path):
    tiny_gguf(extra={"blk.0.ffn_gate_exps.weight": np.ones((2, 32), np.float32)}).write(tmp_path / "tiny.gguf")
    text = message(tmp_path / "tiny.gguf")
    assert "'blk.0.ffn_gate_exps.weight'" in text
    assert "mixtures of experts" in text


def test_type_that_cannot_be_dequantized(tiny_gguf, tmp_path):
    tiny_gguf(extra={"blk.2.ffn_up.weight": np.ones((4, 32), np.int8)}).write(tmp_path / "tiny.gguf")
    text = message(tmp_path / "tiny.gguf")
    assert "'blk.2.ffn_up.weight' is I8" in text


def test_unsupported_rope_scaling(tiny_gguf, tmp_path):
    tiny_gguf(metadata={"llama.rope.scaling.type": "longrope"}).write(tmp_path / "tiny.gguf")
    assert "unsupported rope scaling" in message(tmp_path / "tiny.gguf")
    tiny_gguf(extra={"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}).write(tmp_path / "tiny.gguf")
    assert "unsupported rope scaling" in message(tmp_path / "tiny.gguf")
    tiny_gguf(metadata={"llama.attention.key_length": 16, "llama.rope.dimension_count": 8}).write(
        tmp_path / "tiny.gguf"
    )
    assert "only 8 of 16 dimensions" in message(tmp_path / "tiny.gguf")


def test_missing_metadata_and_lists(tiny_gguf, tmp_path):
    tiny_gguf(metadata={"llama.attention.key_length": [16, 16]}).write(tmp_path / "tiny.gguf")
    assert "llama.attention.key_length" in message(tmp_path / "tiny.gguf")


def test_missing_tensor_and_tokenizer(tiny_gguf, tmp_path):
    tiny_gguf().write(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    with pytest.raises(UserError, match=r"'lm_head\.weight' is missing in .*tiny\.gguf"):
        checkpoint.read("lm_head.weight")
    with pytest.raises(UserError, match=r"no tokenizer in .*tiny\.gguf"):
        checkpoint.tokenizer()
