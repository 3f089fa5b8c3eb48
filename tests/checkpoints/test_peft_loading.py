"""Adapters as PEFT writes them, and every way in which a folder can be wrong."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_models import SHAPES, adapters, assert_same_adapters, error, fill, plain_model, save, stacked_model
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints.peft import load_adapter, module_names
from qlora_jax.nn import add_lora


@given(
    rank=st.integers(1, 5),
    alpha=st.one_of(st.integers(1, 64), st.floats(0.25, 64)),
    dropout=st.sampled_from([0.0, 0.05]),
    targets=st.sets(st.sampled_from([name for part in SHAPES.values() for name in part]), min_size=1),
)
@settings(max_examples=6, deadline=None)
def test_round_trip(tmp_path_factory, rank, alpha, dropout, targets):
    folder = tmp_path_factory.mktemp("adapter") / "a"
    model = add_lora(
        stacked_model(), rank=rank, alpha=alpha, dropout=dropout, targets=sorted(targets), rngs=nnx.Rngs(0)
    )
    save(fill(model, rank), folder)
    other = load_adapter(stacked_model(), folder)
    assert_same_adapters(model, other)
    for part, linears in SHAPES.items():
        for name in linears:
            ours, theirs = (getattr(getattr(m.layers, part), name) for m in (model, other))
            assert (ours.rank, ours.alpha, ours.dropout) == (
                theirs.rank,
                theirs.alpha,
                theirs.dropout,
            ) or name not in targets
            assert theirs.rank == (rank if name in targets else 0)


def test_loaded_adapter_computes_what_peft_computes(tmp_path):
    model = fill(add_lora(plain_model("q_proj"), rank=3, alpha=6.0, rngs=nnx.Rngs(0)))
    save(model, tmp_path / "a")
    base = plain_model("q_proj", quant_type="nf4")
    x = jax.random.normal(jax.random.key(0), (5, 64))
    plain = base.layers[1].q_proj(x)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.layers.1.q_proj.lora_{f}.weight"].astype(np.float64) for f in "AB")
    expected = np.asarray(plain, np.float64) + 6.0 / 3 * np.asarray(x, np.float64) @ a.T @ b.T
    np.testing.assert_allclose(load_adapter(base, tmp_path / "a").layers[1].q_proj(x), expected, rtol=1e-4, atol=1e-4)


def test_real_adapter_of_all_linear_layers_with_rslora(golden_dir):
    folder = golden_dir / "interop" / "adapter_all_linear"
    model = load_adapter(stacked_model(), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for part, linears in SHAPES.items():
        for name in linears:
            dense = getattr(getattr(model.layers, part), name)
            assert dense.rank == 8
            assert math.isclose(dense.scaling, 16 / math.sqrt(8), rel_tol=1e-15)
            for i in range(2):
                key = f"base_model.model.model.layers.{i}.{part}.{name}"
                np.testing.assert_array_equal(dense.lora_a.get_value()[i], tensors[f"{key}.lora_A.weight"].T)
                np.testing.assert_array_equal(dense.lora_b.get_value()[i], tensors[f"{key}.lora_B.weight"].T)


def test_logits_of_a_real_adapter_on_a_real_base(golden_dir):
    """PEFT on bitsandbytes' 4-bit base in bfloat16 wrote these logits; golden/README.md gives the tolerance."""
    from qlora_jax.models.loading import load_model

    interop = golden_dir / "interop"
    golden = np.load(interop / "tiny_llama_logits.npz")
    model = load_model(interop / "tiny_llama_bf16", dtype=jnp.float32)
    ids = jnp.asarray(golden["ids"], jnp.int32)
    base = np.asarray(model(ids))
    adapted = np.asarray(load_adapter(model, interop / "adapter_all_linear")(ids))
    for ours, theirs in ((base, golden["logits_base"]), (adapted, golden["logits_adapter"])):
        assert np.abs(ours - theirs).max() < 1e-2
        assert np.sqrt(np.mean((ours - theirs) ** 2)) < 3e-3
    assert np.abs(base - adapted).max() > 0.1


def test_real_adapter_of_default_targets(golden_dir):
    model = load_adapter(stacked_model(), golden_dir / "interop" / "adapter_default")
    ranks = {name: getattr(model.layers.self_attn, name).rank for name in SHAPES["self_attn"]}
    assert ranks == {"q_proj": 8, "k_proj": 0, "v_proj": 8, "o_proj": 0}
    assert (model.layers.self_attn.q_proj.alpha, model.layers.self_attn.q_proj.dropout) == (16.0, 0.05)


@pytest.mark.parametrize(
    ("name", "words"),
    [("mts", "replaces lm_head.weight"), ("emb", "adapts an embedding")],
)
def test_real_adapters_of_other_kinds_are_refused(golden_dir, name, words):
    assert words in error(stacked_model(), golden_dir / "interop" / f"adapter_{name}")


@pytest.fixture
def saved(tmp_path):
    """An adapter of q_proj and v_proj of the stacked model, rank 4, and a function that edits its config."""
    folder = tmp_path / "a"
    save(fill(add_lora(stacked_model(), rank=4, targets=["q_proj", "v_proj"], rngs=nnx.Rngs(0))), folder)

    def edit(**changes):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder

    return edit


@pytest.mark.parametrize(
    "spelling",
    [
        ["q_proj", "v_proj"],
        ["self_attn.q_proj", "self_attn.v_proj"],
        [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")],
        r".*\.self_attn\.(q|v)_proj",
        None,
    ],
    ids=["leaf names", "dotted", "whole names", "pattern", "default"],
)
def test_every_spelling_of_the_targets(saved, spelling):
    folder = saved(target_modules=spelling)
    model = load_adapter(stacked_model(), folder)
    assert model.layers.self_attn.v_proj.rank == 4
    assert model.layers.self_attn.k_proj.rank == 0


def test_all_linear_leaves_the_head_out(tmp_path):
    model = add_lora(plain_model("q_proj", "up_proj"), rank=2, targets=["layers"], rngs=nnx.Rngs(0))
    save(fill(model), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": "all-linear"}))
    other = load_adapter(plain_model("q_proj", "up_proj"), tmp_path / "a")
    assert_same_adapters(model, other)
    assert other.lm_head.rank == 0


def test_an_adapter_of_the_same_rank_is_filled_and_others_are_refused(saved):
    folder = saved(lora_alpha=32, some_key_of_a_later_version={"a": 1})
    model = add_lora(stacked_model(), rank=4, targets=["q_proj", "v_proj"], rngs=nnx.Rngs(9))
    assert load_adapter(model, folder) is model
    assert_same_adapters(model, load_adapter(stacked_model(), folder))
    assert model.layers.self_attn.q_proj.alpha == 32.0
    text = error(add_lora(stacked_model(), rank=2, targets=["q_proj", "v_proj"], rngs=nnx.Rngs(9)), folder)
    assert "rank 2 at model.layers.0.self_attn.q_proj" in text
    text = error(add_lora(stacked_model(), rank=4, targets=["q_proj", "v_proj", "o_proj"], rngs=nnx.Rngs(9)), folder)
    assert "model.layers.0.self_attn.o_proj" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"use_qalora": True},
        {"modules_to_save": ["norm"]},
        {"lora_bias": True},
        {"bias": "all"},
        {"rank_pattern": {"(q_proj": 8}},
        {"alpha_pattern": {"(q_proj": 8}},
        {"init_lora_weights": "pissa"},
        {"peft_type": "LOHA"},
        {"r": 0},
        {"lora_alpha": 0},
        {"target_modules": "(q_proj"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_would_give_other_outputs_are_refused(saved, changes):
    assert next(iter(changes)) in error(stacked_model(), saved(**changes))


def test_several_problems_are_told_at_once(saved):
    text = error(stacked_model(), saved(layer_replication=[[0, 1]], bias="lora_only", modules_to_save=["norm"]))
    assert all(word in text for word in ("layer_replication", "bias=lora_only", "modules_to_save"))


def test_targets_that_the_model_lacks(saved):
    text = error(stacked_model(), saved(target_modules=["c_attn"]))
    assert "c_attn" in text
    assert "q_proj" in text
    assert "v_proj.lora_A" in error(stacked_model(), saved(target_modules=["q_proj"]))  # left over
    assert "lacks" in error(stacked_model(), saved(target_modules=["q_proj", "v_proj", "k_proj"]))
    assert "model.layers.1." in error(stacked_model(), saved(layers_to_transform=[0]))  # left over
    saved(layers_to_transform=None)
    assert "model.layers.2." in error(stacked_model(layers=3), saved(target_modules=["q_proj", "v_proj"]))
    assert "model.layers.1." in error(stacked_model(layers=1), saved())
    assert "lm_head.weight" in error(stacked_model(), saved(modules_to_save=["lm_head"]))  # it has no head


def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, file)


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def test_transposed_factors_are_refused(saved):
    folder = saved()

    def transpose(tensors):
        for key in tensors:
            tensors[key] = tensors[key].T

    rewrite(folder, transpose)
    text = error(stacked_model(), folder)
    assert "transposed" in text
    assert "lora_A.weight" in text


def test_shapes_keys_and_values_are_checked(saved):
    folder = saved()
    shutil.copytree(folder, folder.parent / "spare")

    def restart():
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "spare", folder)

    rewrite(folder, lambda t: t.update({KEY: np.zeros((65, 4), np.float32)}))
    assert f"{KEY} (65, 4), expected (64, 4)" in error(stacked_model(), folder)
    restart()
    rewrite(folder, lambda t: t.pop(KEY))
    assert f"lacks {KEY}" in error(stacked_model(), folder)
    restart()
    rewrite(folder, lambda t: t.update({"base_model.model.lm_head.weight": np.zeros((4, 4), np.float32)}))
    assert "belong to no layer of the model: base_model.model.lm_head.weight" in error(stacked_model(), folder)
    restart()
    rewrite(folder, lambda t: t[KEY].__setitem__((3, 1), np.nan))
    assert f"NaN or infinity in {KEY}" in error(stacked_model(), folder)


def test_half_precision_factors_are_widened(saved):
    folder = saved()
    rewrite(folder, lambda t: t.update({key: value.astype(np.float16) for key, value in t.items()}))
    model = load_adapter(stacked_model(), folder)
    assert {leaf.get_value().dtype for leaf in adapters(model).values()} == {jnp.dtype(jnp.float32)}


def test_missing_and_damaged_files(saved, tmp_path):
    assert "no such adapter folder" in error(stacked_model(), tmp_path / "nothing")
    assert "no adapter_config.json" in error(stacked_model(), tmp_path)
    folder = saved()
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-50])
    text = error(stacked_model(), folder)
    assert f"{file} is truncated" in text
    assert "tensor 'base_model.model." in text
    file.unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    assert "pickle" in error(stacked_model(), folder)
    (folder / "adapter_config.json").write_text("{")
    assert "not valid JSON" in error(stacked_model(), folder)


def test_module_names():
    assert module_names(("lm_head",), None) == ("lm_head",)
    assert module_names(("layers", "mlp", "up_proj"), 2) == ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    assert module_names(("layers", "3", "q_proj"), None) == ("model.layers.3.q_proj",)
