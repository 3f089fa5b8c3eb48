"""A T5 out again: converted, merged, in 4 bits with its adapter, as LoftQ and as DoRA."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax import convert as convert_door
from qlora_jax import export as export_door
from qlora_jax.checkpoints.bitsandbytes import BitsandbytesCheckpoint
from qlora_jax.checkpoints.bitsandbytes_writer import save_bitsandbytes
from qlora_jax.checkpoints.conversion import block_linears
from qlora_jax.checkpoints.peft import load_adapter, save_adapter
from qlora_jax.checkpoints.source import open_checkpoint
from qlora_jax.errors import UserError
from qlora_jax.models.loading import load_model
from qlora_jax.nf4 import NF4Tensor, dequantize
from qlora_jax.nn import nf4_dense
from qlora_jax.nn.traversal import walk


@pytest.fixture(scope="module")
def base(make_tiny_t5, tmp_path_factory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("t5") / "base", num_decoder_layers=3)


def linears(model: nnx.Module) -> dict[str, nf4_dense]:
    """By the name of the first layer's weight, without its number."""
    return {".".join(path): node for path, node in walk(model) if isinstance(node, nf4_dense)}


def kernels(model: nnx.Module) -> dict[str, np.ndarray]:
    """The weights `[out, in]` that a model multiplies by, under the names of checkpoints."""
    found = {}
    for path, dense in linears(model).items():
        stack, rest = path.split(".block.")
        stored = dense.kernel.get_value()
        values = dequantize(stored) if isinstance(stored, NF4Tensor) else stored
        for layer, kernel in enumerate(np.asarray(values)):
            found[f"{stack}.block.{layer}.{rest}.weight"] = kernel.T
    return found


def with_adapter(base: Path, folder: Path, **settings) -> nnx.Module:
    """A model whose adapters do something; saved in `folder`."""
    model = load_model(base, rank=4, alpha=8.0, dtype=jnp.float32, **settings)
    rng = np.random.default_rng(0)
    for dense in linears(model).values():
        b = dense.lora_b
        b.set_value(jnp.asarray(0.05 * rng.standard_normal(b.get_value().shape), jnp.float32))
    checkpoint = open_checkpoint(base)
    save_adapter(
        model,
        folder,
        base_model=str(base),
        base_sha256=checkpoint.fingerprint(),
        tokenizer=checkpoint.tokenizer(),
    )
    return model


def test_the_linears_are_those_that_are_multiplied_by(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    assert sorted(block_linears(checkpoint)) == sorted(kernels(load_model(base)))


def test_converted_it_has_the_values_of_a_model_that_is_quantized_while_it_is_read(base, tmp_path, capfd) -> None:
    out = tmp_path / "out"
    assert convert_door.main([str(base), str(out)]) == 0
    assert "out has wo in 16 bits, with the values that 4 bits stand for" in capfd.readouterr().err
    checkpoint = open_checkpoint(out)
    assert isinstance(checkpoint, BitsandbytesCheckpoint)
    assert {name.split(".")[-2] for name in block_linears(checkpoint) if checkpoint.form(name) is None} == {"wo"}
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head", "wo"]
    expected, got = kernels(load_model(base)), kernels(load_model(out))
    assert expected.keys() == got.keys()
    for name, kernel in expected.items():
        np.testing.assert_array_equal(got[name], kernel, err_msg=name)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_exported_it_is_what_was_trained(base, tmp_path, capfd) -> None:
    model = with_adapter(base, tmp_path / "adapter")
    assert export_door.main([str(tmp_path / "adapter"), str(tmp_path / "merged"), "--to", "merged"]) == 0
    merged, plain = kernels(load_model(tmp_path / "merged", quant_type=None)), kernels(model)
    for path, dense in linears(model).items():
        stack, rest = path.split(".block.")
        a, b = (np.asarray(factor.get_value()) for factor in (dense.lora_a, dense.lora_b))
        name = f"{stack}.block.1.{rest}.weight"
        wanted = plain[name].astype(np.float32) + 2.0 * (a[1] @ b[1]).T
        assert np.abs(merged[name] - wanted).max() <= 2**-8 * np.abs(wanted).max()
    capfd.readouterr()
    arguments = [str(tmp_path / "adapter"), str(tmp_path / "4bit"), "--to", "bitsandbytes", "--verify"]
    assert export_door.main(arguments) == 0
    numbers = re.search(r"difference to the run: (\S+),.* up to (\S+)\)", capfd.readouterr().out)
    assert numbers is not None
    assert float(numbers[1]) == 0
    assert float(numbers[2]) > 0.1


def test_loftq_brings_every_linear_nearer(base, tmp_path) -> None:
    out = tmp_path / "out"
    assert convert_door.main([str(base), str(out), "--loftq-rank", "8", "--loftq-iterations", "2"]) == 0
    model = load_adapter(load_model(out), out / "adapter")
    checkpoint, plain, near = open_checkpoint(base), kernels(load_model(base)), kernels(model)
    for path, dense in linears(model).items():
        stack, rest = path.split(".block.")
        a, b = (np.asarray(factor.get_value()) for factor in (dense.lora_a, dense.lora_b))
        name = f"{stack}.block.1.{rest}.weight"
        wanted = checkpoint.read(name).astype(np.float32)
        left = wanted - near[name] - dense.scaling * (a[1] @ b[1]).T
        assert np.linalg.norm(left) < 0.95 * np.linalg.norm(wanted - plain[name])


def test_save_bitsandbytes_is_for_decoders(base, tmp_path) -> None:
    with pytest.raises(UserError, match=r"(?s)is a T5.*qlora_jax.convert"):
        save_bitsandbytes(load_model(base), tmp_path / "out", source=base)
    assert not (tmp_path / "out").exists()
