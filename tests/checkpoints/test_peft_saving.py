"""Adapters written for PEFT: keys, shapes, config, README, patterns, DoRA, heads."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peft_models import SHAPES, Group, adapters, assert_same_adapters, error, fill, plain_model, save, stacked_model
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints.peft import load_adapter, save_adapter
from qlora_jax.errors import UserError
from qlora_jax.nn import add_lora, nf4_dense


def test_keys_shapes_and_transposes_are_pefts(tmp_path):
    model = fill(
        add_lora(stacked_model(), rank=4, alpha=8.0, dropout=0.1, targets=["q_proj", "down_proj"], rngs=nnx.Rngs(0))
    )
    save(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = {}
    for i in range(2):
        for part, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
            dense = getattr(getattr(model.layers, part), name)
            key = f"base_model.model.model.layers.{i}.{part}.{name}"
            expected[f"{key}.lora_A.weight"] = np.asarray(dense.lora_a.get_value()[i]).T
            expected[f"{key}.lora_B.weight"] = np.asarray(dense.lora_b.get_value()[i]).T
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert tensors[key].dtype == np.float32
        np.testing.assert_array_equal(tensors[key], value)
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 192)


def test_config_and_readme(tmp_path):
    save(
        add_lora(stacked_model(), rank=4, alpha=8.0, dropout=0.1, targets=["v_proj", "q_proj"], rngs=nnx.Rngs(0)),
        tmp_path / "a",
    )
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert {
        key: config[key] for key in ("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "bias")
    } == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "inference_mode": True,
        "bias": "none",
    }
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    text = (tmp_path / "a" / "README.md").read_text()
    for needed in ("org/base", "abc123", "PeftModel.from_pretrained", "in training: bfloat16", str(tmp_path / "a")):
        assert needed in text
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 4
    compile(code, "README.md", "exec")


def test_readme_of_a_gguf_base(tmp_path):
    model = add_lora(plain_model("q_proj", quant_type="nf4"), rank=2, rngs=nnx.Rngs(0))
    save_adapter(model, tmp_path / "a", base_model="/models/smol.Q4_1.gguf", base_sha256="ab")
    text = (tmp_path / "a" / "README.md").read_text()
    assert 'from_pretrained("/models", gguf_file="smol.Q4_1.gguf"' in text
    assert "in training: nf4, blocks of 64" in text


def test_targets_are_whole_names_where_a_leaf_name_would_reach_too_far(tmp_path):
    model = plain_model("q_proj", "v_proj")
    add_lora(model.layers[1].q_proj, rank=2, rngs=nnx.Rngs(0))
    add_lora(model.lm_head, rank=2, rngs=nnx.Rngs(0))
    save(fill(model), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["lm_head", "model.layers.1.q_proj"]
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert "base_model.model.lm_head.lora_A.weight" in keys
    other = load_adapter(plain_model("q_proj", "v_proj"), tmp_path / "a")
    assert other.layers[0].q_proj.rank == 0
    assert_same_adapters(model, other)


def test_tokenizer_and_template_go_with_it(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>")),
        chat_template="{{ messages }}",
    )
    save(add_lora(plain_model("q_proj"), rank=2, rngs=nnx.Rngs(0)), tmp_path / "a", tokenizer=tokenizer)
    read = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert read.chat_template == "{{ messages }}"
    assert read.get_vocab() == {"<s>": 0, "a": 1}


def test_an_adapter_is_replaced_whole(tmp_path):
    model = add_lora(plain_model("q_proj"), rank=2, rngs=nnx.Rngs(0))
    save(fill(model, 1), tmp_path / "a")
    (tmp_path / "a" / "stray").write_text("")
    save(fill(model, 2), tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert_same_adapters(model, load_adapter(plain_model("q_proj"), tmp_path / "a"))


def test_a_failed_save_leaves_the_old_adapter(tmp_path):
    model = add_lora(plain_model("q_proj"), rank=2, rngs=nnx.Rngs(0))
    save(fill(model, 1), tmp_path / "a")
    old = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}

    class Broken:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(fill(model, 2), tmp_path / "a", tokenizer=Broken())
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == old
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(UserError, match="has no adapters"):
        save(plain_model("q_proj"), tmp_path / "a")
    model = plain_model("q_proj")
    add_lora(model.layers[0].q_proj, rank=2, rngs=nnx.Rngs(0))
    add_lora(model.layers[1].q_proj, rank=4, rngs=nnx.Rngs(0))
    model.layers[0].q_proj.dropout = 0.1
    with pytest.raises(UserError, match=r"adapters differ in dropout: \[0.0, 0.1\]"):
        save(model, tmp_path / "a")
    model = add_lora(plain_model("q_proj"), rank=2, rngs=nnx.Rngs(0))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(UserError, match="is a file"):
            save(model, path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds no adapter"):
        save(model, tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]
    stray = Group(blocks=nf4_dense.from_kernel(jnp.ones((3, 64, 8)), rank=2, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="stack of layers at blocks"):
        save(stray, tmp_path / "a")


def peft_folder(folder, config, linears, *, seed=3, more=None):
    """What PEFT writes: random factors for each module, of its rank."""
    rng, tensors = np.random.default_rng(seed), dict(more or {})
    for name, rank in linears.items():
        part, leaf = name.split(".")[-2:]
        in_features, out_features = SHAPES[part][leaf]
        tensors[f"base_model.model.{name}.lora_A.weight"] = rng.normal(size=(rank, in_features)).astype(np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = rng.normal(size=(out_features, rank)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return tensors


def updates(tensors, scalings):
    """scaling * B A of each module, float64."""
    return {
        name: scaling
        * tensors[f"base_model.model.{name}.lora_B.weight"].astype(np.float64)
        @ tensors[f"base_model.model.{name}.lora_A.weight"].astype(np.float64)
        for name, scaling in scalings.items()
    }


PATTERNS = {  # rank, alpha by module, for r=4, lora_alpha=8, rsLoRA
    "model.layers.0.self_attn.q_proj": (2, 8),
    "model.layers.1.self_attn.q_proj": (4, 5),
    "model.layers.1.mlp.up_proj": (4, 8),
    "model.layers.0.mlp.down_proj": (3, 8),
    "model.layers.1.mlp.down_proj": (3, 8),
}


def test_patterns_single_layers_and_rslora_there_and_back(tmp_path):
    """Modules that differ in rank and alpha, and layers that are left out, keep their own B A through a stack."""
    config = {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "mlp.up_proj", "down_proj", "v_proj"],
        "exclude_modules": ["model.layers.0.mlp.up_proj", "v_proj"],
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "down_proj": 3},
        "alpha_pattern": {"1.self_attn.q_proj": 5},
    }
    tensors = peft_folder(tmp_path / "a", config, {name: rank for name, (rank, _) in PATTERNS.items()})
    wanted = updates(tensors, {n: alpha / math.sqrt(rank) for n, (rank, alpha) in PATTERNS.items()})
    model = load_adapter(stacked_model(), tmp_path / "a")
    assert (model.layers.self_attn.q_proj.rank, model.layers.mlp.down_proj.rank) == (4, 3)
    assert model.layers.self_attn.v_proj.rank == 0
    for name in ("up_proj", "down_proj"):
        dense = getattr(model.layers.mlp, name)
        for i in range(2):
            found = dense.scaling * (dense.lora_a.get_value()[i] @ dense.lora_b.get_value()[i]).T
            expected = wanted.get(f"model.layers.{i}.mlp.{name}", np.zeros(found.shape))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    save(model, tmp_path / "b")
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    again = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in tensors.items()}
    assert written["rank_pattern"]["model.layers.0.self_attn.q_proj"] == 2
    assert written["target_modules"] == sorted(PATTERNS)  # up_proj of layer 0 is not among them
    from qlora_jax.checkpoints.peft_reader import read_adapter

    sizes = {
        f"model.layers.{i}.{part}.{name}": shape[::-1]
        for i in range(2)
        for part, linears in SHAPES.items()
        for name, shape in linears.items()
    }
    read = read_adapter(tmp_path / "b", sizes)
    assert read.linears.keys() == wanted.keys()
    for name, linear in read.linears.items():
        found = linear.scaling * linear.b.astype(np.float64) @ linear.a.astype(np.float64)
        np.testing.assert_allclose(found, wanted[name], rtol=1e-5, atol=1e-5)


def test_real_dora_adapter_there_and_back(golden_dir, tmp_path):
    """PEFT's magnitudes on the base that it was made for are the lengths of that base's rows."""
    from qlora_jax.checkpoints.merging import MergedCheckpoint, adapter_for
    from qlora_jax.checkpoints.source import open_checkpoint
    from qlora_jax.models.loading import load_model

    folder, ids = golden_dir / "interop" / "adapter_dora", jnp.arange(3, 35)[None]
    base = golden_dir / "interop" / "tiny_llama_bnb4"
    model = load_model(base, dtype=jnp.float32)
    plain = model(ids)
    q_proj = load_adapter(model, folder).layers.self_attn.q_proj
    np.testing.assert_allclose(jnp.sqrt(q_proj.squares.get_value()), q_proj.lora_magnitude.get_value(), rtol=2**-8)
    np.testing.assert_allclose(model(ids), plain, atol=1e-2)  # B is zero
    fill(model)
    save(model, tmp_path / "a")
    again = load_adapter(load_model(base, dtype=jnp.float32), tmp_path / "a")
    assert_same_adapters(model, again)
    np.testing.assert_array_equal(model(ids), again(ids))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["use_dora"] is True
    checkpoint = open_checkpoint(base)
    merged = MergedCheckpoint(checkpoint, adapter_for(checkpoint, tmp_path / "a"), dtype="float32")
    for i in range(2):
        lengths = np.linalg.norm(merged.read(f"model.layers.{i}.self_attn.q_proj.weight"), axis=1)
        np.testing.assert_allclose(lengths, np.abs(q_proj.lora_magnitude.get_value()[i]), rtol=1e-5)


def test_dora_and_lora_do_not_mix(golden_dir, tmp_path):
    folder = golden_dir / "interop" / "adapter_dora"
    targets = ["q_proj", "v_proj"]
    text = error(add_lora(stacked_model(), rank=8, targets=targets, rngs=nnx.Rngs(0)), folder)
    assert "one is DoRA's and one LoRA's" in text
    load_adapter(add_lora(stacked_model(), rank=8, dora=True, targets=targets, rngs=nnx.Rngs(0)), folder)
    model = add_lora(stacked_model(), rank=8, targets=["q_proj"], rngs=nnx.Rngs(0))
    add_lora(model, rank=8, dora=True, targets=["v_proj"], rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="some adapters are DoRA's"):
        save(model, tmp_path / "a")
    config = {"r": 2, "target_modules": ["q_proj"], "use_dora": True, "layers_to_transform": [1]}
    more = {"base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector": np.ones(128, np.float32)}
    peft_folder(tmp_path / "b", config, {"model.layers.1.self_attn.q_proj": 2}, more=more)
    assert "1 of 2 layers" in error(stacked_model(), tmp_path / "b")


def test_layers_that_an_adapter_leaves_out_get_no_gradient(tmp_path):
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": 1}
    peft_folder(tmp_path / "a", config, {"model.layers.1.self_attn.q_proj": 2})
    dense = load_adapter(stacked_model(), tmp_path / "a").layers.self_attn.q_proj
    graph, lora, rest = nnx.split(dense, nnx.LoRAParam, ...)

    def loss(lora):
        from qlora_jax.nn import scan_layers

        return (scan_layers(nnx.merge(graph, lora, rest), jnp.ones((3, 128))) ** 2).sum()

    for leaf in jax.tree.leaves(jax.grad(loss)(lora)):
        assert not leaf[0].any()
        assert leaf[1].any()


def test_a_replaced_head_is_used_and_goes_with_the_adapter(golden_dir, tmp_path):
    from qlora_jax.models.loading import load_model

    interop, ids = golden_dir / "interop", jnp.arange(3, 19)[None]
    head = np.random.default_rng(0).normal(size=(256, 128)).astype(np.float32)
    more = {"base_model.model.lm_head.weight": head}
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    peft_folder(tmp_path / "a", config, {f"model.layers.{i}.self_attn.q_proj": 2 for i in range(2)}, more=more)
    model = load_model(interop / "tiny_llama_bf16", dtype=jnp.float32)
    states = np.asarray(load_adapter(model, tmp_path / "a").hidden(ids), np.float64)
    np.testing.assert_allclose(model(ids), states @ head.T, rtol=1e-4, atol=1e-4)
    save(model, tmp_path / "b")
    again = load_adapter(load_model(interop / "tiny_llama_bf16", dtype=jnp.float32), tmp_path / "b")
    np.testing.assert_array_equal(again(ids), model(ids))
    assert {path[-1] for path in adapters(again)} == {"lora_a", "lora_b"}  # the head is frozen
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["lm_head"]
