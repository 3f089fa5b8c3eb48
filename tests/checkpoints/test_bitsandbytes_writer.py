"""Folders in bitsandbytes' format that are written here."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax.checkpoints.bitsandbytes_writer import save_bitsandbytes
from qlora_jax.errors import UserError
from qlora_jax.models.loading import load_model
from qlora_jax.nf4 import use_layout
from qlora_jax.nn import FrozenParam


def as_bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


@pytest.mark.parametrize("layout", ["rows", "fragments"])
def test_a_folder_read_and_written_is_the_same_tensor_for_tensor(golden_dir: Path, tmp_path, layout):
    source = golden_dir / "interop" / "tiny_llama_bnb4"
    with use_layout(layout):
        save_bitsandbytes(load_model(source, rank=4), tmp_path / "out", source=source)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", source))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if ".quant_state." in name:
            assert json.loads(ours[name].tobytes()) == json.loads(expected.tobytes())
        else:
            assert (ours[name].dtype, ours[name].shape) == (expected.dtype, expected.shape)
            np.testing.assert_array_equal(as_bits(ours[name]), as_bits(expected), err_msg=name)


@pytest.mark.parametrize(
    ("quant_type", "block_size", "double_quant"), [("nf4", 64, True), ("fp4", 64, False), ("fp4", 128, True)]
)
def test_a_model_quantized_here_reads_back_leaf_by_leaf(golden_dir, tmp_path, quant_type, block_size, double_quant):
    source = golden_dir / "interop" / "tiny_llama_bf16"
    model = load_model(source, quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    plain = load_model(source, quant_type=None)
    model.layers.self_attn.v_proj.kernel = FrozenParam(plain.layers.self_attn.v_proj.kernel.get_value())
    save_bitsandbytes(model, tmp_path / "out", source=source)
    again = load_model(tmp_path / "out")
    assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(model))
    for left, right in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(left, right)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["llm_int8_skip_modules"] == ["lm_head", "v_proj"]
    assert (written["bnb_4bit_quant_type"], written["bnb_4bit_use_double_quant"]) == (quant_type, double_quant)


@pytest.mark.parametrize(
    ("quant_type", "words"), [(None, "no linear of the model is in 4 bits"), ("e2m1", "type e2m1")]
)
def test_what_bitsandbytes_does_not_have_is_refused(golden_dir, tmp_path, quant_type, words):
    source = golden_dir / "interop" / "tiny_llama_bf16"
    with pytest.raises(UserError, match=words):
        save_bitsandbytes(load_model(source, quant_type=quant_type), tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()
