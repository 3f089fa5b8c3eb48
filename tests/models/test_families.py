"""What the families' differences do, without torch; test_families_interop.py holds them against transformers."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from qlora_jax.checkpoints.bitsandbytes_writer import save_bitsandbytes
from qlora_jax.checkpoints.families import FAMILIES, normalised
from qlora_jax.checkpoints.source import open_checkpoint
from qlora_jax.models.loading import load_model, read_shape

from .decoders import write_gguf

SHAPE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def config(**changes) -> dict:
    return normalised(SHAPE | HEADS | changes)


@functools.partial(jax.jit, static_argnums=0)
def run(graph, state, ids, kwargs):
    return nnx.merge(graph, state)(ids, **kwargs)


def logits(model, ids, **kwargs) -> np.ndarray:
    return np.asarray(run(*nnx.split(model), jnp.asarray(ids), kwargs))


def reach(model, seq: int) -> list[int]:
    """How many tokens back a change of each token is still seen at the end."""
    changed = np.arange(seq, dtype=np.int32)[None].repeat(seq + 1, 0) % 90
    changed[np.arange(seq), np.arange(seq)] = 90
    *ends, unchanged = logits(model, changed)[:, -1]
    return [seq - 1 - i for i, end in enumerate(ends) if np.abs(end - unchanged).max() > 1e-5]


@pytest.mark.parametrize("seq", [20, 150], ids=["library's attention", "one head at a time"])
def test_a_window_ends_what_a_token_sees(memory_checkpoint, seq: int) -> None:
    """In one layer the window's tokens, in three layers three times as far."""
    one = load_model(memory_checkpoint(sliding_window=5, num_hidden_layers=1), dtype=jnp.float32)
    assert max(reach(one, seq)) == 4
    if seq == 20:
        three = load_model(memory_checkpoint(sliding_window=5), dtype=jnp.float32)
        assert max(reach(three, seq)) == 12


def test_layers_with_and_without_a_window(memory_checkpoint) -> None:
    """The cache, left padding and packing give what single rows give; a full layer lets a token see everything."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = load_model(memory_checkpoint(sliding_window=5, layer_types=types), quant_type=None, dtype=jnp.float32)
    assert max(reach(model, 20)) == 19
    ids = np.random.default_rng(0).integers(0, 96, (1, 20)).astype(np.int32)
    alone = logits(model, ids)
    positions = np.arange(20, dtype=np.int32)[None]
    np.testing.assert_array_equal(logits(model, ids, positions=positions), alone)  # counted without the window
    graph, state = nnx.split(model)

    @jax.jit
    def by_parts(state):
        model = nnx.merge(graph, state)
        cache, parts = model.init_cache(1, 24), []
        for start, stop in ((0, 13), (13, 14), (14, 20)):
            part, cache = model(ids[:, start:stop], cache=cache)
            parts.append(part)
        return jnp.concatenate(parts, 1)

    np.testing.assert_allclose(by_parts(state), alone, atol=2e-5)
    wide = np.concatenate([ids[:, :9], ids], 1)
    packed = logits(model, wide, segment_ids=np.repeat([7, 1], [9, 20])[None])
    np.testing.assert_allclose(packed[:, 9:], alone, atol=2e-5)
    np.testing.assert_allclose(packed[:, :9], logits(model, ids[:, :9]), atol=2e-5)


def test_a_window_that_nothing_exceeds_changes_nothing(memory_checkpoint) -> None:
    ids = np.arange(8, dtype=np.int32)[None]
    plain = load_model(memory_checkpoint(), dtype=jnp.float32)
    windowed = load_model(memory_checkpoint(sliding_window=8), dtype=jnp.float32)
    np.testing.assert_array_equal(logits(windowed, ids), logits(plain, ids))


def test_what_a_config_leaves_out_is_the_familys() -> None:
    assert config()["num_key_value_heads"] == 2
    mistral = normalised(SHAPE | {"model_type": "mistral", "num_attention_heads": 8})
    assert [mistral[key] for key in ("num_key_value_heads", "sliding_window")] == [8, 4096]
    assert mistral["max_position_embeddings"] == 131072
    qwen = config(model_type="qwen2")
    assert (qwen["attention_bias"], qwen["attention_output_bias"], qwen["mlp_bias"]) == (True, False, False)
    qwen = config(model_type="qwen3")
    assert (qwen["head_dim"], qwen["qk_norm"], qwen["attention_bias"]) == (128, True, False)
    for kind in FAMILIES:
        assert config(model_type=kind)["rope_theta"] == (1e6 if kind == "gemma3_text" else 10000.0)
    gemma = config(model_type="gemma", hidden_act="gelu", hidden_activation=None)
    assert (gemma["hidden_act"], gemma["tie_word_embeddings"], gemma["head_dim"]) == ("gelu_pytorch_tanh", True, 256)


def test_windows_of_each_family() -> None:
    def windows(**changes) -> tuple:
        made = config(**changes)
        return made.get("sliding_window"), made.get("layer_types")

    mixed = ["full_attention", "sliding_attention", "sliding_attention"]
    assert windows(sliding_window=7) == (None, None)  # LLaMA has none, whatever its config.json says
    assert windows(model_type="mistral", sliding_window=7) == (7, None)
    assert windows(model_type="mistral", sliding_window=None) == (None, None)
    late = {"model_type": "qwen2", "sliding_window": 7, "max_window_layers": 1}
    assert windows(**late) == (None, None)
    assert windows(**late, use_sliding_window=True) == (7, mixed)
    assert windows(**late | {"max_window_layers": 0}, use_sliding_window=True) == (7, None)
    assert windows(**late | {"max_window_layers": 3}, use_sliding_window=True) == (None, None)
    assert windows(**late, use_sliding_window=True, layer_types=mixed[::-1]) == (7, mixed[::-1])
    with pytest.raises(ValueError, match="chunked_attention"):
        windows(**late, layer_types=["chunked_attention"] * 3)
    alternating = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(model_type="gemma2") == (4096, alternating)
    assert windows(model_type="gemma3_text", sliding_window=7) == (7, None)  # the sixth layer would be the first full
    assert windows(model_type="gemma3_text", sliding_window_pattern=2)[1] == alternating


def test_both_spellings_of_gemma_3s_two_kinds_of_rotary_positions() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = config(model_type="gemma3_text", rope_theta=1e5, rope_local_base_freq=5e3, rope_scaling=scaling)
    kinds = {"full_attention": scaling | {"rope_theta": 1e5}, "sliding_attention": {"rope_theta": 5e3}}
    new = config(model_type="gemma3_text", rope_parameters=kinds)
    for made in (old, new):
        assert (made["rope_theta"], made["local_rope_theta"], made["rope_scaling"]) == (1e5, 5e3, scaling)


NEOX = {"model_type": "gpt_neox", "layer_norm_eps": 1e-5, "hidden_act": "gelu", "partial_rotary_factor": 0.25}


def test_gpt_neox_packs_caches_and_adapts(memory_checkpoint) -> None:
    model = load_model(memory_checkpoint(**NEOX, attention_bias=True), rank=4, targets=["query_key_value"])
    assert model.gpt_neox.layers.attention.query_key_value.lora_a.get_value().shape == (3, 64, 4)
    assert model.gpt_neox.layers.mlp.dense_h_to_4h.rank == 0
    model.dtype = jnp.dtype(jnp.float32)
    ids = np.random.default_rng(0).integers(0, 96, (1, 20)).astype(np.int32)
    alone = logits(model, ids)
    packed = logits(model, np.concatenate([ids[:, :9], ids], 1), segment_ids=np.repeat([7, 1], [9, 20])[None])
    np.testing.assert_allclose(packed[:, 9:], alone, atol=2e-5)
    cached, cache = run(*nnx.split(model), jnp.asarray(ids[:, :12]), {"cache": model.init_cache(1, 20)})
    rest, _ = run(*nnx.split(model), jnp.asarray(ids[:, 12:]), {"cache": cache})
    np.testing.assert_allclose(np.concatenate([cached, rest], 1), alone, atol=2e-5)


def test_buffers_of_old_gpt_neox_files_are_not_read(memory_checkpoint, tmp_path: Path) -> None:
    """And the head has one name, whichever version of transformers wrote it."""
    checkpoint = memory_checkpoint(**NEOX, architectures=["GPTNeoXForCausalLM"], attention_bias=True)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    tensors = {name: checkpoint.values(name) for name in checkpoint.names()}
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    for layer in range(3):
        prefix = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{prefix}.bias"] = np.ones((1, 1, 16, 16), bool)
        tensors[f"{prefix}.masked_bias"] = np.array(-1e9, np.float32)
        tensors[f"{prefix}.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    np.testing.assert_array_equal(model.embed_out.weight.get_value(), tensors["lm_head.weight"])
    assert model.gpt_neox.layers.attention.dense.bias.get_value().shape == (3, 64)
    save_bitsandbytes(model, tmp_path / "out", source=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_model(tmp_path / "out")), nnx.state(model))


def test_a_gguf_file_of_a_gpt_neox_has_its_tensors_and_configuration(memory_checkpoint, tmp_path: Path) -> None:
    checkpoint = memory_checkpoint(**NEOX, attention_bias=True, use_parallel_residual=False, rope_theta=500.0)
    tensors = {name: checkpoint.values(name).astype(np.float32) for name in checkpoint.names()}
    write_gguf(tmp_path / "neox.gguf", "gptneox", checkpoint.config, tensors)
    stored = open_checkpoint(tmp_path / "neox.gguf")
    assert sorted(stored.names()) == sorted(tensors)
    for name, values in tensors.items():
        np.testing.assert_array_equal(stored.read(name).astype(np.float32), values, err_msg=name)
    assert read_shape(stored) == read_shape(checkpoint)
    assert not read_shape(stored).use_parallel_residual
