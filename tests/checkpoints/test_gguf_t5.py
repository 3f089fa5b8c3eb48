"""GGUF files of a T5, written by the gguf package with its own table of names, against the folder they were made of."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf.quants import quantize

from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.checkpoints.companions import copy_companions
from qlora_jax.errors import UserError
from qlora_jax.models.loading import check_model, load_model, read_shape

VERSIONS = {
    "1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
# None of them what follows from the others, or what a configuration may leave out.
OTHERS = {"d_kv": 24, "num_decoder_layers": 3, "relative_attention_num_buckets": 16, "layer_norm_epsilon": 1e-5}
OTHERS |= {"decoder_start_token_id": 2}
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, 3)


@pytest.fixture(scope="module", params=VERSIONS)
def folder(request, make_tiny_t5, tmp_path_factory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("t5") / "folder", 7, **OTHERS, **VERSIONS[request.param])


def own_name(name: str) -> str:
    return NAMES.get_name(name, try_suffixes=(".weight",))


def write(folder: Path, file: Path, kind: Q = Q.F32, extra: dict | None = None, without: tuple[str, ...] = ()) -> Path:
    """The folder's model as llama.cpp's converter writes it; `extra` and `without` by the file's own names."""
    source = open_checkpoint(folder)
    config = source.config
    writer = gguf.GGUFWriter(file, "t5")
    writer.add_context_length(512)
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(config["d_ff"])
    writer.add_block_count(config["num_layers"])
    writer.add_decoder_block_count(config["num_decoder_layers"])
    writer.add_head_count(config["num_heads"])
    writer.add_key_length(config["d_kv"])
    writer.add_value_length(config["d_kv"])
    writer.add_relative_attn_buckets_count(config["relative_attention_num_buckets"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_decoder_start_token_id(config["decoder_start_token_id"])
    tensors = {own_name(name): source.read(name).astype(np.float32) for name in source.names()} | (extra or {})
    for name, values in tensors.items():
        if name not in without:
            used = kind if values.ndim == 2 and values.shape[1] % 32 == 0 else Q.F32
            writer.add_tensor(name, quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_it_is_the_model_of_the_folder(folder, tmp_path) -> None:
    source, read = open_checkpoint(folder), open_checkpoint(write(folder, tmp_path / "t5.gguf"))
    assert read_shape(read) == read_shape(source)
    assert sorted(read.names()) == sorted(source.names())
    for name in source.names():
        assert read.shape(name) == source.shape(name)
        assert read.read(name).tobytes() == source.read(name).tobytes(), name
    ids = np.random.default_rng(0).integers(3, 128, (1, 12), np.int32)
    logits = [np.asarray(load_model(checkpoint)(ids, ids[:, :7])) for checkpoint in (source, read)]
    np.testing.assert_array_equal(logits[1], logits[0])
    # The head reads states with and without the factor of T5 1.0.
    assert read.config["scale_decoder_outputs"] == read.config["tie_word_embeddings"]


def test_8_bits_are_within_their_rounding(folder, tmp_path) -> None:
    source, read = open_checkpoint(folder), open_checkpoint(write(folder, tmp_path / "t5.gguf", Q.Q8_0))
    check_model(read)
    rounded = 0
    for name in source.names():
        wanted, got = source.read(name).astype(np.float32), read.read(name).astype(np.float32)
        if wanted.ndim == 1 or wanted.shape[1] % 32:
            np.testing.assert_array_equal(got, wanted)
            continue
        blocks = wanted.reshape(-1, 32)
        largest = np.abs(blocks).max(axis=1, keepdims=True)
        # Half a step of 127, the scale in float16, the value in bfloat16.
        bound = largest * (1 / 254 + 2**-11 + 2**-8)
        assert (np.abs(got.reshape(-1, 32) - blocks) <= bound).all(), name
        rounded += not np.array_equal(got, wanted)
    assert rounded > 20


def test_copies_are_not_read(folder, tmp_path) -> None:
    source = open_checkpoint(folder)
    embedding = source.read("shared.weight").astype(np.float32)
    table = np.ones((16, 4), np.float32)
    extra = {"output.weight": embedding, "dec.blk.0.cross_attn_rel_b.weight": table}
    read = open_checkpoint(write(folder, tmp_path / "t5.gguf", extra=extra))
    assert read.config["tie_word_embeddings"]
    assert sorted(read.names()) == sorted(set(source.names()) - {"lm_head.weight"})
    check_model(read)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("dec.blk.1.cross_attn_k.weight", "decoder.block.1.layer.1.EncDecAttention.k.weight"),
        ("enc.blk.0.attn_rel_b.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("dec.blk.2.ffn_norm.weight", "decoder.block.2.layer.2.layer_norm.weight"),
        ("token_embd.weight", "shared.weight"),
    ],
)
def test_missing_tensors_are_named(folder, tmp_path, gone, said) -> None:
    file = write(folder, tmp_path / "t5.gguf", without=(gone,))
    with pytest.raises(UserError) as caught:
        check_model(open_checkpoint(file))
    assert said in str(caught.value)
    assert "missing" in str(caught.value)


def test_a_gate_in_some_layers_only_and_what_umt5_has(folder, tmp_path) -> None:
    extra = {"enc.blk.1.attn_rel_b.weight": np.ones((16, 4), np.float32)}
    with pytest.raises(UserError, match=r"no place in the model: encoder\.block\.1\.layer\.0\..*attention_bias"):
        check_model(open_checkpoint(write(folder, tmp_path / "umt5.gguf", extra=extra)))
    if open_checkpoint(folder).config["feed_forward_proj"] == "gated-gelu":
        file = write(folder, tmp_path / "gates.gguf", without=("dec.blk.2.ffn_gate.weight",))
        with pytest.raises(UserError, match=r"(?s)missing.*decoder\.block\.2\.layer\.2\.DenseReluDense\.wi_0"):
            check_model(open_checkpoint(file))


def test_no_tokenizer_inside(folder, tmp_path) -> None:
    checkpoint = open_checkpoint(write(folder, tmp_path / "t5.gguf"))
    with pytest.raises(UserError, match="no tokenizer in"):
        checkpoint.tokenizer()
    assert copy_companions(checkpoint, tmp_path) == ["tokenizer"]
    assert json.dumps(checkpoint.config)  # what a folder converted from it says
