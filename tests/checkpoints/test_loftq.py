"""LoftQ: the adapter is the best of its rank, rounds bring base and adapter nearer, and both lie in one folder."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.checkpoints.conversion import convert
from qlora_jax.checkpoints.loftq import LoftQ, factors
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.models.loading import load_model

NF4 = {"quant_type": "nf4", "block_size": 64, "double_quant": True}


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), data=st.data())
def test_factors_are_the_best_of_their_rank(rows, columns, data):
    """Eckart and Young: what is left has the norm of the other singular values, by NumPy's SVD in float64."""
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = np.random.default_rng(rows * 41 + columns).normal(size=(rows, columns)).astype(np.float32)
    b, a = factors(matrix, rank)
    assert (b.shape, a.shape, b.dtype) == ((rows, rank), (rank, columns), np.float32)
    singular = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    left = np.linalg.norm(matrix - b.astype(np.float64) @ a)
    assert left == pytest.approx(np.sqrt(np.sum(singular[rank:] ** 2)), rel=1e-3, abs=1e-3 * singular[0])


@pytest.mark.parametrize("iterations", [1, 5])
def test_base_and_adapter_together_are_nearer_to_the_model(golden_dir, tmp_path, iterations):
    source = open_checkpoint(golden_dir / "interop" / "tiny_llama_bf16")
    out, plain = tmp_path / "out", tmp_path / "plain"
    loftq = LoftQ(8, 4.0, iterations, NF4)
    convert(source, out, **NF4, quantize=loftq.quantize, also=lambda filled: loftq.write(filled, out))
    convert(source, plain, **NF4)
    assert [path.name for path in (out / "adapter").iterdir()].count("adapter_model.safetensors") == 1
    same = (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert same == (iterations == 1)  # one round leaves the base's bytes as they are
    tensors, ours, base = (
        load_file(out / "adapter" / "adapter_model.safetensors"),
        open_checkpoint(out),
        open_checkpoint(plain),
    )
    left = alone = 0.0
    for name in source.names():
        if "_proj" not in name:
            continue
        key = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (tensors[f"{key}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
        wanted = source.read(name).astype(np.float64)
        left += np.sum((wanted - ours.read(name).astype(np.float64) - 4 / 8 * b @ a) ** 2)
        alone += np.sum((wanted - base.read(name).astype(np.float64)) ** 2)
    assert np.sqrt(left) == pytest.approx(loftq.error, rel=1e-4)
    assert np.sqrt(alone) == pytest.approx(loftq.error_plain, rel=1e-4)
    assert np.sqrt(left / alone) < (0.9 if iterations == 1 else 0.8)

    ids = jnp.arange(3, 35)[None]
    exact = load_model(source, quant_type=None, dtype=jnp.float32)(ids)
    quantized = load_model(source, dtype=jnp.float32)(ids)
    started = load_adapter(load_model(out, dtype=jnp.float32), out / "adapter")(ids)
    assert np.linalg.norm(started - exact) < 0.95 * np.linalg.norm(quantized - exact)


def test_it_goes_through_the_doors(tiny_llama, tmp_path, capfd):
    from qlora_jax import convert as door
    from qlora_jax import train

    folder, rows = tiny_llama
    out = tmp_path / "out"
    assert door.main([str(folder), str(out), "--loftq-rank", "4", "--loftq-iterations", "2"]) == 0
    told = capfd.readouterr().out
    assert f"lora.adapter={out / 'adapter'}" in told
    assert 50 < int(told.partition("weights by ")[2].partition("%")[0]) < 100
    run = ["model.path=" + str(out), f"lora.adapter={out / 'adapter'}", f"data.path={rows}", "train.seq_len=64"]
    assert train.main([*run, f"output_dir={tmp_path / 'run'}", "--dry-run"]) == 0
    assert f"goes on from {out / 'adapter'}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--loftq-rank", "300"], "is 128 x 192"),
        (["--loftq-rank", "0"], "--loftq-rank 0"),
        (["--loftq-alpha", "3"], "without --loftq-rank"),
        (["--loftq-rank", "4", "--loftq-iterations", "-1"], "--loftq-iterations -1"),
    ],
)
def test_mistakes(golden_dir, tmp_path, capfd, arguments, words):
    from qlora_jax import convert as door

    source = golden_dir / "interop" / "tiny_llama_bf16"
    assert door.main([str(source), str(tmp_path / "out"), *arguments]) == 2
    assert words in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
