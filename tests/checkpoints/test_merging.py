"""Merged weights against float64, and models of merged folders against the model with its adapter."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import open_checkpoint
from qlora_jax.checkpoints.conversion import convert, write_dense
from qlora_jax.checkpoints.merging import MergedCheckpoint, adapter_for
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.models.loading import load_model

IDS = jnp.arange(3, 35, dtype=jnp.int32)[None]
NF4 = {"quant_type": "nf4", "block_size": 64, "double_quant": True}


def logits(model) -> np.ndarray:
    return np.asarray(model(IDS))


@pytest.fixture(scope="module")
def interop(golden_dir):
    return golden_dir / "interop"


@pytest.mark.parametrize("quantized", [None, NF4, {"quant_type": "e2m1", "block_size": 32, "double_quant": False}])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_every_linear_is_base_plus_scaled_product(interop, quantized, dtype):
    """W + scaling * B A in float64, rounded once; every other tensor is the base's."""
    base = open_checkpoint(interop / "tiny_llama_bf16")
    adapter = adapter_for(base, interop / "adapter_all_linear")
    merged = MergedCheckpoint(base, adapter, quantized=quantized, dtype=dtype)
    model = load_model(base, **(quantized or {"quant_type": None}))
    factors = load_file(interop / "adapter_all_linear" / "adapter_model.safetensors")
    from qlora_jax.nf4 import NF4Tensor, dequantize

    assert merged.names() == base.names()
    for name in base.names():
        found = merged.read(name)
        assert found.dtype == merged.dtype(name) == (dtype or ml_dtypes.bfloat16)
        if "_proj" not in name:
            np.testing.assert_array_equal(found, base.read(name).astype(found.dtype))
            continue
        _, _, layer, part, linear, _ = name.split(".")
        kernel = getattr(getattr(model.layers, part), linear).kernel.get_value()
        trained_against = np.asarray(dequantize(kernel) if isinstance(kernel, NF4Tensor) else kernel)[int(layer)].T
        key = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (factors[f"{key}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
        expected = trained_against.astype(np.float64) + 16 / np.sqrt(8) * b @ a
        tolerance = 2**-8 if dtype is None else 1e-6
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_a_merged_folder_computes_what_the_adapted_model_computes(interop, tmp_path, base):
    """fp16 (11 bits): close to the model with its adapter, far from the base and from the other kind of base."""
    checkpoint = open_checkpoint(interop / "tiny_llama_bf16")
    adapter = adapter_for(checkpoint, interop / "adapter_all_linear")
    quantized = NF4 if base == "dequantized" else None
    merged = MergedCheckpoint(checkpoint, adapter, quantized=quantized, dtype="float16")
    write_dense(merged, tmp_path / "out", shard_bytes=200_000)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    ours = logits(load_model(tmp_path / "out", quant_type=None, dtype=jnp.float32))
    models = {}
    for kind, quant_type in (("dequantized", "nf4"), ("original", None)):
        model = load_model(checkpoint, quant_type=quant_type, dtype=jnp.float32)
        models[kind] = logits(load_adapter(model, interop / "adapter_all_linear"))
    differences = {kind: np.abs(ours - values).max() for kind, values in models.items()}
    assert differences.pop(base) < 1e-3
    assert min(differences.values()) > 1e-2


def test_a_base_in_4_bits_is_merged_as_it_lies(interop):
    base = open_checkpoint(interop / "tiny_llama_bnb4")
    merged = MergedCheckpoint(base, adapter_for(base, interop / "adapter_all_linear"), dtype="float32")
    name = "model.layers.1.mlp.up_proj.weight"
    factors = load_file(interop / "adapter_all_linear" / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{f}.weight"] for f in "AB")
    expected = base.read(name).astype(np.float32) + np.float32(16 / np.sqrt(8)) * b @ a
    np.testing.assert_allclose(merged.read(name), expected, rtol=1e-5, atol=1e-6)


def test_a_base_in_4_bits_is_written_again_byte_for_byte(interop, tmp_path):
    convert(open_checkpoint(interop / "tiny_llama_bnb4"), tmp_path / "out")
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", interop / "tiny_llama_bnb4"))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if ".quant_state." in name:
            assert json.loads(ours[name].tobytes()) == json.loads(expected.tobytes())
        else:
            np.testing.assert_array_equal(ours[name].view(np.uint8), expected.view(np.uint8), err_msg=name)


def test_a_head_that_came_with_the_adapter_is_in_the_merged_model(interop, tmp_path):
    source = interop / "adapter_mts"
    checkpoint = open_checkpoint(interop / "tiny_llama_bf16")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] *= -2
    save_file(tensors, folder / "adapter_model.safetensors")
    merged = MergedCheckpoint(checkpoint, adapter_for(checkpoint, folder))
    head = merged.read("lm_head.weight")
    assert head.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(head, tensors["base_model.model.lm_head.weight"].astype(ml_dtypes.bfloat16))
